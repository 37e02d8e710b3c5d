"""The paths in a recipe, and the folder that they begin in: where prefold was called when the run began."""

from __future__ import annotations

import glob
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefold.files import without_home

INPUTS = "inputs.json"
"""In a run folder: `paths_from`, the folder that the recipe's relative paths begin in, and the way `to_it` from the run
folder; what the stages have `read`; which rewards `failed`."""
PATHS = {
    *("model.name", "model.adapter", "model.chat_template"),
    *("data.train.path", "data.eval.path", "data.decontaminate.path", "data.decisions"),
    *("rewards.file", "rewards.model", "rounds.votes"),
    *("evaluate.include_path", "evaluate.compare_with", "evaluate.win_rate.judge.file"),
    *("evaluate.win_rate.judge.model", "evaluate.win_rate.votes", "generation.adapter_folder", "publish.to"),
}
"""The fields that hold paths, or may do so; the numbers in lists are left out."""
MADE = ("publish.to", "generation.adapter_folder")
"""Those that lead to what is made."""


def run_folder(name: str) -> Path | None:
    """The run folder that is named, itself or by its `recipe.yaml`; None if it is something else."""
    path = Path(name).expanduser()
    if path.name == "recipe.yaml" and (path.parent / "run.log").is_file():
        path = path.parent
    return path if (path / "recipe.yaml").is_file() else None


def start_of_paths(folder: Path) -> Path:
    """Where the relative paths in the recipe of a run folder begin: where they did when the run began; if that is gone,
    where it would be had it moved together with the run; else here."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        record = json.loads((folder / INPUTS).read_text(encoding="utf-8"))
        for start in (Path(record["paths_from"]).expanduser(), folder.resolve() / record["to_it"]):
            if start.is_dir():
                return start.resolve()
    return Path.cwd()


def with_paths_from(start: Path, values: Any, field: str = "") -> Any:
    """A copy of the plain values of a recipe in which those relative paths that lead somewhere from `start` are
    absolute."""
    if isinstance(values, dict):
        # The model of an endpoint has a name there.
        apart = {"model"} if "endpoint" in values else set()
        inner = {key: f"{field}.{key}".lstrip(".") for key in values}
        return {key: with_paths_from(start, value, "" if key in apart else inner[key]) for key, value in values.items()}
    if isinstance(values, list):
        return [with_paths_from(start, value, field) for value in values]
    if field not in PATHS or not isinstance(values, str) or values == "chatml":
        return values
    path = start / Path(values).expanduser()
    is_there = os.path.exists(path) or field in MADE or (glob.has_magic(values) and glob.glob(str(path)))
    return without_home(str(path)) if is_there else values
