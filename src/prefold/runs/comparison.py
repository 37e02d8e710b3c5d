"""`prefold compare`: run folders and models, each against the first one, on the same questions.

A run folder brings what its run has measured; a model, and everything where tasks are named, is asked here. One run
folder alone is compared with itself before training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefold.errors import UserError
from prefold.evaluation.scores import TaskScores
from prefold.evaluation.task_comparison import compare_tasks
from prefold.evaluation.tasks import measure_model, open_tasks
from prefold.files import read_json, without_home
from prefold.generation.answers import model_named, run_recipe
from prefold.models.fetch import is_hub_id
from prefold.models.load import require_model, tokenizer_of
from prefold.recipe import Evaluate, Model, RecipeBase
from prefold.reports.run_files import read_run
from prefold.reports.verdict import overall
from prefold.runs.fingerprints import say_changes


@dataclass(frozen=True)
class Side:
    """One of those that are compared: a model, or a run before or after training."""

    name: str
    label: str
    run: RecipeBase | None = None
    when: str = "after"

    @property
    def section(self) -> Model:
        """How to load it; raises UserError for a run that has no merged model yet."""
        return self.run.model if self.run is not None and self.when == "before" else model_named(self.name)

    @property
    def folder(self) -> Path:
        return Path(self.name).expanduser()


def compare(
    models: Sequence[str | Path],
    tasks: Sequence[str] = (),
    *,
    include_path: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> dict[str, Any]:
    """Compare run folders and models with the first one.

    Args:
        models: run folders, or models by any name that `model.name` can have.
        tasks: what to ask all of them, and `include_path`, `limit` and `num_fewshot` how, as in `evaluate`. Unset: the
            task scores of the run folders count, and models are asked what the first of them was asked.

    Returns:
        `{"baseline": NAME, "models": {NAME: as compare_tasks}, "runs": {NAME: {"method", "model", "outcome", "verdict",
        "evidence"}}}`.

    Raises:
        UserError: there is nothing to compare, a run folder has not been evaluated, a task or model cannot be had.
    """
    sides = _sides([str(model) for model in models])
    runs = {side.label: _run_facts(side) for side in sides if side.run is not None and side.when == "after"}
    if tasks:
        settings = Evaluate(tasks=list(tasks), include_path=include_path, limit=limit, num_fewshot=num_fewshot)
        scores = _measured(sides, settings)
    elif (include_path, limit, num_fewshot) != (None, None, None):
        raise UserError("--include-path, --limit and --num-fewshot are for --tasks", advice="name the tasks")
    else:
        scores = _scores_of_runs(sides)
    baseline, *others = (side.label for side in sides)
    compared = {label: compare_tasks(scores[baseline], scores[label]) for label in others if scores[label]}
    if compared and not any(comparison["tasks"] for comparison in compared.values()):
        label, comparison = next(iter(compared.items()))
        reasons = "; ".join(f"{task}: {reason}" for task, reason in comparison.get("left_out", {}).items())
        raise UserError(f"no task can be compared with those of {baseline} ({reasons})", where=label)
    return {"baseline": baseline, "models": compared, "runs": runs}


def compare_with(baseline: Sequence[TaskScores], settings: Evaluate) -> dict[str, Any]:
    """The content of `evaluation/compared.json`: other models, asked what a run was asked, against its model before
    training."""
    sides = [_side(name) for name in settings.compare_with]
    scores = _measured(sides, settings)
    return {"models": {side.label: compare_tasks(baseline, scores[side.label]) for side in sides}}


def require_models(names: Sequence[str]) -> None:
    """Look at models without fetching or converting any. Raises UserError: one of them is not there, is no model
    folder, or is a run without a merged model."""
    for name in names:
        model = _side(name).section.name
        path = Path(model).expanduser()
        if path.is_dir() or not (path.is_file() or model.startswith("pypi:") or is_hub_id(model)):
            require_model(Model(name=model))


def read_scores(path: Path) -> list[TaskScores]:
    """What a run has written of its tasks; nothing where it was asked none. Raises UserError: the file cannot be
    read."""
    if not path.is_file():
        return []
    try:
        return [TaskScores.from_json(scores) for scores in read_json(path)]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        where = without_home(str(path))
        advice = "remove the file and run the recipe again; the stage that writes it is redone"
        raise UserError(f"cannot be read ({error})", where=where, advice=advice) from None


def _sides(names: Sequence[str]) -> list[Side]:
    sides = [_side(name) for name in names]
    if len(sides) == 1:
        [only] = sides
        if only.run is None:
            expected = "a run folder, which is compared with its model before training; or two models or more"
            raise UserError("there is nothing to compare it with", where=only.label, expected=expected)
        return [Side(only.name, f"{only.label}, before", only.run, "before"), only]
    if twice := next((side.label for index, side in enumerate(sides) if side in sides[:index]), None):
        raise UserError("is named twice", where=twice, expected="different models or run folders")
    return sides


def _side(name: str) -> Side:
    """Raises UserError for a run that trains a reward model: that answers nothing."""
    side = Side(name, without_home(name), run_recipe(name))
    if side.run is not None:
        say_changes(side.run, side.folder)
    if side.run is not None and side.run.algorithm.kind.scores:
        what = "this run trains a model that scores answers and gives none, so there is nothing to compare"
        advice = "its report says how well it tells held-out pairs apart; it can judge others (`evaluate.win_rate`)"
        raise UserError(what, where=side.label, expected="runs and models that answer", advice=advice)
    return side


def _run_facts(side: Side) -> dict[str, Any]:
    """What the run says of itself; raises UserError if it has not been evaluated."""
    run = read_run(side.folder)
    verdict = overall(run)
    if verdict.outcome == "missing":
        what, advice = "this run has not been evaluated yet", f"`prefold run {side.label}` finishes it"
        raise UserError(what, where=side.label, advice=advice)
    return {
        "method": run.method,
        "model": run.model,
        "outcome": verdict.outcome,
        "verdict": verdict.headline,
        "evidence": [line.text for line in verdict.lines] or [verdict.evidence],
    }


def _scores_of_runs(sides: Sequence[Side]) -> dict[str, list[TaskScores]]:
    """What the runs have measured, and of models what they are asked now, by label; nothing where only runs are
    compared that were asked no tasks."""
    runs = [side for side in sides if side.run is not None]
    models = [side for side in sides if side.run is None]
    scores = {run.label: read_scores(run.folder / "evaluation" / f"scores_{run.when}.json") for run in runs}
    if not any(scores.values()) and not models:
        return scores
    if silent := next((label for label, of_run in scores.items() if not of_run), None):
        advice = "name tasks to ask all of them (`--tasks`), or add `evaluate.tasks` to its recipe and run it again"
        raise UserError("this run was asked no tasks", where=silent, advice=advice)
    if models:
        settings = next((side.run.evaluate for side in runs if side.run and side.run.evaluate.tasks), None)
        if settings is None:
            expected = "--tasks, or a run folder whose recipe has `evaluate.tasks`"
            raise UserError("nothing says what to ask the models", where=models[0].label, expected=expected)
        scores |= _measured(models, settings)
    return scores


def _measured(sides: Sequence[Side], settings: Evaluate) -> dict[str, list[TaskScores]]:
    sections = {side.label: side.section for side in sides}
    tasks = open_tasks(settings, tokenizer_of(next(iter(sections.values()))))
    return {label: measure_model(section, tasks, settings, label) for label, section in sections.items()}
