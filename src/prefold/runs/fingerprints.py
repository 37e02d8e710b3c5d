"""What a run reads beside its recipe, told apart by fingerprints: a run goes on with what it began with, or not at all.

Weights are too large to be read whole at every start, so of each file its size and a sample of its bytes counts: the
whole of a small one, and of a large one its head and pieces from end to end, which any training changes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefold.data.preference import RowId
from prefold.errors import UserError
from prefold.files import without_home
from prefold.models.fetch import fetch
from prefold.recipe import RecipeBase
from prefold.terminal import say

logger = logging.getLogger("prefold")

PIECE, PIECES = 2**16, 256
"""Bytes of a piece, and pieces of a file."""
DATA = ("train", "held_out")
WHOLE = ("*.safetensors", "config.json", "generation_config.json", "adapter_config.json")
"""What makes a model or an adapter. Its tokenizer shows in the data."""


def inputs_of(recipe: RecipeBase) -> dict[str, str]:
    """Fingerprints of the base model, of the adapter to go on from and of the reward files."""
    folders = {"base model": fetch(recipe.model.name, recipe.model.revision)}
    if recipe.model.adapter:
        folders["starting adapter"] = Path(recipe.model.adapter).expanduser()
    # The same weights compute something else by another scaling of positions, or of LoRA.
    files = {
        name: sorted(path for pattern in WHOLE for path in folder.glob(pattern)) for name, folder in folders.items()
    }
    for reward in recipe.rewards:
        if reward.file:
            files[f"reward file {without_home(reward.file)}"] = [Path(reward.file).expanduser()]
    return {name: _fingerprint(paths) for name, paths in files.items()}


def require_unchanged(began: Mapping[str, Any], current: Mapping[str, Any], where: str) -> None:
    """Compare what `data.json` holds with what a check finds now. A reward may be mended under way, and that is said.
    Raises UserError: something else differs; says what."""
    was, now = began["fingerprint"], current["fingerprint"]
    differing = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    changed = [name for name in differing if not name.startswith("reward file ")]
    for name in differing:
        if name not in changed:
            text = f"the {name} is not what it was when this run began, and the run goes on with it as it is now"
            logger.warning(text)
            say(f"  {text}")
    if not changed:
        return
    what = "the data is" if set(changed) <= set(DATA) else f"{' and '.join(changed)}: is"
    shown = "; ".join(f"{name} was {_shown(began, name)}, is {_shown(current, name)}" for name in changed[:5])
    advice = "restore the files, take another `output_dir`, or `--fresh` to start over"
    raise UserError(f"{what} not what it was when this run began ({shown})", where=where, advice=advice)


def _shown(facts: Mapping[str, Any], name: str) -> str:
    fingerprint = str(facts["fingerprint"].get(name, "not there"))
    return f"{fingerprint} ({facts['tokens'][name]['trees']:,} rows)" if name in DATA else fingerprint


def row_list(rows: Sequence[RowId]) -> str:
    """`pairs.jsonl 3, 7; more.jsonl 12`."""
    by_source: dict[str, list[int]] = {}
    for row in rows:
        by_source.setdefault(row.source, []).append(row.row)
    return "; ".join(f"{source} {', '.join(map(str, sorted(numbers)))}" for source, numbers in by_source.items())


def _fingerprint(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            starts: Sequence[int] = range(0, size, PIECE)
            if len(starts) > PIECES:
                starts = [number * (size - PIECE) // (PIECES - 1) for number in range(PIECES)]
            with path.open("rb") as opened:
                for start in starts:
                    opened.seek(start)
                    digest.update(opened.read(PIECE))
    return digest.hexdigest()[:12]
