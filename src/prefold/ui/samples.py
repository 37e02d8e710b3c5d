"""The page of samples: what a run's model wrote before, during and after training, and how each held-out pair or prompt
changed."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from prefold.errors import UserError
from prefold.reports.each_pair import entry_of
from prefold.reports.numbers import finite
from prefold.reports.page import exchanges, shared_system
from prefold.reports.run_files import Values, cleaned, objects, read_run
from prefold.reports.tasks import task_table
from prefold.ui.runs import OF_SAMPLES, index_of, run_at
from prefold.ui.site import Page, page, route, site_of, whole_number
from prefold.ui.tables import Table, table_of

PAGE = Page("/samples", "Samples")
ON_A_PAGE = 20
LONGEST = 20_000
"""Characters of a text that are shown."""
HELD_OUT, ROLLOUTS, ANSWERS, TASKS = OF_SAMPLES
TITLES = {HELD_OUT: "Held-out", ROLLOUTS: "Rollouts", ANSWERS: "Answers", TASKS: "Questions"}
ORDERS = {"worst": "got worse first", "best": "got better first", "lowest": "lowest after first", "": "as they are"}


def _samples(request: Request) -> Response:
    site, given = site_of(request), request.query_params
    if "run" not in given:
        runs = {str(row.folder): site.name_of(row.folder) for row in index_of(site.folders).rows()[:200]}
        runs = {path: name for path, name in runs.items() if any((Path(path) / kind).is_file() for kind in OF_SAMPLES)}
        return page(request, "samples.html.j2", folder="", runs=runs, kinds={})
    folder = run_at(site, given["run"])
    kinds = {kind: title for kind, title in TITLES.items() if (folder / kind).is_file()}
    if not kinds:
        raise HTTPException(404, "This run has no samples yet.")
    kind = given.get("kind") if given.get("kind") in kinds else next(iter(kinds))
    shown: dict[str, Any] = {"kind": kind, "kinds": kinds, "folder": str(folder), "name": site.name_of(folder)}
    values_of = {HELD_OUT: _held_out, ROLLOUTS: _rollouts, ANSWERS: _answers, TASKS: _questions}[str(kind)]
    return page(request, "samples.html.j2", **shown, **values_of(folder, dict(given)))


# ---- held-out pairs and prompts -----------------------------------------------------------------------------------


def _held_out(folder: Path, given: dict[str, str]) -> Values:
    table, run = _table(folder / HELD_OUT), read_run(folder, growing=())
    order = given.get("order", "worst")
    numbers, got_worse = _ordered(table, order if order in ORDERS else "worst")
    first = whole_number(given, "after")
    shown = [cleaned(table.row(number).value) for number in numbers[first : first + ON_A_PAGE]]
    return {
        "entries": [entry_of(line, LONGEST) for line in shown],
        "number": len(numbers),
        "got_worse": None if run.scores else got_worse,
        "measured": "reward" if run.rewards else "margin",
        "first": first,
        "following": first + ON_A_PAGE if first + ON_A_PAGE < len(numbers) else None,
        "orders": ORDERS,
    }


@lru_cache(maxsize=16)
def _ordered(table: Table, order: str) -> tuple[list[int], int]:
    """The numbers of the lines in the given order, and how many got worse."""
    ranks = {}
    for number in range(1, len(table) + 1):
        line = table.row(number).value
        if line and "prompt" in line:
            prefix = "margin_" if "chosen" in line else ""
            before, after = (finite(line.get(f"{prefix}{when}")) for when in ("before", "after"))
            ranks[number] = (after if before is None or after is None else after - before, after)
    keys = {
        "worst": lambda number: _none_last(*ranks[number]),
        "best": lambda number: _none_last(*(value and -value for value in ranks[number])),
        "lowest": lambda number: _none_last(*ranks[number][::-1]),
        "": lambda number: (number,),
    }
    return sorted(ranks, key=keys[order]), sum((change or 0) < 0 for change, _ in ranks.values())


def _none_last(*values: float | None) -> tuple[tuple[bool, float], ...]:
    return tuple((value is None, value or 0.0) for value in values)


def _table(file: Path) -> Table:
    table = table_of(file, file.name)
    table.is_whole.wait()
    if table.failed:
        raise table.failed
    return table


# ---- rollouts -----------------------------------------------------------------------------------------------------


def _rollouts(folder: Path, given: dict[str, str]) -> Values:
    table = _table(folder / ROLLOUTS)
    steps = _steps(table)
    if not steps:
        raise UserError("no step has been recorded yet", where=ROLLOUTS, advice="come back when the run has taken one")
    known = list(steps)
    step = whole_number(given, "step")
    step = step if step in steps else known[-1]
    index = known.index(step)
    groups = [cleaned(table.row(number).value) for number in steps[step]]
    for group in groups:
        group["completions"] = sorted(objects(group.get("completions")), key=_reward, reverse=True)
    return {
        "groups": groups,
        "step": step,
        "before": known[index - 1] if index else None,
        "following": known[index + 1] if index + 1 < len(known) else None,
        "last": known[-1],
    }


def _reward(completion: Values) -> float:
    reward = finite(completion.get("reward"))
    return float("-inf") if reward is None else reward


@lru_cache(maxsize=16)
def _steps(table: Table) -> dict[int, list[int]]:
    """The numbers of the lines of each step."""
    steps: dict[int, list[int]] = {}
    for number in range(1, len(table) + 1):
        step = (table.row(number).value or {}).get("step")
        if isinstance(step, int):
            steps.setdefault(step, []).append(number)
    return steps


# ---- answers and questions ----------------------------------------------------------------------------------------


def _answers(folder: Path, given: dict[str, str]) -> Values:
    samples = read_run(folder, growing=["samples"]).samples
    return {"system": shared_system(samples), "exchanges": exchanges(samples)}


def _questions(folder: Path, given: dict[str, str]) -> Values:
    tasks = task_table(read_run(folder, growing=()).tasks)
    return {"flipped": tasks.flipped if tasks else []}


ROUTES = [route("/samples", _samples)]
