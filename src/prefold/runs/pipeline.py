"""The run folder and its stages, in order: check, train, merge, evaluate, report. Where the recipe says so, other
models are compared and a judge is asked before the report, and the result is published after it.

A stage is done when its outputs exist; each of them appears under its final name only when it is whole, so a run that
is stopped anywhere goes on from there. What the stages do is in `stages/`. The functions without an underscore are
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

from prefold import ranks
from prefold.errors import StageError, UserError
from prefold.files import held, read_json, require_writable, sweep, write_text
from prefold.plan.machine import bytes_of
from prefold.publishing import publish as publishing
from prefold.publishing.publish import require_ready, require_section
from prefold.recipe import RecipeBase, as_dict, dump_recipe, load_recipe
from prefold.runs import check as checking
from prefold.runs import evaluate as evaluating
from prefold.runs import finish as ending
from prefold.runs import merge as merging
from prefold.runs import train as training
from prefold.runs.check import CheckReport
from prefold.runs.context import check_tasks, forget_data
from prefold.terminal import say
from prefold.training.record import record_stage
from prefold.trees.memory import arrange_allocations, is_out_of_memory


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
        # The first one last: a folder that is half removed must not pass for a stage that is done.
        for output in reversed(self.outputs):
            _remove(folder / output)


def stages_of(recipe: RecipeBase) -> list[Stage]:
    trained = "trained" if recipe.lora == "none" else "adapter"
    answers = () if recipe.algorithm.kind.scores else ("samples.jsonl",)
    asked = ("scores_before", "scores_after", "tasks") if recipe.evaluate.tasks else ()
    evaluated = (*(f"evaluation/{name}.json" for name in (recipe.algorithm.kind.measured, *asked)), *answers)
    compared = Stage("compare", ("evaluation/compared.json",), ("compare_with",), ending.compare)
    judged = Stage("judge", ("evaluation/win_rate.json",), ("win_rate",), ending.judge)
    published = Stage("publish", ("publish.json",), ("publish",), ending.publish)
    return [
        Stage("check", ("data.json", "environment.json"), ("method", "model", "data"), checking.check),
        Stage("train", (trained,), ("lora", "train", "rewards", recipe.method), training.train, shared=True),
        Stage("merge", ("merged", "merge.json"), ("merge",), merging.merge),
        # Models that are sharded for training may have no room for a copy in each process.
        Stage("evaluate", evaluated, ("evaluate",), evaluating.evaluate, shared=not recipe.train.fsdp),
        *([compared] if recipe.evaluate.compare_with else []),
        *([judged] if recipe.evaluate.win_rate else []),
        Stage("report", ("report.html", "merged/README.md"), (), ending.report),
        *([published] if recipe.publish else []),
    ]


BY_COMMAND = {"check": "train", "compare": "evaluate", "judge": "evaluate"}
"""Commands that perform the stages of other names; `prefold check` leaves nothing."""
WHILE_TRAINING = ("checkpoints", "metrics.jsonl", "rollouts.jsonl", "guards.json")
PUBLISHED = ("gguf", "publish.json")
# The recipe last: without it a folder is not known for a run's any more.
RECORDS = (*WHILE_TRAINING, *PUBLISHED, "timing.jsonl", "run.log", "trained", "adapter", "recipe.yaml")


# ---- the API ----------------------------------------------------------------------------------------------------


def check(
    recipe: str | Path | RecipeBase,
    overrides: Sequence[str] = (),
    *,
    reference: bool = False,
    device_memory: str | None = None,
    measure: bool = False,
) -> CheckReport:
    """What would be trained on, what is wrong with it and what it would take; writes nothing.

    Args:
        reference: load the model and say how far it tells chosen from rejected already.
        device_memory: of a GPU to plan for, e.g. `24GB`; unset: this machine.
        measure: time the engine on this machine for some seconds, to say how long the run will take.
    """
    if device_memory and measure:
        what = "times are measured on this machine, and the plan is for another"
        raise UserError(what, where="`--measure`", advice="leave it or `--device-memory` out")
    forget_data()
    recipe = _recipe(recipe, overrides)
    check_tasks(recipe)
    require_ready(recipe)
    room = bytes_of(device_memory) if device_memory else None
    return checking.examine(recipe, reference, room, measure)


def run(recipe: str | Path | RecipeBase, overrides: Sequence[str] = (), *, fresh: bool = False) -> Path:
    """Every stage in order, skipping what is done; returns the run folder.

    Args:
        fresh: remove what an earlier run left in the run folder and start over.

    Raises:
        UserError: the recipe or what it names cannot be used, or the folder holds the run of another recipe.
        StageError: a stage failed; what was finished stays.
    """
    ranks.join()  # before anything can fail, so that one process says what
    recipe = _recipe(recipe, overrides)
    return _perform_until(stages_of(recipe)[-1].name, recipe, fresh)


def train(recipe: str | Path | RecipeBase, overrides: Sequence[str] = (), *, fresh: bool = False) -> Path:
    """The stages up to training, skipping what is done; returns the run folder."""
    ranks.join()
    return _perform_until("train", _recipe(recipe, overrides), fresh)


def merge(recipe: str | Path | RecipeBase, overrides: Sequence[str] = ()) -> Path:
    """Merge (again, if it was done); returns the folder of the merged model."""
    return _redo("merge", _recipe(recipe, overrides)) / "merged"


def evaluate(recipe: str | Path | RecipeBase, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate (again, if it was done); returns the content of `evaluation/heldout.json`, or of `rewards.json` for a
    method that samples; with the content of `tasks.json`, `compared.json` and `win_rate.json` under these names, where
    the recipe asks for them."""
    recipe = _recipe(recipe, overrides)
    folder = _redo("evaluate", recipe)
    for stage in stages_of(recipe):
        if stage.name in ("compare", "judge"):
            _redo(stage.name, recipe)
    [stage] = [stage for stage in stages_of(recipe) if stage.name == "evaluate"]
    asked = recipe.evaluate
    wanted = {"tasks": asked.tasks, "compared": asked.compare_with, "win_rate": asked.win_rate}
    others = {name: read_json(folder / "evaluation" / f"{name}.json") for name, value in wanted.items() if value}
    return {**read_json(folder / stage.outputs[0]), **others}


def report(recipe: str | Path | RecipeBase, overrides: Sequence[str] = ()) -> Path:
    """Write the report (again, if it was there); returns its path."""
    return _redo("report", _recipe(recipe, overrides)) / "report.html"


def publish(recipe: str | Path | RecipeBase, overrides: Sequence[str] = (), *, dry_run: bool = False) -> dict[str, Any]:
    """Publish a finished run (again, if it was done): what is there already is not sent again.

    Args:
        dry_run: say what would be published, and where; writes and sends nothing.

    Returns:
        The content of `publish.json`: the files with their sizes, and where they are now.

    Raises:
        UserError: the run is not finished, its merge check failed, or the Hub lets nobody in with this token.
        StageError: the connection broke, or a GGUF file is not the model.
    """
    recipe = _recipe(recipe, overrides)
    section = require_section(recipe)
    if dry_run:
        return publishing.planned(recipe.run_folder, section)
    return dict(read_json(_redo("publish", recipe) / "publish.json"))


def _recipe(recipe: str | Path | RecipeBase, overrides: Sequence[str]) -> RecipeBase:
    if not isinstance(recipe, RecipeBase):
        return load_recipe(str(recipe), overrides)
    if overrides:
        raise UserError("overrides are for a recipe by name", advice="give them to `prefold.load_recipe`")
    return recipe


# ---- performing stages ------------------------------------------------------------------------------------------


def _perform_until(last: str, recipe: RecipeBase, fresh: bool) -> Path:
    forget_data()
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
    with _open_run_folder(recipe, alone=name != "report") as folder:
        before = [stage.name for stage in stages_of(recipe)].index(name)
        *earlier, wanted = stages_of(recipe)[: before + 1]
        needed = [stage.name for stage in earlier if not stage.is_done(folder)] if name != "report" else []
        if needed:
            command = BY_COMMAND.get(needed[0], needed[0])
            raise UserError(
                f"`{name}` needs what `{needed[0]}` leaves, and it is not there",
                where=recipe.output_dir,
                advice=f"`prefold run` performs every stage in order, or `prefold {command}`",
            )
        _perform(wanted, recipe)
    return folder


def _perform(stage: Stage, recipe: RecipeBase) -> None:
    if not (stage.shared or ranks.is_first()):
        return
    arrange_allocations(kept=not recipe.train.gradient_checkpointing)
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
def _open_run_folder(recipe: RecipeBase, fresh: bool = False, alone: bool = True) -> Iterator[Path]:
    """The run folder, ready for this recipe; the log goes to its `run.log` meanwhile.

    Args:
        alone: what is done in it cannot be done beside another process: two would write the same lines.
    """
    folder = recipe.run_folder
    require_writable(folder)
    with held(folder, recipe.output_dir) if alone else nullcontext():
        _make_ready(recipe, folder, fresh)
        handler = logging.FileHandler(folder / "run.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk has a message of its own
        logger = logging.getLogger("prefold")
        logger.addHandler(handler)
        try:
            yield folder
        finally:
            logger.removeHandler(handler)
            handler.close()


def _make_ready(recipe: RecipeBase, folder: Path, fresh: bool) -> None:
    sweep(folder)
    if any(folder.iterdir()) and not (folder / "recipe.yaml").is_file():
        raise UserError(
            "is neither empty nor a run folder", where=recipe.output_dir, advice="choose another `output_dir`"
        )
    if fresh:
        for stage in stages_of(recipe):
            stage.remove_outputs(folder)
        for name in RECORDS:
            _remove(folder / name)
    forget_data()
    _accept_changes(recipe, folder)
    write_text(folder / "recipe.yaml", dump_recipe(recipe))


def _accept_changes(recipe: RecipeBase, folder: Path) -> None:
    """Drop the outputs of the stages that a changed recipe would make differently; raises as `outdated_stages`."""
    for stage in outdated_stages(recipe, folder):
        stage.remove_outputs(folder)


def outdated_stages(recipe: RecipeBase, folder: Path) -> list[Stage]:
    """The stages whose outputs in a run folder a changed recipe would make differently.

    Raises:
        UserError: training has begun with other settings.
    """
    if not (folder / "recipe.yaml").is_file():
        return []
    old = _flat(yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")))
    new = _flat(as_dict(recipe))
    changed = sorted(
        name for name in old.keys() | new.keys() if old.get(name) != new.get(name) and name != "output_dir"
    )
    outdated = False
    found = []
    for stage in stages_of(recipe):
        outdated = outdated or any(_section_of(name) in stage.sections for name in changed)
        if outdated and stage.name == "train" and (stage.is_done(folder) or _has_checkpoints(folder)):
            shown = "; ".join(f"`{name}` was {old.get(name)!r}, is {new.get(name)!r}" for name in changed[:5])
            raise UserError(
                f"holds a run that was trained with other settings: {shown}",
                where=recipe.output_dir,
                advice="take another `output_dir`, or `--fresh` to remove that run and start over",
            )
        if outdated:
            found.append(stage)
    return found


def _has_checkpoints(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("checkpoint-*"))


def _section_of(name: str) -> str:
    """The part of the recipe that a field belongs to. Who judges, or is asked beside them, is no part of the evaluation
    of the run's own models."""
    first, *rest = name.split(".")
    return rest[0] if first == "evaluate" and rest[:1] and rest[0] in ("compare_with", "win_rate") else first


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
