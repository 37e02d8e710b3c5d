"""The Python API of runs, which the commands call: a recipe in, a run folder out.

`prefold.run` performs every stage of `stages.py` in order and skips what is done; the functions of one stage do it
again. What the stages share is the `Run` of `context.py`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from prefold import ranks
from prefold.errors import StageError, UserError
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
from prefold.runs.stages import Stage, examined, stages_of
from prefold.terminal import say
from prefold.training.record import record_stage, restart_peaks
from prefold.trees.memory import arrange_allocations, is_out_of_memory

BY_COMMAND = {"check": "train", "compare": "evaluate", "judge": "evaluate"}
"""Commands that perform the stages of other names; `prefold check` leaves nothing in the run folder."""


def run(recipe: str | Path | RecipeBase, overrides: Sequence[str] = (), *, fresh: bool = False) -> Path:
    """Every stage in order, skipping what is done; returns the run folder, or the folder of all `rounds`.

    Args:
        fresh: remove what an earlier run left in the run folder and start over.

    Raises:
        UserError: the recipe or what it names cannot be used, or the folder holds the run of another recipe.
        StageError: a stage failed; what was finished stays.
    """
    ranks.join()  # before anything can fail, so that one process says what
    made = Run(as_recipe(recipe, overrides))
    return perform_rounds(made, perform_all, fresh) if made.recipe.rounds else perform_all(made, fresh=fresh)


def train(recipe: str | Path | RecipeBase, overrides: Sequence[str] = (), *, fresh: bool = False) -> Path:
    """The stages up to training, skipping what is done; returns the run folder."""
    ranks.join()
    return perform_all(_single(recipe, overrides), until="train", fresh=fresh)


def merge(recipe: str | Path | RecipeBase, overrides: Sequence[str] = ()) -> Path:
    """Merge (again, if it was done); returns the folder of the merged model."""
    return _redo("merge", _single(recipe, overrides)) / "merged"


def evaluate(recipe: str | Path | RecipeBase, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate (again, if it was done); returns the content of `evaluation/heldout.json`, or of `rewards.json` for a
    method that samples; with the content of `tasks.json`, `compared.json` and `win_rate.json` under these names, where
    the recipe asks for them."""
    run = _single(recipe, overrides)
    for stage in stages_of(run.recipe):
        if stage.name in ("evaluate", "compare", "judge"):
            _redo(stage.name, run)
    folder, settings = run.folder / "evaluation", run.recipe.evaluate
    others = {"tasks": settings.tasks, "compared": settings.compare_with, "win_rate": settings.win_rate}
    results = {name: read_json(folder / f"{name}.json") for name, value in others.items() if value}
    return {**read_json(folder / f"{run.recipe.algorithm.kind.measured}.json"), **results}


def report(recipe: str | Path | RecipeBase, overrides: Sequence[str] = ()) -> Path:
    """Write the report (again, if it was there); returns its path."""
    return _redo("report", _single(recipe, overrides)) / "report.html"


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
    run = _single(recipe, overrides)
    recipe, section = run.recipe, require_section(run.recipe)
    if dry_run:
        say_changes(recipe, recipe.run_folder)
        return publishing.planned(recipe.run_folder, section)
    return dict(read_json(_redo("publish", run) / "publish.json"))


def _single(recipe: str | Path | RecipeBase, overrides: Sequence[str]) -> Run:
    """Raises UserError: the recipe has rounds, which are several runs."""
    made = as_recipe(recipe, overrides)
    if made.rounds:
        advice = f"`prefold run` performs them all; each is a run folder of its own, {made.output_dir}/{ROUNDS}/1"
        raise UserError("rounds are several runs, of which none is named here", where="`rounds`", advice=advice)
    return Run(made)


def perform_all(run: Run, *, until: str | None = None, fresh: bool = False) -> Path:
    """The stages that are not done, up to the one named; returns the run folder."""
    if fresh and ranks.is_first() and (run.folder / "recipe.yaml").is_file():
        with ranks.alone():
            examined(run)  # before the run that is there is removed
    with open_run_folder(run.recipe, fresh) if ranks.is_first() else nullcontext(run.folder) as folder:
        stages = stages_of(run.recipe)
        names = [stage.name for stage in stages]
        stages = stages[: names.index(until) + 1] if until else stages
        page = LivePage(folder, names[: len(stages)], f"{run.recipe.output_dir}/{REPORT}")
        for stage in stages:
            if ranks.from_first(partial(stage.is_done, folder)):
                say(f"{stage.name}: done before")
                continue
            # From the report on the page is that.
            is_live = ranks.is_first() and names.index(stage.name) < names.index("report")
            with page.during(stage.name) if is_live else nullcontext():
                _perform(stage, run)
    return folder


def _redo(name: str, run: Run) -> Path:
    """One stage, whether it was done or not; a report is of what there is."""
    with open_run_folder(run.recipe, alone=name != "report", only=name) as folder:
        for stage in stages_of(run.recipe):
            if stage.name == name:
                _perform(stage, run)
                break
            if name != "report" and not stage.is_done(folder):
                command = BY_COMMAND.get(stage.name, stage.name)
                what = f"`{name}` needs what `{stage.name}` leaves, and it is not there"
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
        raise StageError(f"out of memory: the model itself does not fit ({str(error).splitlines()[0]})") from None
    if ranks.is_first():
        record_inputs(run.folder, run.recipe, stage.name, ended=True)
    record_stage(run.folder, stage.name, time.perf_counter() - started)
