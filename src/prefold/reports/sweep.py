"""What `prefold sweep` found, as a page and for a terminal of 80 columns: the best of many runs, and how far to believe
it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.padding import Padding

from prefold.files import write_text
from prefold.reports.numbers import NARROW_SPACE, change, counted, ends, p_value, score
from prefold.reports.run_files import Values, cleaned, objects, read_run, section
from prefold.reports.tasks import TaskTable, outcome_of, score_table, task_table, tasks_of
from prefold.reports.templates import page_template
from prefold.reports.terminal_tables import STYLES, indented, plain, tasks_table
from prefold.reports.verdict import Line, Verdict, change_sentence, overall

PAGE = "sweep.html"
NAMED = 3
"""Runs that a sentence names."""
CONFIRM = "Before you rely on it, measure it on data that did not choose it"


def write_sweep(folder: Path, sweep: Values) -> Path:
    """The page in a sweep's folder, from the content of `sweep.json` and the folders of the runs; returns its path."""
    sweep = cleaned(sweep)
    done = {name: read_run(folder / name) for name in _points(sweep, "done")}
    tasks = {_spaced(name): run.tasks for name, run in done.items() if run.tasks}
    baselines = [{name: facts.get("before") for name, facts in tasks_of(run).items()} for run in tasks.values()]
    text = page_template("sweep.html.j2")(
        recipe=sweep["recipe"],
        verdict=verdict(sweep),
        table=_table(sweep),
        models=list(tasks),
        # Beside the model before training, if it is the same for all.
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
    """Something for rich to print, in which every text is plain text."""
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
    """Which run is best, what that is worth, and which others may be as good."""
    measured = _measured(sweep)
    if sweep.get("best") not in measured:
        return Verdict("missing", _without_best(sweep))
    facts, name, runs = measured[sweep["best"]], _spaced(sweep["best"]), len(measured)
    outcome = outcome_of(facts)
    headline = {
        "better": f"Best of {runs}: {name}",
        "worse": f"The best of {runs}, {name}, is worse than before training",
    }.get(outcome, f"Best of {runs}, but not clearly better than before training: {name}")
    # A model that scores answers was none before.
    alone = score(facts.get("after"), bool(facts.get("shares"))) if facts.get("before") is None else ""
    lines = [Line(outcome, f"Held-out {_metric(facts)}: {alone or change_sentence(facts)}")]
    if runs > 1:
        lines += [Line("mixed", _chosen_by_luck(sweep, facts, runs)), _others(sweep)]
    return Verdict(outcome, headline, "", tuple(lines))


def _without_best(sweep: Values) -> str:
    runs, failed = len(objects(sweep.get("points"))), len(_points(sweep, "failed"))
    if failed == runs:
        return "The only run failed" if runs == 1 else f"All {runs} runs failed"
    return "No run could be measured" if _points(sweep, "done") else "No run is done yet"


def _metric(facts: Values) -> str:
    return "accuracy" if facts.get("shares") else "reward"


def _chosen_by_luck(sweep: Values, facts: Values, runs: int) -> str:
    shares = bool(facts.get("shares"))
    luck = change(sweep.get("luck"), shares, " points").lstrip("+")
    text = f"Chosen by the {_units(sweep)} that it is measured on: the best of {runs} equally good runs would look"
    text += f" {luck} too good, by luck alone"
    if not (interval := ends(facts.get("after_ci_of_all"), score, shares)):
        return text
    return f"{text}. With allowance for the choice, its {_metric(facts)} is {interval} (95{NARROW_SPACE}% interval)"


def _others(sweep: Values) -> Line:
    alike = [_spaced(str(name)) for name in sweep.get("as_good") or ()]
    if not alike:
        return Line("better", "Better than each of the others, after correction for all comparisons")
    named = "; ".join([*alike[:NAMED], *([f"{len(alike) - NAMED} more"] if len(alike) > NAMED else [])])
    return Line("unclear", f"{_units(sweep)} do not show it to be better than {named}")


def _units(sweep: Values) -> str:
    held_out = section(sweep, "held_out")
    return counted(held_out.get("number"), held_out.get("unit", "pair"))


def _table(sweep: Values) -> TaskTable | None:
    """The runs as tasks are shown: before, after, change. Below each name what is between it and the best run."""
    rows = {_spaced(name): {**facts, "metric": _to_best(facts)} for name, facts in _measured(sweep).items()}
    return task_table({"tasks": rows})


def _to_best(facts: Values) -> str:
    if "to_best" not in facts:
        return ""
    behind = section(facts, "to_best")
    if not behind:
        return "best"
    by = change(behind.get("difference"), bool(facts.get("shares")), " points")
    return f"{by} to the best, {p_value(behind.get('p_adjusted'))}"


def _spaced(name: str) -> str:
    """`learning_rate=1e-5, beta=0.1`, which may be broken where it is too long for a line."""
    return name.replace(",", ", ")


def _points(sweep: Values, status: str) -> dict[str, Values]:
    """The runs by name that have this status."""
    return {str(point["name"]): point for point in objects(sweep.get("points")) if point.get("status") == status}


def _measured(sweep: Values) -> dict[str, Values]:
    """The held-out facts of runs by name."""
    points = {str(point["name"]): section(point, "held_out") for point in objects(sweep.get("points"))}
    return {name: facts for name, facts in points.items() if facts}
