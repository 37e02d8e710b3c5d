"""What pages and terminal show of compared tasks and of the win rate: rows, whiskers, questions that flipped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from prefold.reports import run_record as read
from prefold.reports import verdict as overall
from prefold.reports.run_record import NO_VALUE, Number, Outcome, Values, finite, interval, section
from prefold.reports.verdict import entries, groups_of, judge_of, members_of, outcome_of, tasks_of


class Whisker(NamedTuple):
    """A difference with its interval, in percent of a scale whose middle is no difference."""

    low: float
    high: float
    dot: float


class TaskRow(NamedTuple):
    """`note`: metric, examples and questions. `smallest`: the smallest difference that could have been shown.
    `apart`: the questions that the model was trained on."""

    name: str
    note: str
    before: Number
    after: Number
    change: Number
    ends: str
    whisker: Whisker | None
    outcome: Outcome
    words: str
    smallest: str
    flips: str
    apart: str


class Flip(NamedTuple):
    """A question that one of the models answers rightly and the other does not."""

    question: str
    before: str
    after: str
    target: str


class Flipped(NamedTuple):
    """`shown` of `number` questions that went from wrong to right (`fixed`) or the other way."""

    task: str
    direction: str
    number: Number
    shown: list[Flip]


class Members(NamedTuple):
    group: str
    rows: list[TaskRow]


class TaskTable(NamedTuple):
    """`rows`: groups and the tasks that are in none; `averages` below them; `members`: the tasks of each group."""

    rows: list[TaskRow]
    averages: list[TaskRow]
    members: list[Members]
    reach: str
    flipped: list[Flipped]
    left_out: list[tuple[str, str]]
    remarks: list[str]


def task_table(comparison: Values | None) -> TaskTable | None:
    """None where nothing was compared."""
    tasks, shown = tasks_of(comparison), entries(comparison)
    if not shown:
        return None
    averages = _averages(comparison or {})
    reach = _reach([*tasks.values(), *shown.values(), *averages.values()])
    return TaskTable(
        rows=[_row(name, facts, reach) for name, facts in shown.items()],
        averages=[_row(name, facts, reach) for name, facts in averages.items()],
        members=[
            Members(name, [_row(task, tasks[task], reach) for task in members_of(group) if task in tasks])
            for name, group in groups_of(comparison).items()
        ],
        reach=f"{100 * reach:g}",
        flipped=[one for name, facts in tasks.items() for one in _flipped(name, facts)],
        left_out=[(name, str(reason)) for name, reason in section(comparison, "left_out").items()],
        remarks=_remarks(comparison),
    )


def _averages(comparison: Values) -> dict[str, Values]:
    """By what they are called; one of a single task says nothing new."""
    found = {f"Average, {name}": facts for name, facts in section(comparison, "suites").items()}
    found |= {"Average": section(comparison, "average")}
    return {
        name: facts
        for name, facts in found.items()
        if isinstance(facts, dict) and (finite(facts.get("tasks")) or 0) > 1
    }


def _row(name: str, facts: Values, reach: float) -> TaskRow:
    shares = facts.get("shares") is not False
    written = _share if shares else read.decimal
    change = read.points(facts.get("difference"), 1) if shares else read.signed(facts.get("difference"))
    outcome = outcome_of(facts)
    smallest = read.points(facts.get("detectable"), 1).text.lstrip("+") + " points" if shares else ""
    words = {"better": "better", "worse": "worse"}.get(outcome, "no difference shown")
    return TaskRow(
        name=name,
        note=_note(facts),
        before=written(facts.get("before")),
        after=written(facts.get("after")),
        change=change,
        ends=_ends(facts, shares),
        whisker=_whisker(facts, reach) if shares else None,
        outcome=outcome,
        words=words if "verdict" in facts else "",
        smallest=_smallest(facts, smallest) if words == "no difference shown" and "verdict" in facts else "",
        flips=_flips(facts),
        apart=_apart(facts, shares),
    )


def _apart(facts: Values, shares: bool) -> str:
    number, clean = finite(section(facts, "contaminated").get("n")), section(facts, "clean")
    if not number:
        return ""
    without = f"; {overall.difference(clean.get('difference'), shares)} without" if finite(clean.get("n")) else ""
    return f"{read.count(number).text} in the training data{without}"


def _share(value: Any) -> Number:
    return read.percent(value, 1)


def _smallest(facts: Values, points: str) -> str:
    if facts.get("detectable") is None:
        return "too few to show any"
    return f"could show {points} or more" if points else ""


def _note(facts: Values) -> str:
    """`acc_norm, 25-shot, 1 172 questions`; of a group or an average, how many tasks."""
    parts = [str(facts["metric"])] if facts.get("metric") else []
    if (shots := finite(facts.get("num_fewshot"))) is not None:
        parts.append(f"{shots:.0f}-shot")
    several = len(members_of(facts)) or finite(facts.get("tasks")) or 0
    if several:
        parts.append(f"{several:.0f} tasks")
    if (number := finite(facts.get("n"))) is not None:
        parts.append(f"{read.count(number).text} question{'' if number == 1 else 's'}")
    return ", ".join(parts)


def _ends(facts: Values, shares: bool) -> str:
    low, high = interval(facts.get("ci"))
    if low is None or high is None:
        return ""
    return " to ".join((read.points(end, 1) if shares else read.signed(end)).text for end in (low, high))


def _flips(facts: Values) -> str:
    fixed, broken = (read.count(facts.get(name)).text for name in ("fixed", "broken"))
    return "" if NO_VALUE in (fixed, broken) else f"+{fixed} / {read.MINUS}{broken}"


_REACHES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)


def _reach(facts: Iterable[Values]) -> float:
    """Where the scale of the whiskers ends: a round number that all of them fit in."""
    shares = [one for one in facts if one.get("shares") is not False]
    ends = [abs(end) for one in shares for end in (*interval(one.get("ci")), finite(one.get("difference"))) if end]
    return next((reach for reach in _REACHES if reach >= max(ends, default=0.0)), 1.0)


def _whisker(facts: Values, reach: float) -> Whisker | None:
    dot = finite(facts.get("difference"))
    if dot is None:
        return None
    ends = [dot if end is None else end for end in interval(facts.get("ci"))]
    low, high, place = (round(50 + 50 * max(-1.0, min(1.0, end / reach)), 2) for end in (*ends, dot))
    return Whisker(low, high, place)


def _remarks(comparison: Values | None) -> list[str]:
    """How the tasks were asked, as far as it is recorded, and whether the model knew the questions."""
    settings = section(comparison, "settings")
    remarks = [f"Asked by {settings['harness']}."] if settings.get("harness") else []
    if "apply_chat_template" in settings:
        remarks.append(f"Chat template {'applied' if settings['apply_chat_template'] else 'off'}, on both sides.")
    if settings.get("limit"):
        remarks.append(f"The first {read.count(settings['limit']).text} questions of each task.")
    remarks += ["None of the questions stands in the training data."] if overall.none_trained_on(comparison) else []
    return remarks + [f"{name}: {text}" for name, text in section(settings, "suites").items()]


# ---- questions that flipped -------------------------------------------------------------------------------------


def _flipped(task: str, facts: Values) -> list[Flipped]:
    kept = section(facts, "flipped")
    return [
        Flipped(task, direction, read.count(facts.get(direction)), shown)
        for direction in ("fixed", "broken")
        if (shown := _shown(kept.get(direction)))
    ]


def _shown(questions: Any) -> list[Flip]:
    found = read.objects(questions)
    return [Flip(*(str(one.get(name, "")) for name in ("question", "before", "after", "target"))) for one in found]


# ---- other models -----------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    score: Number
    change: Number
    outcome: Outcome


class ScoreRow(NamedTuple):
    """A task with the baseline's score and a cell for each model; None where it was not compared."""

    name: str
    note: str
    baseline: Number
    cells: list[Cell | None]


class ScoreTable(NamedTuple):
    models: list[str]
    rows: list[ScoreRow]


def score_table(models: dict[str, Values]) -> ScoreTable | None:
    """All models side by side; each comparison is with the same baseline."""
    found = {name: entries(one) | _averages(one) for name, one in models.items()}
    tasks = list(dict.fromkeys(task for one in found.values() for task in one))
    if not tasks:
        return None
    # Averages go last, whichever model has them.
    tasks.sort(key=lambda name: name.startswith("Average"))
    return ScoreTable(list(models), [_score_row(task, [one.get(task) for one in found.values()]) for task in tasks])


def _score_row(task: str, facts: Sequence[Values | None]) -> ScoreRow:
    first = _row(task, next(one for one in facts if one is not None), 1.0)
    rows = [None if one is None else _row(task, one, 1.0) for one in facts]
    cells = [None if row is None else Cell(row.after, row.change, row.outcome) for row in rows]
    return ScoreRow(task, first.note, first.before, cells)


# ---- win rate ---------------------------------------------------------------------------------------------------


class Rate(NamedTuple):
    """A share with its interval, as a dot on a scale from 0 to 100."""

    label: str
    value: Number
    ends: str
    low: float
    high: float
    dot: float


class WinRate(NamedTuple):
    outcome: Outcome
    words: str
    rates: list[Rate]
    facts: list[tuple[str, str]]
    judge: str
    replies: list[str]


def win_rate_view(win_rate: Values | None) -> WinRate | None:
    if win_rate is None:
        return None
    alike = section(win_rate, "length_controlled")
    rates = [_rate("New answers preferred", win_rate), _rate("At equal lengths", alike)]
    return WinRate(
        outcome=outcome_of(win_rate),
        words=str(win_rate.get("verdict", "")),
        rates=[rate for rate in rates if rate is not None],
        facts=_win_facts(win_rate),
        judge=judge_of(win_rate),
        replies=[str(reply) for reply in read.as_list(win_rate.get("replies_without_verdict"))],
    )


def _rate(label: str, facts: Values) -> Rate | None:
    rate = finite(facts.get("win_rate"))
    if rate is None:
        return None
    low, high = interval(facts.get("ci"))
    ends = "" if low is None or high is None else f"{read.percent(low).text} to {read.percent(high).text}"
    places = [rate if end is None else end for end in (low, high)]
    start, stop, dot = (round(100 * max(0.0, min(1.0, place)), 2) for place in (*places, rate))
    return Rate(label, read.percent(rate), ends, start, stop, dot)


_LEFT_OUT = {
    "no_verdict": "replies that name neither answer",
    "refused": "refused by the endpoint",
    "no_score": "without a score",
}


def _win_facts(win_rate: Values) -> list[tuple[str, str]]:
    facts = [
        (label, read.count(win_rate.get(name)).text)
        for name, label in (("prompts", "prompts"), ("wins", "better"), ("ties", "even"), ("losses", "worse"))
        if finite(win_rate.get(name)) is not None
    ]
    left_out = section(win_rate, "left_out")
    facts += [
        (label, read.count(left_out[name]).text) for name, label in _LEFT_OUT.items() if finite(left_out.get(name))
    ]
    lengths = section(win_rate, "characters")
    if lengths:
        was, became = (_whole(lengths.get(when)) for when in ("before", "after"))
        facts.append(("characters of an answer", f"{was} \u2192 {became}"))
    cost = section(section(win_rate, "judge"), "cost")
    if finite(cost.get("calls")) is not None:
        facts.append(("calls of the judge", read.count(cost["calls"]).text))
    tokens = sum(finite(cost.get(name)) or 0.0 for name in ("prompt_tokens", "completion_tokens"))
    return facts + ([("tokens of the judge", read.count(tokens).text)] if tokens else [])


def _whole(value: Any) -> str:
    number = finite(value)
    return read.count(None if number is None else math.floor(number + 0.5)).text
