"""How pages and the terminal show comparisons: which entries count, and the remarks next to a score.

`facts` are those of one comparison, by any measure, as in `evaluation/tasks.json`: `Difference.facts`, with `before`,
`after` and `n`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from prefold.reports.numbers import change, count, counted, decimals, finite, interval
from prefold.reports.run_files import Values, as_list, objects, section

Outcome = Literal["better", "worse", "mixed", "unclear", "missing"]


def outcome_of(facts: Values) -> Outcome:
    verdict = facts.get("verdict")
    if verdict == "better":
        return "better"
    return "worse" if verdict == "worse" else "unclear"


def is_same(facts: Values) -> bool:
    """Whether not a single result changed."""
    return facts.get("changed") == 0 and outcome_of(facts) == "unclear"


def decimals_of(facts: Values, least: int | None = None, even: float = 0.0) -> int:
    """How many decimals to write, so that the numbers agree with the verdict: an interval that leaves out `even`, which
    means no difference, is not rounded to end there, and a difference is not rounded to none."""
    shares = are_shares(facts)
    least = least if least is not None else 1 if shares else 2
    scale, difference = 100.0 if shares else 1.0, finite(facts.get("difference"))
    digits = decimals(least, scale, [difference], least + 3)
    most = least + 3 if outcome_of(facts) == "unclear" else 12
    # What is rounded is the end, as it is written, and not its distance to `even`.
    ends = [scale * end for end in interval(facts.get("ci")) if end is not None and end != even]
    return next((n for n in range(digits, most) if all(round(end, n) != scale * even for end in ends)), most)


def smallest(facts: Values) -> str:
    """If no difference is shown, the smallest that would have been; empty if that is not known."""
    if outcome_of(facts) != "unclear" or "detectable" not in facts:
        return ""
    detectable = finite(facts["detectable"])
    if detectable is None:
        return "too few to show any difference"
    shares = are_shares(facts)
    size = change(detectable, shares, decimals(1 if shares else 2, 100 if shares else 1, [detectable]), " points")
    return f"{size.lstrip('+')} or more would show" if detectable else ""


def are_shares(facts: Values) -> bool:
    return facts.get("shares") is not False


def tasks_of(comparison: Values | None, kind: str = "tasks") -> dict[str, Values]:
    """Facts by name; `kind` may be `groups` or `suites` as well."""
    return {name: facts for name, facts in section(comparison, kind).items() if isinstance(facts, dict)}


def members_of(group: Values) -> list[str]:
    return [str(name) for name in as_list(group.get("members"))]


def entries(comparison: Values | None) -> dict[str, Values]:
    """The entries that count, each once: other measures; then groups, and tasks outside groups, in the tasks' order."""
    groups, counting = tasks_of(comparison, "groups"), tasks_of(comparison, "measures")
    group_of = {task: name for name, group in groups.items() for task in members_of(group)}
    for task, facts in tasks_of(comparison).items():
        name = group_of.get(task, task)
        counting[name] = groups.get(name, facts)
    return counting


def averages(comparison: Values | None) -> dict[str, Values]:
    """The averages by label; one over a single task says nothing new and is left out."""
    every = {f"Average, {name}": facts for name, facts in tasks_of(comparison, "suites").items()}
    every |= {"Average": section(comparison, "average")}
    return {name: facts for name, facts in every.items() if (finite(facts.get("tasks")) or 0) > 1}


class TaskTable(NamedTuple):
    """`rows`: groups and the tasks that are in none; `averages` below them; `members`: the tasks of each group.
    `flipped`: task, number of flipped questions, whether they became right, and some of them. The scale of differences
    goes from `-reach` to `reach`."""

    rows: dict[str, Values]
    averages: dict[str, Values]
    members: dict[str, dict[str, Values]]
    reach: float
    flipped: list[tuple[str, Any, bool, list[Values]]]
    left_out: dict[str, Any]
    settings: Values
    none_trained_on: bool


def task_table(comparison: Values | None) -> TaskTable | None:
    """None if nothing was compared."""
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
        reach=_reach((*tasks.values(), *rows.values(), *means.values())),
        flipped=[
            (name, facts.get(direction), direction == "fixed", questions)
            for name, facts in tasks.items()
            for direction in ("fixed", "broken")
            if (questions := objects(section(facts, "flipped").get(direction)))
        ],
        left_out=section(comparison, "left_out"),
        settings=section(comparison, "settings"),
        none_trained_on=none_trained_on(comparison),
    )


_REACHES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)


def _reach(rows: Iterable[Values]) -> float:
    """A round number that no interval of shares exceeds."""
    shares = [facts for facts in rows if are_shares(facts)]
    ends = [(*interval(facts.get("ci")), finite(facts.get("difference"))) for facts in shares]
    largest = max((abs(end) for row in ends for end in row if end), default=0.0)
    return next((reach for reach in _REACHES if reach >= largest), 1.0)


def none_trained_on(comparison: Values | None) -> bool:
    """Whether the questions were looked for in the training data, and none was found there."""
    numbers = [finite(section(task, "contaminated").get("n")) for task in tasks_of(comparison).values()]
    return bool(numbers) and all(number == 0 for number in numbers)


def score_table(comparisons: dict[str, Values]) -> dict[str, list[Values | None]]:
    """The facts of each model by task, None where it was not compared; every comparison is with the same baseline."""
    models = [entries(comparison) | averages(comparison) for comparison in comparisons.values()]
    # Averages go last, whichever model has them.
    names = sorted(dict.fromkeys(name for model in models for name in model), key=lambda name: name[:7] == "Average")
    return {name: [model.get(name) for model in models] for name in names}


def note(facts: Values) -> str:
    """`acc_norm, 25-shot, 1 172 questions`; for a group or an average, the number of tasks; if not all questions were
    asked of both sides, the number asked of each."""
    shots, several = finite(facts.get("num_fewshot")), len(members_of(facts)) or finite(facts.get("tasks"))
    n, asked = facts.get("n"), as_list(facts.get("asked"))
    shared = f"shared, of {' and '.join(map(count, asked))}" if asked and any(number != n for number in asked) else ""
    parts = [
        str(facts.get("metric") or ""),
        "" if shots is None else f"{shots:.0f}-shot",
        f"{several:.0f} tasks" if several else "",
        f"{counted(n, str(facts.get('unit') or 'question'))} {shared}".strip(),
    ]
    return ", ".join(filter(None, parts))


def in_training_data(facts: Values) -> str:
    number, clean = finite(section(facts, "contaminated").get("n")), section(facts, "clean")
    if not number:
        return ""
    text = f"{count(number)} in the training data"
    if not finite(clean.get("n")):
        return text
    clean = {**clean, "shares": facts.get("shares")}
    return f"{text}; {change(clean.get('difference'), are_shares(clean), decimals_of(clean))} without"


def in_words(facts: Values) -> str:
    if "verdict" not in facts:
        return ""
    outcome = outcome_of(facts)
    return ("no difference" if is_same(facts) else "no difference shown") if outcome == "unclear" else outcome


def whisker(value: Any, ci: Any, reach: float | None = None) -> tuple[float, float, float] | None:
    """Both ends of an interval and its value, in percent of the scale from `-reach` to `reach`; without `reach`, of the
    scale from 0 to 1."""
    centre = finite(value)
    if centre is None:
        return None
    ends = [centre if end is None else end for end in interval(ci)]
    if reach:
        low, high, dot = (round(50 + 50 * max(-1.0, min(1.0, end / reach)), 2) for end in (*ends, centre))
    else:
        low, high, dot = (round(100 * max(0.0, min(1.0, end)), 2) for end in (*ends, centre))
    return low, high, dot


def judge_of(win_rate: Values) -> str:
    judge = section(win_rate, "judge")
    return str(judge.get("model") or judge.get("name") or "an unnamed judge")
