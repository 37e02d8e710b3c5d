"""The files of a run that are published, each with its published name and its size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase

from prefold.errors import UserError, first_line
from prefold.files import read_json, without_home
from prefold.models.fetch import fetch
from prefold.models.tokenizer import load_tokenizer
from prefold.publishing.gguf import expected_bytes, file_name
from prefold.recipe import Publish
from prefold.reports.card import CARD, render_card

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
OF_THE_MODEL = ("config.json", "generation_config.json", *WEIGHTS, CARD)
"""The files in `merged/` that do not belong to the tokenizer."""
OF_A_CHECKPOINT = ("config.json", "generation_config.json", "adapter_config.json", *WEIGHTS)


@dataclass(frozen=True)
class Item:
    """A file to publish. `source`: its path or contents (None: it is made when it is published); `name`: its published
    name; `size`: in bytes."""

    source: Path | bytes | None
    name: str
    size: int


def items_of(run_folder: Path, section: Publish) -> list[Item]:
    """The files to publish: the model at the root, the adapter in a folder, or at the root if it is alone."""
    merged = run_folder / "merged"
    text = render_card(run_folder, tuple(section.what)).encode()
    items = [Item(text, CARD, len(text))]
    if "merged" in section.what:
        items += [_item(file, name) for name, file in _by_name(merged).items() if name != CARD]
    if "adapter" in section.what:
        # With the tokenizer and its template, which training on a new chat format changes.
        tokenizer = {name: file for name, file in _by_name(merged).items() if not _matches(file, OF_THE_MODEL)}
        files = {name: file for name, file in (tokenizer | _by_name(run_folder / "adapter")).items() if name != CARD}
        prefix = "" if section.what == ["adapter"] else "adapter/"
        items += [_item(file, prefix + name) for name, file in sorted(files.items())]
    for kind in section.gguf or []:
        file = run_folder / "gguf" / file_name(title_of(run_folder, section), kind)
        items.append(_item(file, file.name) if file.is_file() else Item(None, file.name, expected_bytes(merged, kind)))
    return items


def checkpoint_items(checkpoint: Path, tokenizer: Path) -> list[Item]:
    """The weights of a checkpoint, without the training state, and the files of a tokenizer."""
    weights = {name: file for name, file in _by_name(checkpoint).items() if _matches(file, OF_A_CHECKPOINT)}
    return [_item(file, name) for name, file in {**weights, **_by_name(tokenizer)}.items()]


def _by_name(folder: Path) -> dict[str, Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {file.relative_to(folder).as_posix(): file for file in files}


def _matches(file: Path, patterns: Sequence[str]) -> bool:
    return any(file.match(pattern) for pattern in patterns)


def _item(file: Path, name: str) -> Item:
    return Item(file, name, file.stat().st_size)


def title_of(run_folder: Path, section: Publish) -> str:
    return section.hub_model_id.rpartition("/")[2] if section.hub_model_id else run_folder.resolve().name


def require_whole(run_folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a run's merged model. Raises UserError: the model is not to be published, since its merge check
    failed or was not made, or a file is missing or damaged."""
    merged, record = run_folder / "merged", run_folder / "merge.json"
    where, redo = without_home(str(merged)), "`prefold merge` makes it again"
    result: dict[str, Any] = read_json(record) if record.is_file() else {}
    difference, allowed = result.get("relative_difference"), result.get("tolerance")
    if difference is None or allowed is None or not (math.isfinite(difference) and difference <= allowed):
        failed = "was not checked"
        if difference is not None:
            failed = f"failed its check: logits differ by {difference:.2g} of their size"
        raise UserError(f"the merged model {failed}; it is not published", where=where, advice=redo)
    try:
        for file in sorted(fetch(str(merged)).glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                opened.keys()
        return load_tokenizer(merged)
    except SafetensorError as error:
        raise UserError(f"{file.name} is damaged ({first_line(error)})", where=where, advice=redo) from None
