"""The paths in a recipe. Relative ones start from the folder in which prefold was called when the run began."""

from __future__ import annotations

import glob
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefold.files import without_home

INPUTS = "inputs.json"
"""Record in a run folder: `paths_from`, the folder that the recipe's relative paths start from, and `to_it`, its path
relative to the run folder; `read`: what the stages have read; `failed`: which rewards failed."""
PATHS = {
    *("model.name", "model.adapter", "model.chat_template"),
    *("data.train.path", "data.eval.path", "data.decontaminate.path", "data.decisions"),
    *("rewards.file", "rewards.model", "rounds.votes"),
    *("evaluate.include_path", "evaluate.compare_with", "evaluate.win_rate.judge.file"),
    *("evaluate.win_rate.judge.model", "evaluate.win_rate.votes", "generation.adapter_folder", "publish.to"),
}
"""The fields that hold paths, or may do so; indices of lists are left out."""
MADE = ("publish.to", "generation.adapter_folder")
"""Those of outputs, which need not exist yet."""


def run_folder(name: str) -> Path | None:
    """The run folder that `name` is, or whose `recipe.yaml` it is; None if it is neither."""
    path = Path(name).expanduser()
    if path.name == "recipe.yaml" and (path.parent / "run.log").is_file():
        path = path.parent
    return path if (path / "recipe.yaml").is_file() else None


def start_of_paths(folder: Path) -> Path:
    """The folder that the relative paths of a run's recipe start from: the one recorded when the run began; if that is
    gone, the folder at the same path relative to the run folder, as after moving both; else the working directory."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        record = json.loads((folder / INPUTS).read_text(encoding="utf-8"))
        for start in (Path(record["paths_from"]).expanduser(), folder.resolve() / record["to_it"]):
            if start.is_dir():
                return start.resolve()
    return Path.cwd()


def with_paths_from(start: Path, values: Any, field: str = "") -> Any:
    """A copy of a recipe's plain values in which relative paths from `start` are absolute: those that exist, and those
    of outputs."""
    if isinstance(values, dict):
        # Beside an endpoint, `model` is a name and never a path.
        names = {"model"} if "endpoint" in values else set()
        inner = {key: f"{field}.{key}".lstrip(".") for key in values}
        return {key: with_paths_from(start, value, "" if key in names else inner[key]) for key, value in values.items()}
    if isinstance(values, list):
        return [with_paths_from(start, value, field) for value in values]
    if field not in PATHS or not isinstance(values, str) or values == "chatml":
        return values
    path = start / Path(values).expanduser()
    is_path = os.path.exists(path) or field in MADE or (glob.has_magic(values) and glob.glob(str(path)))
    return without_home(str(path)) if is_path else values
