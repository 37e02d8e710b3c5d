"""The Python API of runs, which the commands call: a recipe in, a run folder out.

`prefold.run` performs the stages of `stages.py` in order and skips those already done; a function for a single stage
performs it again. The stages share the `Run` of `context.py`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from prefold import ranks
from prefold.errors import StageError, UserError, first_line
from prefold.files import read_json
from prefold.publishing import publish as publishing
from prefold.publishing.publish import require_section
from prefold.recipe import RecipeBase, as_recipe
from prefold.reports.live import LivePage
from prefold.reports.page import REPORT
from prefold.runs.context import Run
from prefold.runs.fingerprints import record_failure, record_inputs, say_changes
from prefold.runs.folder import open_run_folder
from prefold.runs.limits import require_memory
from prefold.runs.rounds import ROUNDS, perform_rounds
from prefold.runs.stages import Stage, passed_check, stages_of
from prefold.terminal import say
from prefold.training.record import record_stage, restart_peaks
from prefold.trees.memory import arrange_allocations, is_out_of_memory

BY_COMMAND = {"check": "train", "compare": "evaluate", "judge": "evaluate"}
"""The command that performs a stage, where it is not the one of the same name: `prefold check` writes no run folder."""


def run(recipe: str | Path | RecipeBase, overrides: Sequence[str] = (), *, fresh: bool = False) -> Path:
    """Perform every stage in order, skipping those already done; returns the run folder, or the folder of all `rounds`.

    Args:
        fresh: remove what an earlier run left in the run folder and start over.

    Raises:
        UserError: the recipe or what it names cannot be used, or the folder holds the run of another recipe.
        StageError: a stage failed; finished stages are kept.
    """
    ranks.join()  # before anything can fail, so that only one process reports it
    opened = Run(as_recipe(recipe, overrides))
    return perform_rounds(opened, perform_all, fresh) if opened.recipe.rounds else perform_all(opened, fresh=fresh)


def train(recipe: str | Path | RecipeBase, overrides: Sequence[str] = (), *, fresh: bool = False) -> Path:
    """Perform the stages up to training, skipping those already done; returns the run folder."""
    ranks.join()
    return perform_all(_single(recipe, overrides), until="train", fresh=fresh)


def merge(recipe: str | Path | RecipeBase, overrides: Sequence[str] = ()) -> Path:
    """Merge, even if that was done before; returns the folder of the merged model."""
    return _redo("merge", _single(recipe, overrides)) / "merged"


def evaluate(recipe: str | Path | RecipeBase, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate, even if that was done before.

    Returns:
        The content of `evaluation/heldout.json`, or of `rewards.json` for a method that samples. Where the recipe asks
        for them, also the content of `tasks.json`, `compared.json` and `win_rate.json` under these names.
    """
    run = _single(recipe, overrides)
    for stage in stages_of(run.recipe):
        if stage.name in ("evaluate", "compare", "judge"):
            _redo(stage.name, run)
    folder, settings = run.folder / "evaluation", run.recipe.evaluate
    others = {"tasks": settings.tasks, "compared": settings.compare_with, "win_rate": settings.win_rate}
    results = {name: read_json(folder / f"{name}.json") for name, value in others.items() if value}
    return {**read_json(folder / f"{run.recipe.algorithm.kind.measured}.json"), **results}


def report(recipe: str | Path | RecipeBase, overrides: Sequence[str] = ()) -> Path:
    """Write the report, even if there is one; returns its path."""
    return _redo("report", _single(recipe, overrides)) / "report.html"


def publish(recipe: str | Path | RecipeBase, overrides: Sequence[str] = (), *, dry_run: bool = False) -> dict[str, Any]:
    """Publish a finished run, even if that was done before; files that are there already are not sent again.

    Args:
        dry_run: return what would be published, and where; write and send nothing.

    Returns:
        The content of `publish.json`: the files with their sizes, and where they are now.

    Raises:
        UserError: the run is not finished, its merge check failed, or the Hub refuses the token.
        StageError: the connection broke, or a GGUF file differs from the model.
    """
    run = _single(recipe, overrides)
    section = require_section(run.recipe)
    if dry_run:
        say_changes(run.recipe, run.folder)
        return publishing.planned(run.folder, section)
    return dict(read_json(_redo("publish", run) / "publish.json"))


def _single(recipe: str | Path | RecipeBase, overrides: Sequence[str]) -> Run:
    """The run of a recipe. Raises UserError: the recipe has rounds, which are several runs."""
    parsed = as_recipe(recipe, overrides)
    if parsed.rounds:
        advice = f"`prefold run` performs them all; each is a run folder of its own, {parsed.output_dir}/{ROUNDS}/1"
        raise UserError("rounds are several runs, and this command works on one", where="`rounds`", advice=advice)
    return Run(parsed)


def perform_all(run: Run, *, until: str | None = None, fresh: bool = False) -> Path:
    """Perform the stages that are not done, up to and including `until`; returns the run folder."""
    if fresh and ranks.is_first() and (run.folder / "recipe.yaml").is_file():
        with ranks.alone():
            passed_check(run)  # before the existing run is removed
    with open_run_folder(run.recipe, fresh) if ranks.is_first() else nullcontext(run.folder) as folder:
        stages = stages_of(run.recipe)
        names = [stage.name for stage in stages]
        stages = stages[: names.index(until) + 1] if until else stages
        page = LivePage(folder, names[: len(stages)], f"{run.recipe.output_dir}/{REPORT}")
        for stage in stages:
            if ranks.from_first(partial(stage.is_done, folder)):
                say(f"{stage.name}: done before")
                continue
            # From the report stage on, the page at this path is the report.
            is_live = ranks.is_first() and names.index(stage.name) < names.index("report")
            with page.during(stage.name) if is_live else nullcontext():
                _perform(stage, run)
    return folder


def _redo(name: str, run: Run) -> Path:
    """Perform one stage, whether it was done or not. Only a report does not need the stages before it."""
    with open_run_folder(run.recipe, alone=name != "report", only=name) as folder:
        for stage in stages_of(run.recipe):
            if stage.name == name:
                _perform(stage, run)
                break
            if name != "report" and not stage.is_done(folder):
                command = BY_COMMAND.get(stage.name, stage.name)
                what = f"`{name}` needs the output of `{stage.name}`, which is missing"
                advice = f"`prefold run` performs every stage in order, or `prefold {command}`"
                raise UserError(what, where=run.recipe.output_dir, advice=advice)
    return folder


def _perform(stage: Stage, run: Run) -> None:
    if not (stage.shared or ranks.is_first()):
        return
    arrange_allocations(kept=not run.recipe.train.gradient_checkpointing)
    say(stage.name)
    restart_peaks()
    started = time.perf_counter()
    if ranks.is_first():
        record_inputs(run.folder, run.recipe, stage.name)
    try:
        with nullcontext() if stage.shared else ranks.alone():
            ranks.from_first(partial(require_memory, run, stage.name))
            stage.perform(run)
    except Exception as error:
        if ranks.is_first() and isinstance(error, UserError):
            record_failure(run.folder, run.recipe, error)
        if not is_out_of_memory(error):
            raise
        raise StageError(f"out of memory: the model itself does not fit ({first_line(error)})") from None
    if ranks.is_first():
        record_inputs(run.folder, run.recipe, stage.name, ended=True)
    record_stage(run.folder, stage.name, time.perf_counter() - started)
