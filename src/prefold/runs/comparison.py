"""`prefold compare`: run folders and models, each against the first one, on all that both have measured: the same
held-out pairs, prompts and questions.

Of a run folder, the stored measurements are compared. Models are measured here; if tasks are named, so are the run
folders. A single run folder is compared with its model before training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefold.errors import UserError
from prefold.evaluation.scores import TaskScores
from prefold.evaluation.task_comparison import compare_tasks
from prefold.evaluation.tasks import TOKENS, measure_model, open_tasks
from prefold.files import read_json, without_home
from prefold.generation.answers import model_named, run_recipe
from prefold.generation.opening import fits_in_float32
from prefold.models.fetch import is_hub_id
from prefold.models.load import require_model
from prefold.models.tokenizer import tokenizer_of
from prefold.recipe import Evaluate, Model, RecipeBase
from prefold.reports.run_files import read_run
from prefold.reports.verdict import overall
from prefold.runs.fingerprints import say_changes
from prefold.runs.measured import compare_measured, measured_by


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a model, or a run before or after training."""

    name: str
    label: str
    run: RecipeBase | None = None
    when: str = "after"

    @property
    def section(self) -> Model:
        """How to load the model. Raises UserError: the run has no merged model yet, or trains a reward model."""
        self.require_answers()
        return self.run.model if self.run is not None and self.when == "before" else model_named(self.name)

    def require_answers(self) -> None:
        if self.run is not None and self.run.algorithm.kind.scores:
            what = "this run trains a model that scores answers and gives none, so it cannot be asked tasks"
            advice = "runs of the method are compared with each other, by the held-out pairs that they share"
            raise UserError(what, where=self.label, expected="runs and models that answer", advice=advice)

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
        models: run folders, or models by any name that `model.name` accepts.
        tasks: tasks for all of them, with `include_path`, `limit` and `num_fewshot` as in a recipe's `evaluate`. Unset:
            the stored scores of run folders are compared, and models get the tasks of the first run that has scores.

    Returns:
        `{"baseline": NAME, "models": {NAME: as compare_tasks, with "measures": as compare_measured}, "runs": {NAME:
        {"method", "model", "outcome", "verdict", "evidence"}}}`; `left_out` says what was not compared, and why.

    Raises:
        UserError: nothing can be compared, a run folder has not been evaluated, or a task or model cannot be used.
    """
    sides = _sides([str(model) for model in models])
    for side in sides if tasks else ():
        side.require_answers()
    runs = {side.label: _run_facts(side) for side in sides if side.run is not None and side.when == "after"}
    if tasks:
        settings = Evaluate(tasks=list(tasks), include_path=include_path, limit=limit, num_fewshot=num_fewshot)
        scores, with_template = _measured(sides, settings), dict.fromkeys((side.label for side in sides), False)
    elif (include_path, limit, num_fewshot) != (None, None, None):
        raise UserError("--include-path, --limit and --num-fewshot are for --tasks", advice="name the tasks")
    else:
        scores, with_template = _scores_of_runs(sides)
    measured = {side.label: measured_by(side.folder, side.run, side.when) if side.run else {} for side in sides}
    baseline, *others = (side.label for side in sides)
    compared = {}
    for label in others:
        measures, reasons = compare_measured(measured[baseline], measured[label], (baseline, label))
        facts = _compared_tasks(scores, with_template, (baseline, label))
        compared[label] = facts | {"measures": measures, "left_out": reasons | facts.get("left_out", {})}
    if not any(facts["measures"] or facts["tasks"] for facts in compared.values()):
        label, facts = next(iter(compared.items()))
        why = "; ".join(f"{what}: {reason}" for what, reason in facts["left_out"].items())
        what = f"nothing can be compared with {baseline} ({why or 'neither has measured anything'})"
        raise UserError(what, where=label, advice="name tasks to ask all of them (`--tasks`)")
    return {"baseline": baseline, "models": compared, "runs": runs}


def _compared_tasks(
    scores: Mapping[str, list[TaskScores]], with_template: Mapping[str, bool], names: tuple[str, str]
) -> dict[str, Any]:
    """The tasks of two sides, as `compare_tasks` returns them; `left_out` says why there are none."""
    first, second = (scores[name] for name in names)
    if first and second and with_template[names[0]] != with_template[names[1]]:
        reason = f"only {next(name for name in names if with_template[name])} was asked with its chat template"
    elif bool(first) != bool(second):
        reason = f"only {names[0] if first else names[1]} was asked tasks"
    else:
        return compare_tasks(first, second)
    return compare_tasks([], []) | {"left_out": {"tasks": reason}}


def compare_with(baseline: Sequence[TaskScores], settings: Evaluate) -> dict[str, Any]:
    """The content of `evaluation/compared.json`: other models on the tasks of a run, compared with its model before
    training."""
    sides = [_side(name) for name in settings.compare_with]
    scores = _measured(sides, settings)
    return {"models": {side.label: compare_tasks(baseline, scores[side.label]) for side in sides}}


def require_models(names: Sequence[str]) -> None:
    """Check models without fetching or converting any. Raises UserError: one of them does not exist, is no model
    folder, or is a run without a merged model."""
    for name in names:
        model = _side(name).section.name
        path = Path(model).expanduser()
        if path.is_dir() or not (path.is_file() or model.startswith("pypi:") or is_hub_id(model)):
            require_model(Model(name=model))


def read_scores(path: Path) -> list[TaskScores]:
    """The task scores that a run has written; empty if it ran no tasks. Raises UserError: the file cannot be read."""
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
    side = Side(name, without_home(name), run_recipe(name))
    if side.run is not None:
        say_changes(side.run, side.folder)
    return side


def _run_facts(side: Side) -> dict[str, Any]:
    """Method, model and verdict of a run. Raises UserError: it has not been evaluated."""
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


def _scores_of_runs(sides: Sequence[Side]) -> tuple[dict[str, list[TaskScores]], dict[str, bool]]:
    """Task scores by label, stored ones of runs and new ones of models, and whether the chat template was applied."""
    runs = {side.label: (side, side.run) for side in sides if side.run is not None}
    models = [side for side in sides if side.run is None]
    # The scores of an earlier recipe may still be in the folder.
    scores = {
        label: read_scores(side.folder / "evaluation" / f"scores_{side.when}.json") if run.evaluate.tasks else []
        for label, (side, run) in runs.items()
    }
    with_template = {label: run.evaluate.apply_chat_template for label, (_, run) in runs.items()}
    if models:
        settings = next((run.evaluate for label, (_, run) in runs.items() if scores[label]), None)
        if settings is None:
            expected = "--tasks, or a run folder whose recipe has `evaluate.tasks`"
            raise UserError("nothing says what to ask the models", where=models[0].label, expected=expected)
        scores |= _measured(models, settings)
        with_template |= {model.label: settings.apply_chat_template for model in models}
    return scores, with_template


def _measured(sides: Sequence[Side], settings: Evaluate) -> dict[str, list[TaskScores]]:
    sections = {side.label: side.section for side in sides}
    tasks = open_tasks(settings, tokenizer_of(next(iter(sections.values()))))
    in_16_bits = not fits_in_float32(list(sections.values()), TOKENS)
    return {
        label: measure_model(section, tasks, settings, label, in_16_bits=in_16_bits)
        for label, section in sections.items()
    }
