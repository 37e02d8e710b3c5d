"""Checkpoints that can be trusted: each lists its files with sizes and SHA-256, and is checked before it is loaded.

A checkpoint is complete when its list is there, which is written last; the folder gets its name after that. Whatever
differs from the list, a file too many included, is no checkpoint of ours, and the one before is taken.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from prefold.algorithms import State
from prefold.files import read_json, settle, write_json
from prefold.terminal import say

logger = logging.getLogger("prefold")

KEPT = "prefold.json"
"""In a checkpoint: the token budget that it was trained with, so that a resumed run splits its steps alike, what the
algorithm carries from step to step, the step of the checkpoint that was best so far if it is wanted in the end, and the
list of files."""


def step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0


def seal(checkpoint: Path, max_tokens: int, carried: State, best: int | None) -> None:
    """Write what a checkpoint keeps beside transformers' own files, with the list of them all, through to the disk."""
    files = {name: _listed(path) for name, path in _files(checkpoint).items()}
    kept = {"max_tokens": max_tokens, "carried": dict(carried), "best": best, "files": files}
    write_json(checkpoint / KEPT, kept)
    settle(checkpoint)


def kept_in(checkpoint: Path) -> tuple[int, State]:
    """The token budget that a checkpoint was trained with, and what its algorithm carried."""
    kept = read_json(checkpoint / KEPT)
    return int(kept["max_tokens"]), dict(kept["carried"])


def last_checkpoint(checkpoints: Path) -> Path | None:
    """The newest checkpoint that can be gone on from; None if there is none.

    Newer ones are broken, or the best one that they build on is. They are named, and put out of the way.
    """
    for checkpoint in sorted(_found(checkpoints), key=step_of, reverse=True):
        trouble = flaw(checkpoint) or _flaw_of_best(checkpoint)
        if not trouble:
            return checkpoint
        text = f"{checkpoint.name} is passed over: {trouble}"
        logger.warning(text)
        say(f"  {text}")
        aside = checkpoint.with_name(f"broken-{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(checkpoint, aside)
    return None


def flaw(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, empty if nothing is."""
    try:
        listed: dict[str, Any] = read_json(checkpoint / KEPT)["files"]
    except (OSError, ValueError, LookupError, TypeError):
        return f"its list of files, {KEPT}, is missing or cannot be read"
    files = _files(checkpoint)
    if missing := sorted(listed.keys() - files.keys()):
        return f"{missing[0]} is missing"
    if strange := sorted(files.keys() - listed.keys()):
        return f"{strange[0]} does not belong to it"
    for name, wanted in listed.items():
        size = files[name].stat().st_size
        if size != wanted["bytes"]:
            return f"{name} has {size:,} of {wanted['bytes']:,} bytes"
        if _listed(files[name]) != wanted:
            return f"{name} is not what was written"
    return ""


def _flaw_of_best(checkpoint: Path) -> str:
    best = read_json(checkpoint / KEPT)["best"]
    if best is None or best == step_of(checkpoint):
        return ""
    trouble = flaw(checkpoint.with_name(f"checkpoint-{best}"))
    return f"the best one before it, checkpoint-{best}: {trouble}" if trouble else ""


def _found(checkpoints: Path) -> list[Path]:
    return [path for path in checkpoints.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]


def _files(checkpoint: Path) -> dict[str, Path]:
    """By their names inside the checkpoint, its list left out."""
    found = {path.relative_to(checkpoint).as_posix(): path for path in sorted(checkpoint.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if name != KEPT}


def _listed(path: Path) -> dict[str, Any]:
    with path.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
