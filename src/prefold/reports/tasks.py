"""Compared tasks and the win rate as pages and terminal show them: what counts once, and what is said beside a score.

`facts` are those of a task, a group or an average, as `evaluation/tasks.json` has them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from prefold.reports.numbers import MINUS, change, count, counted, finite, interval
from prefold.reports.run_files import Values, as_list, objects, section

Outcome = Literal["better", "worse", "mixed", "unclear", "missing"]


def outcome_of(facts: Values) -> Outcome:
    verdict = facts.get("verdict")
    if verdict == "better":
        return "better"
    return "worse" if verdict == "worse" else "unclear"


def are_shares(facts: Values) -> bool:
    return facts.get("shares") is not False


# ---- what counts once -------------------------------------------------------------------------------------------


def tasks_of(comparison: Values | None, kind: str = "tasks") -> dict[str, Values]:
    """Facts by name; `kind` may be `groups` or `suites` as well."""
    return {name: facts for name, facts in section(comparison, kind).items() if isinstance(facts, dict)}


def members_of(group: Values) -> list[str]:
    return [str(name) for name in as_list(group.get("members"))]


def entries(comparison: Values | None) -> dict[str, Values]:
    """What counts once, in the order of the tasks: groups, and the tasks that are in none."""
    groups, counting = tasks_of(comparison, "groups"), {}
    group_of = {task: name for name, group in groups.items() for task in members_of(group)}
    for task, facts in tasks_of(comparison).items():
        name = group_of.get(task, task)
        counting[name] = groups.get(name, facts)
    return counting


def averages(comparison: Values | None) -> dict[str, Values]:
    """By what they are called; one of a single task says nothing new."""
    every = {f"Average, {name}": facts for name, facts in tasks_of(comparison, "suites").items()}
    every |= {"Average": section(comparison, "average")}
    return {name: facts for name, facts in every.items() if (finite(facts.get("tasks")) or 0) > 1}


# ---- tables -----------------------------------------------------------------------------------------------------


class TaskTable(NamedTuple):
    """`rows`: groups and the tasks that are in none; `averages` below them; `members`: the tasks of each group.
    `flipped`: task, number of questions, whether they became right, and some of them. The scale of differences goes
    from `-reach` to `reach`."""

    rows: dict[str, Values]
    averages: dict[str, Values]
    members: dict[str, dict[str, Values]]
    reach: float
    flipped: list[tuple[str, Any, bool, list[Values]]]
    left_out: dict[str, Any]
    remarks: list[str]


def task_table(comparison: Values | None) -> TaskTable | None:
    """None where nothing was compared."""
    tasks, rows, means = tasks_of(comparison), entries(comparison), averages(comparison)
    if not rows:
        return None
    return TaskTable(
        rows=rows,
        averages=means,
        members={
            name: {task: tasks[task] for task in members_of(group) if task in tasks}
            for name, group in tasks_of(comparison, "groups").items()
        },
        reach=_reach([*tasks.values(), *rows.values(), *means.values()]),
        flipped=[
            (name, facts.get(direction), direction == "fixed", questions)
            for name, facts in tasks.items()
            for direction in ("fixed", "broken")
            if (questions := objects(section(facts, "flipped").get(direction)))
        ],
        left_out=section(comparison, "left_out"),
        remarks=_remarks(comparison),
    )


_REACHES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)


def _reach(rows: Iterable[Values]) -> float:
    """A round number that all intervals fit in."""
    shares = [facts for facts in rows if are_shares(facts)]
    ends = [(*interval(facts.get("ci")), finite(facts.get("difference"))) for facts in shares]
    largest = max((abs(end) for row in ends for end in row if end), default=0.0)
    return next((reach for reach in _REACHES if reach >= largest), 1.0)


def _remarks(comparison: Values | None) -> list[str]:
    """How the tasks were asked, as far as it is recorded, and whether the model knew the questions."""
    settings = section(comparison, "settings")
    remarks = [f"Asked by {settings['harness']}."] if settings.get("harness") else []
    if "apply_chat_template" in settings:
        remarks.append(f"Chat template {'applied' if settings['apply_chat_template'] else 'off'}, on both sides.")
    if settings.get("limit"):
        remarks.append(f"The first {count(settings['limit'])} questions of each task.")
    remarks += ["None of the questions stands in the training data."] if none_trained_on(comparison) else []
    return remarks + [f"{name}: {text}" for name, text in section(settings, "suites").items()]


def none_trained_on(comparison: Values | None) -> bool:
    """Whether the questions were looked for in the training data, and none stands there."""
    numbers = [finite(section(task, "contaminated").get("n")) for task in tasks_of(comparison).values()]
    return bool(numbers) and all(number == 0 for number in numbers)


def score_table(comparisons: dict[str, Values]) -> dict[str, list[Values | None]]:
    """By task the facts of each model, None where it was not compared; every comparison is with the same baseline."""
    models = [entries(comparison) | averages(comparison) for comparison in comparisons.values()]
    # Averages go last, whichever model has them.
    names = sorted(dict.fromkeys(name for model in models for name in model), key=lambda name: name[:7] == "Average")
    return {name: [model.get(name) for model in models] for name in names}


# ---- beside a score ---------------------------------------------------------------------------------------------


def note(facts: Values) -> str:
    """`acc_norm, 25-shot, 1 172 questions`; of a group or an average, how many tasks."""
    shots, several = finite(facts.get("num_fewshot")), len(members_of(facts)) or finite(facts.get("tasks"))
    parts = [
        str(facts.get("metric") or ""),
        "" if shots is None else f"{shots:.0f}-shot",
        f"{several:.0f} tasks" if several else "",
        counted(facts.get("n"), "question"),
    ]
    return ", ".join(filter(None, parts))


def in_training_data(facts: Values) -> str:
    number, clean = finite(section(facts, "contaminated").get("n")), section(facts, "clean")
    if not number:
        return ""
    without = f"; {change(clean.get('difference'), are_shares(facts))} without" if finite(clean.get("n")) else ""
    return f"{count(number)} in the training data{without}"


def in_words(facts: Values) -> str:
    if "verdict" not in facts:
        return ""
    outcome = outcome_of(facts)
    return "no difference shown" if outcome == "unclear" else outcome


def smallest_shown(facts: Values) -> str:
    """The smallest difference that could have been shown, where none was."""
    if "detectable" not in facts or in_words(facts) != "no difference shown":
        return ""
    if facts["detectable"] is None:
        return "too few to show any"
    return f"could show {change(facts['detectable'], True).lstrip('+')} points or more" if are_shares(facts) else ""


def flips(facts: Values) -> str:
    fixed, broken = facts.get("fixed"), facts.get("broken")
    if finite(fixed) is None or finite(broken) is None:
        return ""
    return f"+{count(fixed)} / {MINUS}{count(broken)} answers"


def whisker(value: Any, ci: Any, reach: float | None = None) -> tuple[float, float, float] | None:
    """Where an interval begins and ends, and where its value is, in percent of the scale from `-reach` to `reach`;
    without `reach`, from 0 to 1."""
    centre = finite(value)
    if centre is None:
        return None
    ends = [centre if end is None else end for end in interval(ci)]
    if reach:
        low, high, dot = (round(50 + 50 * max(-1.0, min(1.0, end / reach)), 2) for end in (*ends, centre))
    else:
        low, high, dot = (round(100 * max(0.0, min(1.0, end)), 2) for end in (*ends, centre))
    return low, high, dot


# ---- win rate ---------------------------------------------------------------------------------------------------

COUNTS = {"prompts": "prompts", "wins": "better", "ties": "even", "losses": "worse"}
LEFT_OUT = {
    "no_verdict": "replies that name neither answer",
    "refused": "refused by the endpoint",
    "no_score": "without a score",
}


def judge_of(win_rate: Values) -> str:
    judge = section(win_rate, "judge")
    return str(judge.get("model") or judge.get("name") or "an unnamed judge")


def win_rate_facts(win_rate: Values) -> list[tuple[str, str]]:
    facts = [(label, count(win_rate[name])) for name, label in COUNTS.items() if finite(win_rate.get(name)) is not None]
    left_out = section(win_rate, "left_out")
    facts += [(label, count(left_out[name])) for name, label in LEFT_OUT.items() if finite(left_out.get(name))]
    if lengths := section(win_rate, "characters"):
        before, after = (_whole(lengths.get(when)) for when in ("before", "after"))
        facts.append(("characters of an answer", f"{before} \u2192 {after}"))
    cost = section(section(win_rate, "judge"), "cost")
    if finite(cost.get("calls")) is not None:
        facts.append(("calls of the judge", count(cost["calls"])))
    tokens = sum(finite(cost.get(name)) or 0.0 for name in ("prompt_tokens", "completion_tokens"))
    return facts + ([("tokens of the judge", count(tokens))] if tokens else [])


def _whole(value: Any) -> str:
    """Halves up, where formatting rounds them to even."""
    number = finite(value)
    return count(None if number is None else math.floor(number + 0.5))
