"""The run folder and its stages, in order: check, train, merge, evaluate, report.

A stage is done when its outputs exist; each of them appears under its final name only when it is whole, so a run that
is stopped anywhere goes on from there. What the stages do is in `stages.py`. The functions without an underscore are
the Python API, and what the commands call.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from prefold import ranks, stages
from prefold.errors import StageError, UserError
from prefold.files import read_json, require_writable, write_text
from prefold.recipe import RecipeBase, as_dict, dump_recipe, load_recipe
from prefold.stages import CheckReport
from prefold.terminal import say
from prefold.trainers.record import record_stage
from prefold.trees.memory import is_out_of_memory, keep_allocations


@dataclass(frozen=True)
class Stage:
    """`sections`: the parts of the recipe that its outputs depend on, beyond those of the stages before it. `shared`:
    several processes all take part; else the first one performs it alone."""

    name: str
    outputs: tuple[str, ...]
    sections: tuple[str, ...]
    perform: Callable[[RecipeBase], None]
    shared: bool = False

    def is_done(self, folder: Path) -> bool:
        return all((folder / output).exists() for output in self.outputs)

    def remove_outputs(self, folder: Path) -> None:
        for output in self.outputs:
            _remove(folder / output)


def stages_of(recipe: RecipeBase) -> list[Stage]:
    trained = "trained" if recipe.lora == "none" else "adapter"
    measured = "rewards" if recipe.algorithm.data == "prompts" else "heldout"
    return [
        Stage("check", ("data.json", "environment.json"), ("method", "model", "data"), stages.check),
        Stage("train", (trained,), ("lora", "train", "rewards", recipe.method), stages.train, shared=True),
        Stage("merge", ("merged", "merge.json"), ("merge",), stages.merge),
        Stage(
            "evaluate",
            (f"evaluation/{measured}.json", "samples.jsonl"),
            ("evaluate",),
            stages.evaluate,
            # Models that are sharded for training may have no room for a copy in each process.
            shared=not recipe.train.fsdp,
        ),
        Stage("report", ("report.html",), (), stages.report),
    ]


WHILE_TRAINING = ("checkpoints", "metrics.jsonl", "rollouts.jsonl")
RECORDS = (*WHILE_TRAINING, "timing.jsonl", "run.log", "recipe.yaml", "trained", "adapter")


# ---- the API ----------------------------------------------------------------------------------------------------


def check(recipe: str | RecipeBase, overrides: Sequence[str] = (), *, reference: bool = False) -> CheckReport:
    """What would be trained on, what is wrong with it and what it would take; writes nothing.

    Args:
        reference: load the model and say how far it tells chosen from rejected already.
    """
    stages.forget_data()
    return stages.examine(_recipe(recipe, overrides), reference)


def run(recipe: str | RecipeBase, overrides: Sequence[str] = (), *, fresh: bool = False) -> Path:
    """Every stage in order, skipping what is done; returns the run folder.

    Args:
        fresh: remove what an earlier run left in the run folder and start over.

    Raises:
        UserError: the recipe or what it names cannot be used, or the folder holds the run of another recipe.
        StageError: a stage failed; what was finished stays.
    """
    return _perform_until("report", _recipe(recipe, overrides), fresh)


def train(recipe: str | RecipeBase, overrides: Sequence[str] = (), *, fresh: bool = False) -> Path:
    """The stages up to training, skipping what is done; returns the run folder."""
    return _perform_until("train", _recipe(recipe, overrides), fresh)


def merge(recipe: str | RecipeBase, overrides: Sequence[str] = ()) -> Path:
    """Merge (again, if it was done); returns the folder of the merged model."""
    return _redo("merge", _recipe(recipe, overrides)) / "merged"


def evaluate(recipe: str | RecipeBase, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate (again, if it was done); returns the content of `evaluation/heldout.json`, or of `rewards.json` for a
    method that samples."""
    recipe = _recipe(recipe, overrides)
    folder = _redo("evaluate", recipe)
    [stage] = [stage for stage in stages_of(recipe) if stage.name == "evaluate"]
    return dict(read_json(folder / stage.outputs[0]))


def report(recipe: str | RecipeBase, overrides: Sequence[str] = ()) -> Path:
    """Write the report (again, if it was there); returns its path."""
    return _redo("report", _recipe(recipe, overrides)) / "report.html"


def _recipe(recipe: str | RecipeBase, overrides: Sequence[str]) -> RecipeBase:
    return load_recipe(recipe, overrides) if isinstance(recipe, str) else recipe


# ---- performing stages ------------------------------------------------------------------------------------------


def _perform_until(last: str, recipe: RecipeBase, fresh: bool) -> Path:
    ranks.join()
    stages.forget_data()
    with _open_run_folder(recipe, fresh) if ranks.is_first() else nullcontext(recipe.run_folder) as folder:
        for stage in stages_of(recipe):
            if ranks.from_first(partial(stage.is_done, folder)):
                say(f"{stage.name}: done before")
            else:
                _perform(stage, recipe)
            if stage.name == last:
                break
    return folder


def _redo(name: str, recipe: RecipeBase) -> Path:
    with _open_run_folder(recipe) as folder:
        before = [stage.name for stage in stages_of(recipe)].index(name)
        *earlier, wanted = stages_of(recipe)[: before + 1]
        needed = [stage.name for stage in earlier if not stage.is_done(folder)] if name != "report" else []
        if needed:
            raise UserError(
                f"`{name}` needs what `{needed[0]}` leaves, and it is not there",
                where=recipe.output_dir,
                advice=f"`prefold run` performs every stage in order, or `prefold {needed[0]}`",
            )
        _perform(wanted, recipe)
    return folder


def _perform(stage: Stage, recipe: RecipeBase) -> None:
    if not (stage.shared or ranks.is_first()):
        return
    keep_allocations()
    say(stage.name)
    started = time.perf_counter()
    try:
        with nullcontext() if stage.shared else ranks.alone():
            stage.perform(recipe)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise StageError(f"out of memory: the model itself does not fit ({str(error).splitlines()[0]})") from None
    record_stage(recipe.run_folder, stage.name, time.perf_counter() - started)


# ---- the folder -------------------------------------------------------------------------------------------------


@contextmanager
def _open_run_folder(recipe: RecipeBase, fresh: bool = False) -> Iterator[Path]:
    """The run folder, ready for this recipe; the log goes to its `run.log` meanwhile."""
    folder = recipe.run_folder
    require_writable(folder)
    if any(folder.iterdir()) and not (folder / "recipe.yaml").is_file():
        raise UserError(
            "is neither empty nor a run folder", where=recipe.output_dir, advice="choose another `output_dir`"
        )
    if fresh:
        for stage in stages_of(recipe):
            stage.remove_outputs(folder)
        for name in RECORDS:
            _remove(folder / name)
    stages.forget_data()
    _accept_changes(recipe, folder)
    write_text(folder / "recipe.yaml", dump_recipe(recipe))
    handler = logging.FileHandler(folder / "run.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("prefold")
    logger.addHandler(handler)
    try:
        yield folder
    finally:
        logger.removeHandler(handler)
        handler.close()


def _accept_changes(recipe: RecipeBase, folder: Path) -> None:
    """Drop the outputs of the stages that a changed recipe would make differently.

    Raises:
        UserError: training has begun with other settings.
    """
    if not (folder / "recipe.yaml").is_file():
        return
    old = _flat(yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")))
    new = _flat(as_dict(recipe))
    changed = sorted(
        name for name in old.keys() | new.keys() if old.get(name) != new.get(name) and name != "output_dir"
    )
    outdated = False
    for stage in stages_of(recipe):
        outdated = outdated or any(name.split(".")[0] in stage.sections for name in changed)
        if outdated and stage.name == "train" and (stage.is_done(folder) or (folder / "checkpoints").exists()):
            shown = "; ".join(f"`{name}` was {old.get(name)!r}, is {new.get(name)!r}" for name in changed[:5])
            raise UserError(
                f"holds a run that was trained with other settings: {shown}",
                where=recipe.output_dir,
                advice="take another `output_dir`, or `--fresh` to remove that run and start over",
            )
        if outdated:
            stage.remove_outputs(folder)


def _flat(values: Any, path: str = "") -> dict[str, Any]:
    """Leaves by dotted path."""
    if isinstance(values, dict) and values:
        return {
            name: leaf
            for key, value in values.items()
            for name, leaf in _flat(value, f"{path}.{key}".lstrip(".")).items()
        }
    return {path: values}


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
