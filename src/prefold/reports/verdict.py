"""The verdict on a run in words, from those of `evaluation/paired.py`: a difference is stated exactly where the p-value
is below 0.05, and then the interval leaves out 0, or chance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from prefold.errors import joined
from prefold.reports.held_out import accuracy_digits, comparison_of
from prefold.reports.numbers import (
    MINUS,
    change,
    count,
    counted,
    finite,
    interval_95,
    p_value,
    percent,
    points,
    score,
    signed,
)
from prefold.reports.run_files import RunRecord, Values, section
from prefold.reports.tasks import (
    Outcome,
    are_shares,
    decimals_of,
    entries,
    is_same,
    judge_of,
    outcome_of,
    smallest,
    tasks_of,
)

NAMES_SHOWN = 3
LINES_SHOWN = 6


class Line(NamedTuple):
    """One measurement, in words and numbers."""

    outcome: Outcome
    text: str


@dataclass(frozen=True)
class Verdict:
    """What the measurements say about a run: `headline` in words, and `evidence` in numbers, or `lines` if there are
    several measurements."""

    outcome: Outcome
    headline: str
    evidence: str = ""
    lines: tuple[Line, ...] = ()

    @property
    def sentence(self) -> str:
        return f"{self.headline} ({self.evidence})" if self.evidence else self.headline


def overall(run: RunRecord) -> Verdict:
    """What got better and what got worse; if only held-out data was measured, the verdict on that."""
    own, win_rate = held_out_verdict(run), run.win_rate or {}
    is_judged = finite(win_rate.get("win_rate")) is not None
    if not tasks_of(run.tasks) and not is_judged:
        return own
    held_out = {} if own.outcome == "missing" else {f"held-out {run.held_out}": comparison_of(run)}
    subjects = held_out | entries(run.tasks)
    lines = [*([Line(own.outcome, own.sentence)] if held_out else []), *task_lines(run.tasks)]
    if is_judged:
        subjects["open prompts"] = win_rate
        lines.append(Line(outcome_of(win_rate), _win_rate_sentence(win_rate)))
    return _verdict_on(subjects, lines)


def verdict_on_comparison(comparison: Values) -> Verdict:
    """The verdict on two sides of `prefold compare`."""
    if not entries(comparison):
        return Verdict("missing", "Nothing could be compared")
    lines = [
        Line(outcome_of(facts), f"{name}: {change_sentence(facts)}")
        for name, facts in tasks_of(comparison, "measures").items()
    ]
    return _verdict_on(entries(comparison), lines + task_lines(comparison))


def _verdict_on(subjects: dict[str, Values], lines: Sequence[Line]) -> Verdict:
    """`subjects`: the facts of each measurement, by name."""
    better, worse = ([name for name in subjects if outcome_of(subjects[name]) == side] for side in ("better", "worse"))
    rest = "; no clear difference elsewhere" if len(better) + len(worse) < len(subjects) else ""
    outcome: Outcome = "unclear"
    headline = "No clear difference in anything that was measured"
    if all(map(is_same, subjects.values())):
        headline = "No difference in anything that was measured: all came out the same"
    elif better and worse:
        outcome, headline = "mixed", f"Better on {_listed(better)}; worse on {_listed(worse)}"
    elif better:
        outcome, headline = "better", f"Better on {_listed(better)}{rest}"
    elif worse:
        outcome, headline = "worse", f"Worse on {_listed(worse)}{rest}"
    return Verdict(outcome, headline, "", tuple(lines))


def _listed(names: Sequence[str]) -> str:
    # "1 more" takes no less space than its name.
    return joined(names, NAMES_SHOWN if len(names) > NAMES_SHOWN + 1 else len(names))


# ---- held-out data ----------------------------------------------------------------------------------------------


def held_out_verdict(run: RunRecord) -> Verdict:
    facts = comparison_of(run)
    if not facts:
        return Verdict("missing", "Not evaluated yet")
    if finite(facts["before"]) is None or finite(facts["after"]) is None:
        return Verdict("missing", f"No verdict: the evaluation gave no finite {facts['metric']}")
    outcome, against_chance = outcome_of(facts), "even" in facts
    if facts["shares"]:
        digits = accuracy_digits(facts)
        write, write_change = partial(percent, digits=digits), partial(points, digits=digits)
    else:
        write = write_change = partial(signed, digits=decimals_of(facts))
    gain = write_change(facts.get("difference"))
    unit = "" if not facts["shares"] else " point" if gain in ("+1", f"{MINUS}1") else " points"
    evidence = (
        "" if against_chance else gain + unit,
        interval_95(facts.get("ci"), write if against_chance else write_change) or "no interval",
        p_value(facts.get("p_value")),
        counted(facts["n"], facts["unit"]),
        smallest(facts),
    )
    headline = _against_chance if against_chance else _before_and_after
    return Verdict(outcome, headline(facts, outcome, write), ", ".join(filter(None, evidence)))


def _before_and_after(facts: Values, outcome: Outcome, write: Callable[[Any], str]) -> str:
    subject = "Held-out accuracy" if facts["metric"] == "accuracy" else "The held-out reward"
    inside, before, after = subject[0].lower() + subject[1:], write(facts["before"]), write(facts["after"])
    if is_same(facts):
        return f"No difference: {inside} is {after} before and after, the same on every {facts['unit']}"
    return {
        "better": f"{subject} rose from {before} to {after}",
        "worse": f"The model got worse: {inside} fell from {before} to {after}",
    }.get(outcome, f"No clear difference: {inside} was {before} before and {after} after")


def _against_chance(facts: Values, outcome: Outcome, write: Callable[[Any], str]) -> str:
    accuracy, by_chance = write(facts["after"]), write(facts["even"])
    return {
        "better": f"Held-out accuracy is {accuracy}, and {by_chance} by chance",
        "worse": f"Worse than chance: held-out accuracy is {accuracy}, not {by_chance}",
    }.get(outcome, f"Held-out accuracy is {accuracy}, which is not clearly more than chance")


# ---- tasks and win rate -----------------------------------------------------------------------------------------


def task_lines(comparison: Values | None) -> list[Line]:
    """One for each task that changed, one for all others, one for the average, and what is in the training data."""
    facts = {name: task for name, task in entries(comparison).items() if name not in section(comparison, "measures")}
    changed = {name: task for name, task in facts.items() if outcome_of(task) != "unclear"}
    lines = [Line(outcome_of(task), f"{name}: {change_sentence(task)}") for name, task in changed.items()]
    lines = _at_most(lines, "tasks changed")
    if same := len(facts) - len(changed):
        others = " other" if changed else ""
        lines.append(Line("unclear", f"No difference shown on {same}{others} task{'' if same == 1 else 's'}"))
    average = section(comparison, "average")
    if (finite(average.get("tasks")) or 0) > 1:
        lines.append(Line(outcome_of(average), f"Average of the tasks: {change_sentence(average)}"))
    seen = [Line("unclear", f"{name}: {text}") for name, task in tasks_of(comparison).items() if (text := _seen(task))]
    return lines + _at_most(seen, "tasks have questions that are in the training data")


def _at_most(lines: list[Line], words: str) -> list[Line]:
    more = len(lines) - LINES_SHOWN
    return lines if more <= 0 else [*lines[:LINES_SHOWN], Line("unclear", f"{more} more {words}")]


def _seen(facts: Values) -> str:
    """`3 of 1,172 questions are in the training data; without: 31.2 % to 35.4 % (...)`; empty if none is."""
    clean, number = section(facts, "clean"), finite(section(facts, "contaminated").get("n"))
    if not number:
        return ""
    are = "question is" if number == 1 else "questions are"
    text = f"{count(number)} of {count(facts.get('n'))} {are} in the training data"
    if not finite(clean.get("n")):
        return text
    return f"{text}; without: {change_sentence({**clean, 'shares': facts.get('shares')})}"


def change_sentence(facts: Values) -> str:
    """`31.2 % to 35.4 % (+4.2 points, 95 % interval +1.0 to +7.4, p = 0.012)`."""
    before, after = (score(facts.get(when), are_shares(facts), decimals_of(facts)) for when in ("before", "after"))
    return f"{before} to {after} ({change_evidence(facts)})"


def change_evidence(facts: Values) -> str:
    """The part of `change_sentence` in brackets."""
    shares, digits = are_shares(facts), decimals_of(facts)
    evidence = (
        change(facts.get("difference"), shares, digits, " points"),
        interval_95(facts.get("ci"), change, shares, digits),
        p_value(facts.get("p_value")),
    )
    return ", ".join(filter(None, evidence))


def _win_rate_sentence(win_rate: Values) -> str:
    digits = decimals_of(win_rate, 0, 0.5)
    alike, agree = section(win_rate, "length_controlled").get("win_rate"), section(win_rate, "agreement").get("share")
    evidence = (
        interval_95(win_rate.get("ci"), percent, digits),
        p_value(win_rate.get("p_value")),
        smallest(win_rate),
        "" if finite(alike) is None else f"{percent(alike)} at equal lengths",
        counted(finite(win_rate.get("prompts")) or 0, "prompt"),
        f"judged by {judge_of(win_rate)}",
        "" if finite(agree) is None else f"who agree in {percent(agree)} of the pairs of votes on the same answers",
    )
    rate = percent(win_rate.get("win_rate"), digits)
    return f"New answers preferred: {rate} ({', '.join(filter(None, evidence))})"
