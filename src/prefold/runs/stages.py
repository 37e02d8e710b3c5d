"""The stages of a run, in order: check, train, merge, evaluate, report. Where the recipe says so, other models are
compared and a judge is asked before the report, and the result is published after it.

A stage is done when its outputs exist. Each appears under its final name only when it is complete, so a run that is
stopped anywhere continues from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prefold.evaluation.people import measure_by_votes
from prefold.evaluation.win_rate import measure_win_rate
from prefold.files import read_jsonl, remove, write_json
from prefold.models.fetch import fetch, weight_files
from prefold.publishing.publish import publish_run, require_section
from prefold.recipe import RecipeBase
from prefold.reports.card import write_card
from prefold.reports.page import write_report
from prefold.reports.plan import in_two_lines
from prefold.runs import evaluate as evaluating
from prefold.runs import merge as merging
from prefold.runs import train as training
from prefold.runs.check import CheckReport, examine
from prefold.runs.comparison import compare_with, read_scores
from prefold.runs.context import Run
from prefold.runs.environment import environment
from prefold.runs.opened import judge_of, require_usable
from prefold.terminal import say


@dataclass(frozen=True)
class Stage:
    """`sections`: the parts of the recipe that the outputs depend on, in addition to those of earlier stages. `shared`:
    all processes take part; else the first one performs the stage alone."""

    name: str
    outputs: tuple[str, ...]
    sections: tuple[str, ...]
    perform: Callable[[Run], None]
    shared: bool = False

    def is_done(self, folder: Path) -> bool:
        return all((folder / output).exists() for output in self.outputs)

    def remove_outputs(self, folder: Path) -> None:
        # The first one last: a folder that is half removed must not pass for a stage that is done.
        for output in reversed(self.outputs):
            remove(folder / output)


def stages_of(recipe: RecipeBase) -> list[Stage]:
    kind = recipe.algorithm.kind
    trained = "trained" if recipe.lora == "none" else "adapter"
    answers = () if kind.scores else ("samples.jsonl",)
    of_tasks = ("scores_before", "scores_after", "tasks") if recipe.evaluate.tasks else ()
    evaluated = (*(f"evaluation/{name}.json" for name in (kind.measured, *of_tasks)), *answers)
    compared = Stage("compare", ("evaluation/compared.json",), ("compare_with",), _compare)
    judged = Stage("judge", ("evaluation/win_rate.json",), ("win_rate",), _judge)
    published = Stage("publish", ("publish.json",), ("publish",), _publish)
    return [
        Stage("check", ("data.json", "environment.json"), ("method", "model", "data"), _check),
        Stage("train", (trained,), ("lora", "train", "rewards", recipe.method), training.train, shared=True),
        Stage("merge", ("merged", "merge.json"), ("merge",), merging.merge),
        # Models that are sharded for training may be too large for a copy in each process.
        Stage("evaluate", evaluated, ("evaluate",), evaluating.evaluate, shared=not recipe.train.fsdp),
        *([compared] if recipe.evaluate.compare_with else []),
        *([judged] if recipe.evaluate.win_rate else []),
        Stage("report", ("report.html", "merged/README.md"), ("description",), _report),
        *([published] if recipe.publish else []),
    ]


def passed_check(run: Run) -> CheckReport:
    """Check the run, with its base model fetched. Raises UserError or StageError: it cannot be performed."""
    model = run.recipe.model
    if not weight_files(fetch(model.name, model.revision, weights=False)):
        require_usable(run.recipe)  # as far as it can be known before weights are downloaded
        fetch(model.name, model.revision)
    report = examine(run)
    report.require_ok("this", "`prefold check` shows it all")
    return report


def say_warnings(report: CheckReport) -> None:
    for finding in report.prepared.report.findings:
        if finding.severity == "warning":
            say(f"  warning: {finding.message}")


def _check(run: Run) -> None:
    report = passed_check(run)
    say_warnings(report)
    for line in in_two_lines(report.plan.as_json()):
        say(f"  {line}")
    write_json(run.folder / "environment.json", environment())
    write_json(run.folder / "data.json", report.as_json())


def _compare(run: Run) -> None:
    folder, settings = run.folder / "evaluation", run.recipe.evaluate
    write_json(folder / "compared.json", compare_with(read_scores(folder / "scores_before.json"), settings))


def _judge(run: Run) -> None:
    section, samples = run.recipe.evaluate.win_rate, read_jsonl(run.folder / "samples.jsonl")
    assert section is not None
    win_rate = measure_by_votes(section.votes, samples) if section.votes else measure_win_rate(judge_of(run), samples)
    write_json(run.folder / "evaluation" / "win_rate.json", win_rate)


def _report(run: Run) -> None:
    write_report(run.folder)
    if (run.folder / "merged").is_dir():
        write_card(run.folder)


def _publish(run: Run) -> None:
    publish_run(run.folder, require_section(run.recipe))
