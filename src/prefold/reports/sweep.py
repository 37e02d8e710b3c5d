"""The result of `prefold sweep`, as a page and for a terminal of 80 columns: the best of many runs, if there is one,
and how far to trust it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding

from prefold.errors import joined
from prefold.files import write_text
from prefold.reports.numbers import NARROW_SPACE, change, counted, decimals, ends, finite, p_value, score
from prefold.reports.run_files import Values, as_list, cleaned, objects, read_run, section
from prefold.reports.tasks import TaskTable, decimals_of, outcome_of, score_table, task_table, tasks_of
from prefold.reports.templates import page_template
from prefold.reports.terminal_tables import STYLES, indented, plain, tasks_table
from prefold.reports.verdict import Line, Verdict, change_sentence, overall

PAGE = "sweep.html"
NAMED = 3
"""Runs that a sentence names."""
CONFIRM = "Before you rely on it, measure it on data that did not choose it"


def write_sweep(folder: Path, sweep: Values) -> Path:
    """Write the page of a sweep, from the content of `sweep.json` and the folders of the runs; returns its path."""
    sweep = cleaned(sweep)
    done = {name: read_run(folder / name) for name in _points(sweep, "done")}
    tasks = {_spaced(name): run.tasks for name, run in done.items() if run.tasks}
    baselines = [{name: facts.get("before") for name, facts in tasks_of(run).items()} for run in tasks.values()]
    text = page_template("sweep.html.j2")(
        recipe=sweep["recipe"],
        verdict=verdict(sweep),
        table=_table(sweep),
        models=list(tasks),
        # Next to the model before training, if its scores are the same in all runs.
        scores=score_table(tasks) if all(scores == baselines[0] for scores in baselines) else None,
        done={name: overall(run) for name, run in done.items()},
        failed={name: point.get("error", "") for name, point in _points(sweep, "failed").items()},
        waiting=list(_points(sweep, "waiting")),
        confirm=sweep.get("confirm"),
        advice=CONFIRM,
    )
    path = folder / PAGE
    write_text(path, text)
    return path


def summary(sweep: Values) -> RenderableType:
    """The result for rich to print, in which every text is plain text."""
    sweep = cleaned(sweep)
    best = verdict(sweep)
    lines: list[RenderableType] = [plain(best.headline, STYLES[best.outcome])]
    lines += [indented(plain(line.text)) for line in best.lines]
    if table := _table(sweep):
        lines.append(Padding(tasks_table(table, heading="runs"), (1, 0, 1, 0)))
    for name, point in _points(sweep, "failed").items():
        lines += [plain(f"failed: {_spaced(name)}", STYLES["worse"]), indented(plain(point.get("error", "")))]
    if sweep.get("confirm"):
        lines += [plain(f"{CONFIRM}:"), indented(plain(sweep["confirm"]), 2, 1)]
    lines.append(plain(f"comparison  {sweep['folder']}/{PAGE}", "dim"))
    return Group(*lines)


def verdict(sweep: Values) -> Verdict:
    """Which run is best, if there is one; how far to trust that, and which others may be as good."""
    measured = _measured(sweep)
    tied = [name for name in as_list(sweep.get("tied")) if name in measured]
    highest = tied or [name for name in [sweep.get("best")] if name in measured]
    if not highest:
        points, failed = len(objects(sweep.get("points"))), len(_points(sweep, "failed"))
        headline = "No run could be measured" if _points(sweep, "done") else "No run is done yet"
        if failed == points:
            headline = "The only run failed" if points == 1 else f"All {points} runs failed"
        return Verdict("missing", headline)
    runs, facts = len(measured), measured[highest[0]]
    outcome, as_good = outcome_of(facts), as_list(sweep.get("as_good"))
    against = "before training" if finite(facts.get("before")) is not None else "chance"
    than = {"better": f"better than {against}", "worse": f"worse than {against}"}
    lines = [Line(outcome_of(measured[name]), f"{_spaced(name)}: {_sentence(measured[name])}") for name in highest]
    if runs == 1:
        headline = f"{_spaced(highest[0])} is {than.get(outcome, f'not clearly better than {against}')}"
        return Verdict(outcome, headline, "", tuple(lines))
    headline = _ranking(tied, _spaced(highest[0]), bool(as_good), runs, _metric(facts))
    headline += "" if outcome == "better" else f", {than.get(outcome, f'not clearly better than {against}')}"
    lines = [*lines[:NAMED], *_chosen_by_luck(sweep, facts, runs), *_others(sweep, len(tied))]
    return Verdict("mixed" if outcome == "better" and (tied or as_good) else outcome, headline, "", tuple(lines))


def _ranking(tied: Sequence[str], highest: str, as_good: bool, runs: int, metric: str) -> str:
    if tied:
        which = ("both" if runs == 2 else "all") if len(tied) == runs else _named(tied)
        return f"No best of {runs}: {which} have the same held-out {metric}"
    return f"No clear best of {runs}: {highest} is the highest" if as_good else f"Best of {runs}: {highest}"


def _sentence(facts: Values) -> str:
    """The change of a run; a reward model, which has no score before training, is compared with chance."""
    if finite(facts.get("before")) is not None:
        return f"held-out {_metric(facts)} {change_sentence(facts)}"
    return f"held-out {_metric(facts)} against chance {change_sentence({**facts, 'before': 0.5})}"


def _metric(facts: Values) -> str:
    return "accuracy" if facts.get("shares") else "reward"


def _chosen_by_luck(sweep: Values, facts: Values, runs: int) -> list[Line]:
    """How far luck may have raised the best score; empty if none was chosen, or if luck could not raise it."""
    shares, luck = bool(facts.get("shares")), finite(sweep.get("luck"))
    if sweep.get("tied") or not luck:
        return []
    too_good = change(luck, shares, decimals(1 if shares else 2, 100 if shares else 1, [luck]), " points").lstrip("+")
    text = f"Chosen by the {_units(sweep)} that it is measured on: the best of {runs} equally good runs would look"
    text += f" {too_good} too good, by luck alone"
    if interval := ends(facts.get("after_ci_of_all"), score, shares):
        text += f". With allowance for the choice, its {_metric(facts)} is {interval} (95{NARROW_SPACE}% interval)"
    return [Line("mixed", text)]


def _others(sweep: Values, tied: int) -> list[Line]:
    if len(_measured(sweep)) == max(tied, 1):
        return []
    if alike := as_list(sweep.get("as_good")):
        highest = "them" if tied else "it"
        return [Line("unclear", f"{_units(sweep)} do not show {highest} to be better than {_named(alike)}")]
    return [Line("better", "Better than each of the others, after correction for all comparisons")]


def _named(runs: Sequence[str]) -> str:
    return joined(list(map(_spaced, runs)), NAMED, "; ")


def _units(sweep: Values) -> str:
    held_out = section(sweep, "held_out")
    return counted(held_out.get("number"), held_out.get("unit", "pair"))


def _table(sweep: Values) -> TaskTable | None:
    """The runs, in the form of tasks: before, after, change. Below each name its difference to the highest run."""
    choice = sweep.get("best"), bool(sweep.get("as_good"))
    # The number of pairs is given once, above the table.
    notes = {name: {"metric": _to_best(facts, *choice), "n": None} for name, facts in _measured(sweep).items()}
    return task_table({"tasks": {_spaced(name): facts | notes[name] for name, facts in _measured(sweep).items()}})


def _to_best(facts: Values, best: Any, as_good: bool) -> str:
    if "to_best" not in facts:
        return ""
    behind = {**section(facts, "to_best"), "shares": facts.get("shares")}
    if "difference" not in behind:
        return "equal highest" if best is None else "highest" if as_good else "best"
    shares, digits = bool(facts.get("shares")), decimals_of(behind)
    interval = ends(behind.get("ci"), change, shares, digits)
    text = f"{change(behind['difference'], shares, digits, ' points')} to the highest"
    return ", ".join(filter(None, [f"{text} ({interval})" if interval else text, p_value(behind.get("p_value"))]))


def _spaced(name: str) -> str:
    """`learning_rate=1e-5, beta=0.1`, which can be wrapped."""
    return name.replace(",", ", ")


def _points(sweep: Values, status: str) -> dict[str, Values]:
    """The runs that have this status, by name."""
    return {str(point["name"]): point for point in objects(sweep.get("points")) if point.get("status") == status}


def _measured(sweep: Values) -> dict[str, Values]:
    """The held-out facts of runs by name."""
    points = {str(point["name"]): section(point, "held_out") for point in objects(sweep.get("points"))}
    return {name: facts for name, facts in points.items() if facts}
