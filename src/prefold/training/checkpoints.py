"""Checkpoints with a manifest: the sizes and SHA-256 sums of their files, checked before a checkpoint is loaded.

The manifest is written last, and the folder gets its name after that. A checkpoint that differs from its manifest, even
by an additional file, is not used, and the one before is taken.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from prefold.algorithms import State
from prefold.files import read_json, sha256_of, write_json
from prefold.terminal import warn

MANIFEST = "prefold.json"
"""The manifest of a checkpoint: the token budget, so that a resumed run splits its steps alike; the algorithm's state;
the step of the best checkpoint so far, if the run is to end with the best; and the files."""
TRAINER_STATE = "trainer_state.json"


def step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0


def checkpoints_in(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]


def write_manifest(checkpoint: Path, max_tokens: int, carried: State, best: int | None) -> None:
    """Write the manifest, the last file of a checkpoint."""
    files = {name: _size_and_sum(path) for name, path in _files(checkpoint).items()}
    manifest = {"max_tokens": max_tokens, "carried": dict(carried), "best": best, "files": files}
    write_json(checkpoint / MANIFEST, manifest)


def read_manifest(checkpoint: Path) -> tuple[int, State]:
    """The token budget and the algorithm's state at a checkpoint."""
    manifest = read_json(checkpoint / MANIFEST)
    return int(manifest["max_tokens"]), dict(manifest["carried"])


def last_checkpoint(checkpoints: Path) -> Path | None:
    """The newest checkpoint that training can resume from; None if there is none.

    Newer ones that are broken, or whose best checkpoint is, are reported and renamed.
    """
    for checkpoint in sorted(checkpoints_in(checkpoints), key=step_of, reverse=True):
        trouble = flaw(checkpoint) or _flaw_of_best(checkpoint)
        if not trouble:
            return checkpoint
        warn(f"{checkpoint.name} is passed over: {trouble}")
        aside = checkpoint.with_name(f"broken-{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(checkpoint, aside)
    return None


def flaw(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, empty if nothing is."""
    try:
        listed: dict[str, Any] = read_json(checkpoint / MANIFEST)["files"]
    except (OSError, ValueError, LookupError, TypeError):
        return f"its list of files, {MANIFEST}, is missing or cannot be read"
    files = _files(checkpoint)
    if missing := sorted(listed.keys() - files.keys()):
        return f"{missing[0]} is missing"
    if strange := sorted(files.keys() - listed.keys()):
        return f"{strange[0]} does not belong to it"
    for name, wanted in listed.items():
        size = files[name].stat().st_size
        if size != wanted["bytes"]:
            return f"{name} has {size:,} of {wanted['bytes']:,} bytes"
        if _size_and_sum(files[name]) != wanted:
            return f"{name} is not what was written"
    return ""


def _flaw_of_best(checkpoint: Path) -> str:
    best = read_json(checkpoint / MANIFEST)["best"]
    if best is None or best == step_of(checkpoint):
        return ""
    trouble = flaw(checkpoint.with_name(f"checkpoint-{best}"))
    return f"the best one before it, checkpoint-{best}: {trouble}" if trouble else ""


def _files(checkpoint: Path) -> dict[str, Path]:
    """The files of a checkpoint by their relative paths, without the manifest."""
    paths = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    return {path.relative_to(checkpoint).as_posix(): path for path in paths if path != checkpoint / MANIFEST}


def _size_and_sum(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
