"""The verdict on a run in words, by one rule: an interval that holds 0, or chance, is no difference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from prefold.reports.held_out import accuracy_digits
from prefold.reports.numbers import (
    MINUS,
    change,
    count,
    counted,
    finite,
    interval,
    interval_95,
    p_value,
    percent,
    points,
    score,
    signed,
)
from prefold.reports.run_files import RunRecord, Values, section
from prefold.reports.tasks import Outcome, are_shares, entries, judge_of, outcome_of, tasks_of

NAMES_SHOWN = 3
LINES_SHOWN = 6


class Line(NamedTuple):
    """One of the things that were measured, in words and numbers."""

    outcome: Outcome
    text: str


@dataclass(frozen=True)
class Verdict:
    """What was measured says about the run: `headline` in words, `evidence` in numbers; or, where that is several
    things, in `lines`."""

    outcome: Outcome
    headline: str
    evidence: str = ""
    lines: tuple[Line, ...] = ()

    @property
    def sentence(self) -> str:
        return f"{self.headline} ({self.evidence})" if self.evidence else self.headline


def overall(run: RunRecord) -> Verdict:
    """What got better and what got worse. Where nothing but held-out data was measured, that verdict."""
    own, win_rate = held_out_verdict(run), run.win_rate or {}
    is_judged = finite(win_rate.get("win_rate")) is not None
    if not tasks_of(run.tasks) and not is_judged:
        return own
    subjects = {f"held-out {run.held_out}": own.outcome} | _subjects(run.tasks)
    lines = [Line(own.outcome, own.sentence)] if own.outcome != "missing" else []
    lines += task_lines(run.tasks)
    if is_judged:
        subjects["open prompts"] = outcome_of(win_rate)
        lines.append(Line(outcome_of(win_rate), _win_rate_sentence(win_rate)))
    return _verdict_on(subjects, lines)


def verdict_on_tasks(comparison: Values | None) -> Verdict:
    """The same of tasks alone, as `prefold compare` has them."""
    return _verdict_on(_subjects(comparison), task_lines(comparison))


def _subjects(comparison: Values | None) -> dict[str, Outcome]:
    return {name: outcome_of(facts) for name, facts in entries(comparison).items()}


def _verdict_on(subjects: dict[str, Outcome], lines: Sequence[Line]) -> Verdict:
    better, worse = ([name for name, outcome in subjects.items() if outcome == side] for side in ("better", "worse"))
    rest = "; no clear difference elsewhere" if "unclear" in subjects.values() else ""
    outcome: Outcome = "unclear"
    headline = "No clear difference in anything that was measured"
    if better and worse:
        outcome, headline = "mixed", f"Better on {_listed(better)}; worse on {_listed(worse)}"
    elif better:
        outcome, headline = "better", f"Better on {_listed(better)}{rest}"
    elif worse:
        outcome, headline = "worse", f"Worse on {_listed(worse)}{rest}"
    return Verdict(outcome, headline, "", tuple(lines))


def _listed(names: Sequence[str]) -> str:
    if len(names) > NAMES_SHOWN + 1:
        names = [*names[:NAMES_SHOWN], f"{len(names) - NAMES_SHOWN} more"]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


# ---- held-out data ----------------------------------------------------------------------------------------------


def held_out_verdict(run: RunRecord) -> Verdict:
    if run.rewards and run.heldout is None:
        return _on_rewards(run.rewards)
    if run.heldout is None:
        return Verdict("missing", "Not evaluated yet")
    return _against_chance(run.heldout) if run.scores else _on_pairs(run.heldout)


def _on_pairs(heldout: Values) -> Verdict:
    difference, digits = section(heldout, "difference"), accuracy_digits(heldout)
    gain = points(difference.get("accuracy"), digits)
    evidence = (
        f"{gain} {'point' if gain in ('+1', f'{MINUS}1') else 'points'}",
        interval_95(difference.get("ci"), points, digits) or "no interval",
        p_value(difference.get("p_value")),
        counted(heldout.get("pairs"), "pair"),
    )
    return _before_and_after(heldout, "accuracy", partial(percent, digits=digits), evidence)


def _on_rewards(rewards: Values) -> Verdict:
    """Of the mean reward of completions of held-out prompts."""
    difference = section(rewards, "difference")
    evidence = (
        signed(difference.get("reward")),
        interval_95(difference.get("ci"), signed),
        p_value(difference.get("p_value")),
        counted(rewards.get("prompts"), "prompt"),
    )
    return _before_and_after(rewards, "reward", signed, evidence)


def _before_and_after(facts: Values, name: str, write: Callable[[Any], str], evidence: Sequence[str]) -> Verdict:
    before, after = (section(facts, when).get(name) for when in ("before", "after"))
    if finite(before) is None or finite(after) is None:
        return Verdict("missing", f"No verdict: the evaluation gave no finite {name}")
    subject = "Held-out accuracy" if name == "accuracy" else "The held-out reward"
    inside = subject[0].lower() + subject[1:]
    outcome = _outcome_by(section(facts, "difference").get("ci"))
    headline = {
        "better": f"{subject} rose from {write(before)} to {write(after)}",
        "worse": f"The model got worse: {inside} fell from {write(before)} to {write(after)}",
    }.get(outcome, f"No clear difference: {inside} was {write(before)} before and {write(after)} after")
    return Verdict(outcome, headline, ", ".join(filter(None, evidence)))


def _against_chance(heldout: Values) -> Verdict:
    """Of a model that scores answers, by the interval of its accuracy."""
    after, chance = section(heldout, "after"), section(heldout, "chance")
    guessed = finite(chance.get("accuracy"))
    if finite(after.get("accuracy")) is None or guessed is None:
        return Verdict("missing", "No verdict: the evaluation gave no finite accuracy")
    evidence = (
        interval_95(after.get("accuracy_ci"), percent) or "no interval",
        p_value(chance.get("p_value")),
        counted(heldout.get("pairs"), "pair"),
    )
    accuracy, by_chance = percent(after["accuracy"]), percent(guessed)
    outcome = _outcome_by(after.get("accuracy_ci"), guessed)
    headline = {
        "better": f"Held-out accuracy is {accuracy}, and {by_chance} by chance",
        "worse": f"Worse than chance: held-out accuracy is {accuracy}, not {by_chance}",
    }.get(outcome, f"Held-out accuracy is {accuracy}, which is not clearly more than chance")
    return Verdict(outcome, headline, ", ".join(filter(None, evidence)))


def _outcome_by(ci: Any, neutral: float = 0.0) -> Outcome:
    low, high = interval(ci)
    if low is None or high is None or low <= neutral <= high:
        return "unclear"
    return "better" if low > neutral else "worse"


# ---- tasks and win rate -----------------------------------------------------------------------------------------


def task_lines(comparison: Values | None) -> list[Line]:
    """One for each task that changed, one for all others, one for the average, and what is in the training data."""
    facts = entries(comparison)
    changed = {name: task for name, task in facts.items() if outcome_of(task) != "unclear"}
    lines = [Line(outcome_of(task), f"{name}: {change_sentence(task)}") for name, task in changed.items()]
    lines = _at_most(lines, "tasks changed")
    if same := len(facts) - len(changed):
        others = " other" if changed else ""
        lines.append(Line("unclear", f"No difference shown on {same}{others} task{'' if same == 1 else 's'}"))
    average = section(comparison, "average")
    if (finite(average.get("tasks")) or 0) > 1:
        lines.append(Line(_outcome_by(average.get("ci")), f"Average of the tasks: {change_sentence(average)}"))
    seen = [Line("unclear", f"{name}: {text}") for name, task in tasks_of(comparison).items() if (text := _seen(task))]
    return lines + _at_most(seen, "tasks have questions that are in the training data")


def _at_most(lines: list[Line], words: str) -> list[Line]:
    more = len(lines) - LINES_SHOWN
    return lines if more <= 0 else [*lines[:LINES_SHOWN], Line("unclear", f"{more} more {words}")]


def _seen(facts: Values) -> str:
    """`3 of 1,172 questions are in the training data; without: 31.2 % to 35.4 % (...)`; empty where none does."""
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
    shares = are_shares(facts)
    evidence = (
        change(facts.get("difference"), shares, " points"),
        interval_95(facts.get("ci"), change, shares),
        p_value(facts.get("p_adjusted", facts.get("p_value"))),
    )
    before, after = (score(facts.get(when), shares) for when in ("before", "after"))
    return f"{before} to {after} ({', '.join(filter(None, evidence))})"


def _win_rate_sentence(win_rate: Values) -> str:
    alike = section(win_rate, "length_controlled").get("win_rate")
    evidence = (
        interval_95(win_rate.get("ci"), percent),
        "" if finite(alike) is None else f"{percent(alike)} at equal lengths",
        counted(finite(win_rate.get("prompts")) or 0, "prompt"),
        f"judged by {judge_of(win_rate)}",
    )
    return f"New answers preferred: {percent(win_rate.get('win_rate'))} ({', '.join(filter(None, evidence))})"
