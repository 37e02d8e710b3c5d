"""What prefold does with a file of pairs before it trains, without TRL in the process."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.sides import peak_bytes
from benchmarks.workloads import BATCH
from prefold.data.mixture import load_split
from prefold.models.tokenizer import load_tokenizer
from prefold.recipe import Data, Source
from prefold.trees.packing import pack

MAX_LENGTH = 4096


def prepare(connection: Connection, work: tuple[Path, Path]) -> None:
    """A side that answers with its peak memory in bytes."""
    file, model = work
    prepare_prefold(file, load_tokenizer(model))
    connection.send(peak_bytes())


def settings_for(file: Path) -> Data:
    return Data(train=[Source(path=str(file))], eval_fraction=0.01, max_length=MAX_LENGTH)


def prepare_prefold(file: Path, tokenizer: Any) -> None:
    trees = load_split(settings_for(file), tokenizer, seed=1).train.trees
    for start in range(0, len(trees), BATCH):
        pack(trees[start : start + BATCH])
