"""The verdict on a run from all that was measured: held-out data, tasks and win rate, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefold.reports import run_record as read
from prefold.reports.run_record import (
    NARROW_SPACE,
    Line,
    Outcome,
    RunRecord,
    Values,
    Verdict,
    finite,
    interval,
    section,
)

NAMES_SHOWN = 3
LINES_SHOWN = 6


def overall(run: RunRecord) -> Verdict:
    """What got better and what got worse. Where nothing but held-out data was measured, that verdict."""
    own = read.verdict_of(run)
    if not tasks_of(run.tasks) and not _is_judged(run.win_rate):
        return own
    subjects: list[tuple[Outcome, str]] = [
        (own.outcome, "held-out prompts" if run.rewards and not run.heldout else "held-out pairs")
    ]
    subjects += _subjects(run.tasks)
    subjects += [(win_rate_outcome(run.win_rate), "open prompts")] if _is_judged(run.win_rate) else []
    outcome, headline = _headline(subjects)
    lines = [Line(own.outcome, own.sentence)] if own.outcome != "missing" else []
    lines += task_lines(run.tasks)
    lines += [Line(win_rate_outcome(run.win_rate), win_rate_sentence(run.win_rate))] if _is_judged(run.win_rate) else []
    return Verdict(outcome, headline, "", tuple(lines))


def verdict_on_tasks(comparison: Values | None) -> Verdict:
    """The same of tasks alone, as `prefold compare` has them."""
    outcome, headline = _headline(_subjects(comparison))
    return Verdict(outcome, headline, "", tuple(task_lines(comparison)))


def _subjects(comparison: Values | None) -> list[tuple[Outcome, str]]:
    return [(outcome_of(facts), name) for name, facts in entries(comparison).items()]


def _headline(subjects: Sequence[tuple[Outcome, str]]) -> tuple[Outcome, str]:
    better, worse = ([name for outcome, name in subjects if outcome == wanted] for wanted in ("better", "worse"))
    rest = "; no clear difference elsewhere" if any(outcome == "unclear" for outcome, _ in subjects) else ""
    if better and worse:
        return "mixed", f"Better on {_listed(better)}; worse on {_listed(worse)}"
    if better:
        return "better", f"Better on {_listed(better)}{rest}"
    if worse:
        return "worse", f"Worse on {_listed(worse)}{rest}"
    return "unclear", "No clear difference in anything that was measured"


def _listed(names: Sequence[str]) -> str:
    if len(names) > NAMES_SHOWN + 1:
        names = [*names[:NAMES_SHOWN], f"{len(names) - NAMES_SHOWN} more"]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


# ---- tasks ------------------------------------------------------------------------------------------------------


def tasks_of(comparison: Values | None) -> dict[str, Values]:
    found = section(comparison, "tasks")
    return {name: facts for name, facts in found.items() if isinstance(facts, dict)}


def groups_of(comparison: Values | None) -> dict[str, Values]:
    found = section(comparison, "groups")
    return {name: facts for name, facts in found.items() if isinstance(facts, dict)}


def members_of(group: Values) -> list[str]:
    return [str(name) for name in read.as_list(group.get("members"))]


def entries(comparison: Values | None) -> dict[str, Values]:
    """What counts once, in the order of the tasks: groups, and the tasks that are in none."""
    groups, found = groups_of(comparison), {}
    of_task = {task: name for name, group in groups.items() for task in members_of(group)}
    for task, facts in tasks_of(comparison).items():
        name = of_task.get(task, task)
        found[name] = groups.get(name, facts)
    return found


def outcome_of(facts: Values) -> Outcome:
    verdict = facts.get("verdict")
    if verdict == "better":
        return "better"
    return "worse" if verdict == "worse" else "unclear"


def task_lines(comparison: Values | None) -> list[Line]:
    """One for each task that changed, one for all others, one for the average, and what stands in the training data."""
    facts = entries(comparison)
    changed = {name: one for name, one in facts.items() if outcome_of(one) != "unclear"}
    lines = [Line(outcome_of(one), f"{name}: {change(one)}") for name, one in list(changed.items())[:LINES_SHOWN]]
    if len(changed) > LINES_SHOWN:
        lines.append(Line("unclear", f"{len(changed) - LINES_SHOWN} more tasks changed"))
    if same := len(facts) - len(changed):
        others = " other" if changed else ""
        lines.append(Line("unclear", f"No difference shown on {same}{others} task{'' if same == 1 else 's'}"))
    average = section(comparison, "average")
    if (finite(average.get("tasks")) or 0) > 1:
        low, high = interval(average.get("ci"))
        outcome: Outcome = "unclear" if low is None or high is None or low <= 0 <= high else _sign(low)
        lines.append(Line(outcome, f"Average of the tasks: {change(average)}"))
    seen = [(name, text) for name, one in tasks_of(comparison).items() if (text := apart(one))]
    lines += [Line("unclear", f"{name}: {text}") for name, text in seen[:LINES_SHOWN]]
    if len(seen) > LINES_SHOWN:
        more = f"{len(seen) - LINES_SHOWN} more tasks have questions that stand in the training data"
        lines.append(Line("unclear", more))
    return lines


def apart(facts: Values) -> str:
    """`3 of 1,172 questions stand in the training data; without them 31.2 % to 35.4 % (...)`; empty where none does."""
    seen, clean = section(facts, "contaminated"), section(facts, "clean")
    number = finite(seen.get("n"))
    if not number:
        return ""
    stand = "question stands" if number == 1 else "questions stand"
    said = f"{read.count(number).text} of {read.count(facts.get('n')).text} {stand} in the training data"
    if not finite(clean.get("n")):
        return said
    return f"{said}; without: {change({**clean, 'shares': facts.get('shares')})}"


def none_trained_on(comparison: Values | None) -> bool:
    """Whether the questions were looked for in the training data, and none stands there."""
    numbers = [finite(section(task, "contaminated").get("n")) for task in tasks_of(comparison).values()]
    return bool(numbers) and all(number == 0 for number in numbers)


def _sign(value: float) -> Outcome:
    return "better" if value > 0 else "worse"


def change(facts: Values) -> str:
    """`31.2 % to 35.4 % (+4.2 points, 95 % interval +1.0 to +7.4, p = 0.012)`."""
    shares = facts.get("shares") is not False
    parts = [difference(facts.get("difference"), shares) + (" points" if shares else "")]
    low, high = interval(facts.get("ci"))
    if low is not None and high is not None:
        ends = " to ".join(difference(end, shares) for end in (low, high))
        parts.append(f"95{NARROW_SPACE}% interval {ends}")
    p_value = facts.get("p_adjusted", facts.get("p_value"))
    if finite(p_value) is not None:
        parts.append(read.p_value(p_value).text)
    return f"{value(facts.get('before'), shares)} to {value(facts.get('after'), shares)} ({', '.join(parts)})"


def value(number: Any, shares: bool) -> str:
    return (read.percent(number, 1) if shares else read.decimal(number)).text


def difference(number: Any, shares: bool) -> str:
    return (read.points(number, 1) if shares else read.signed(number)).text


# ---- win rate ---------------------------------------------------------------------------------------------------


def _is_judged(win_rate: Values | None) -> bool:
    return finite((win_rate or {}).get("win_rate")) is not None


def win_rate_outcome(win_rate: Values | None) -> Outcome:
    return outcome_of(win_rate or {})


def win_rate_sentence(win_rate: Values | None) -> str:
    facts = win_rate or {}
    low, high = interval(facts.get("ci"))
    parts = [] if low is None or high is None else [_ends(low, high)]
    if (alike := finite(section(facts, "length_controlled").get("win_rate"))) is not None:
        parts.append(f"{read.percent(alike).text} at equal lengths")
    prompts = finite(facts.get("prompts")) or 0
    parts.append(f"{read.count(prompts).text} prompt{'' if prompts == 1 else 's'}")
    parts.append(f"judged by {judge_of(facts)}")
    return f"New answers preferred: {read.percent(facts.get('win_rate')).text} ({', '.join(parts)})"


def _ends(low: float, high: float) -> str:
    return f"95{NARROW_SPACE}% interval {read.percent(low).text} to {read.percent(high).text}"


def judge_of(win_rate: Values) -> str:
    judge = section(win_rate, "judge")
    return str(judge.get("model") or judge.get("name") or "an unnamed judge")
