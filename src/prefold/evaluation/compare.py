"""Two models on the same tasks, question by question: what got better, what got worse, and how sure that is.

A task whose questions are right or wrong is tested by McNemar's exact test; where questions share a passage, or the
metric is another number, by exchanging the two models at random. The p-values of several tasks are corrected together
(Holm, 1979), and what is left of them gives the verdict. The tasks of a group count as one in that, and as one in
the average, as the leaderboards have it; the tasks inside of a group are corrected among themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from statsmodels.stats.multitest import multipletests

from prefold.evaluation.paired import LEVEL, Estimate, Floats, are_shares, estimate, paired_test, weighted_mean
from prefold.evaluation.scores import TaskScores

FLIPPED_SHOWN = 5
"""Questions that are kept with their texts, of each direction and task."""


@dataclass(frozen=True)
class _Task:
    """A task as both models answered it: the questions that both of them have, with what each scored."""

    scores: TaskScores
    other: TaskScores
    places: list[tuple[int, int]]
    before: Floats
    after: Floats
    found: Estimate
    p_value: float
    contaminated: NDArray[np.bool_] | None
    """Questions that either model was trained on; None where no training data is known."""

    @property
    def shares(self) -> bool:
        """Whether its score is a share, so that it can stand in an average with others."""
        return are_shares(self.before, self.after)

    @property
    def averaged(self) -> bool:
        return self.shares and self.scores.higher_is_better


def compare_tasks(before: Sequence[TaskScores], after: Sequence[TaskScores]) -> dict[str, Any]:
    """The content of `evaluation/tasks.json`.

    `tasks` has an entry for each task that both models were measured on in the same way, `groups` one for each group
    of several tasks, `average` is over all of them (`suites`: over those of each suite, where there are several), a
    group counting once. `left_out` names the tasks that cannot be compared, with the reason.

    A difference is `after - before`. `ci` is its 95 % interval, null for a single question whose score is not right or
    wrong. `fixed` and `broken` count answers that became right and wrong; they are null for other scores.
    `contaminated` are the questions that stand in the training data of either model, `clean` all others, each set
    compared by itself; null where no training data is known.
    """
    tasks, left_out = _matched(before, after)
    groups = _groups(tasks)
    several = {name: [tasks[member] for member in members] for name, members in groups.items() if len(members) > 1}
    means = {name: _mean_of(members) for name, members in several.items()}
    adjusted = _adjusted(tasks, groups, means)
    result: dict[str, Any] = {
        "tasks": {name: _facts(task, *adjusted[name]) for name, task in tasks.items()},
        "groups": {
            name: _group_facts(groups[name], members, means[name], *adjusted[name]) for name, members in several.items()
        },
        "average": _average(tasks, groups),
    }
    suites = list(dict.fromkeys(task.scores.suite for task in tasks.values()))
    if len(suites) > 1:
        for suite in filter(None, suites):
            within = {name: task for name, task in tasks.items() if task.scores.suite == suite}
            result.setdefault("suites", {})[suite] = _average(within, _groups(within))
    return result | ({"left_out": left_out} if left_out else {})


# ---- the same tasks and questions -------------------------------------------------------------------------------


def _matched(before: Sequence[TaskScores], after: Sequence[TaskScores]) -> tuple[dict[str, _Task], dict[str, str]]:
    first, second = _named(before), _named(after)
    tasks: dict[str, _Task] = {}
    left_out = dict.fromkeys(sorted(first.keys() ^ second.keys()), "only one of the models was measured on it")
    for name in first:
        if name in second:
            task = _paired(first[name], second[name])
            if isinstance(task, str):
                left_out[name] = task
            else:
                tasks[name] = task
    return tasks, left_out


def _named(scores: Sequence[TaskScores]) -> dict[str, TaskScores]:
    """By the task's name, with what tells them apart where several have it."""
    counts = Counter(one.task for one in scores)
    return {
        one.task if counts[one.task] == 1 else f"{one.task} ({one.suite or 'alone'}, {one.num_fewshot}-shot)": one
        for one in scores
    }


def _paired(before: TaskScores, after: TaskScores) -> _Task | str:
    """The task, or why it cannot be compared."""
    for field, words in (("version", "version"), ("metric", "metric"), ("num_fewshot", "number of examples")):
        one, other = getattr(before, field), getattr(after, field)
        if one != other:
            return f"the {words} differs: {one} and {other}"
    places = [
        (here, there)
        for here, there in _same_questions(before.questions, after.questions)
        if np.isfinite((before.values[here], after.values[there])).all()
    ]
    if not places:
        return "the models have no question in common"
    first = np.array([before.values[here] for here, _ in places], dtype=float)
    second = np.array([after.values[there] for _, there in places], dtype=float)
    clusters = [before.clusters[here] for here, _ in places]
    found, p_value = estimate(first, second, clusters), paired_test(second - first, clusters)
    return _Task(before, after, places, first, second, found, p_value, _trained_on(before, after, places))


def _trained_on(before: TaskScores, after: TaskScores, places: Sequence[tuple[int, int]]) -> NDArray[np.bool_] | None:
    marks = [
        [side.contaminated[place[which]] for place in places]
        for which, side in enumerate((before, after))
        if side.contaminated is not None
    ]
    if not marks:
        return None
    found: NDArray[np.bool_] = np.logical_or.reduce(np.array(marks, dtype=np.bool_))
    return found


def _same_questions(first: Sequence[str], second: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Places of the same question in both; of a question that is there twice, the first with the first."""
    waiting: dict[str, list[int]] = {}
    for place, key in reversed(list(enumerate(second))):
        waiting.setdefault(key, []).append(place)
    for place, key in enumerate(first):
        if waiting.get(key):
            yield place, waiting[key].pop()


# ---- one task ---------------------------------------------------------------------------------------------------


def _facts(task: _Task, p_adjusted: float, tests: int) -> dict[str, Any]:
    scores, n = task.scores, len(task.before)
    gain = (task.after - task.before) * (1 if scores.higher_is_better else -1)
    right_or_wrong = bool(np.isin(np.concatenate([task.before, task.after]), (0, 1)).all())
    detectable = task.found.detectable(LEVEL / tests)
    return {
        "metric": scores.metric,
        "suite": scores.suite,
        "group": scores.group,
        "num_fewshot": scores.num_fewshot,
        "version": scores.version,
        "higher_is_better": scores.higher_is_better,
        "shares": task.shares,
        "before": float(task.before.mean()),
        "after": float(task.after.mean()),
        "difference": task.found.mean,
        "ci": task.found.interval(),
        "p_value": task.p_value,
        "p_adjusted": p_adjusted,
        "n": n,
        "clusters": task.found.units,
        "detectable": detectable,
        "verdict": verdict(float(gain.mean()), p_adjusted, detectable, n, task.shares),
        "fixed": int((gain > 0).sum()) if right_or_wrong else None,
        "broken": int((gain < 0).sum()) if right_or_wrong else None,
        "flipped": {
            "fixed": _flipped(task, gain > 0) if right_or_wrong else [],
            "broken": _flipped(task, gain < 0) if right_or_wrong else [],
        },
        **_apart(task),
    }


def _apart(task: _Task) -> dict[str, Any]:
    if task.contaminated is None:
        return {"contaminated": None, "clean": None}
    return {"contaminated": _part(task, task.contaminated), "clean": _part(task, ~task.contaminated)}


def _part(task: _Task, which: NDArray[np.bool_]) -> dict[str, Any]:
    """Some of the questions by themselves."""
    chosen = np.flatnonzero(which)
    if not len(chosen):
        return {"n": 0}
    before, after = task.before[chosen], task.after[chosen]
    clusters = [task.scores.clusters[task.places[place][0]] for place in chosen]
    found = estimate(before, after, clusters)
    return {
        "n": len(chosen),
        "before": float(before.mean()),
        "after": float(after.mean()),
        "difference": found.mean,
        "ci": found.interval(),
        "p_value": paired_test(after - before, clusters),
    }


def verdict(
    gain: float, p_adjusted: float, detectable: float | None, n: int, shares: bool = True, of: str = "question"
) -> str:
    """In words.

    Args:
        gain: the difference, above 0 where it is one for the better.
        detectable: the smallest difference that could have been shown, if there is one.
        n: how many were compared, and `of` what.
        shares: whether the score is a share, whose differences are points.
    """
    if p_adjusted < LEVEL and gain:
        return "better" if gain > 0 else "worse"
    of_what = f"{n} {of}" if n == 1 else f"{n:,} {of}s"
    if detectable is None:
        return f"no difference that {of_what} can show (too few to show any)"
    smallest = f"{100 * detectable:.1f} points" if shares else f"{detectable:.3g}"
    return f"no difference that {of_what} can show (smallest one they could show: {smallest})"


def _flipped(task: _Task, which: Any) -> list[dict[str, str]]:
    """The first ones, as a person reads them."""
    chosen = [task.places[place] for place in np.flatnonzero(which)[:FLIPPED_SHOWN]]
    return [
        {
            "question": task.scores.texts[here],
            "before": task.scores.answers[here],
            "after": task.other.answers[there],
            "target": task.scores.targets[here],
        }
        for here, there in chosen
    ]


# ---- several tasks ----------------------------------------------------------------------------------------------


def _groups(tasks: dict[str, _Task]) -> dict[str, list[str]]:
    """Names of tasks by their group, of which the average is taken; any other task is a group of itself."""
    found: dict[tuple[str | None, str], list[str]] = {}
    for name, task in tasks.items():
        group = task.scores.group if task.averaged else None
        found.setdefault((task.scores.suite, group or name), []).append(name)
    taken = Counter(group for _, group in found)
    groups: dict[str, list[str]] = {}
    for (suite, group), members in found.items():
        label = group if taken[group] == 1 else f"{group} ({suite or 'alone'})"
        groups[label if len(members) > 1 else members[0]] = members
    return groups


def _adjusted(
    tasks: dict[str, _Task], groups: dict[str, list[str]], means: dict[str, Estimate]
) -> dict[str, tuple[float, int]]:
    """For each task and group its p-value after the correction, and how many were corrected together."""
    found = _holm({name: means[name].p_value() if name in means else tasks[name].p_value for name in groups})
    for group in means:
        found |= _holm({name: tasks[name].p_value for name in groups[group]})
    return found


def _holm(p_values: dict[str, float]) -> dict[str, tuple[float, int]]:
    if len(p_values) < 2:
        return {name: (value, 1) for name, value in p_values.items()}
    adjusted = multipletests(list(p_values.values()), method="holm")[1]
    return {name: (float(value), len(p_values)) for name, value in zip(p_values, adjusted, strict=True)}


def _mean_of(tasks: Sequence[_Task]) -> Estimate:
    """Each task counts the same."""
    return weighted_mean([task.found for task in tasks], [1 / len(tasks)] * len(tasks))


def _group_facts(
    members: Sequence[str], tasks: Sequence[_Task], found: Estimate, p_adjusted: float, tests: int
) -> dict[str, Any]:
    n, detectable = sum(len(task.before) for task in tasks), found.detectable(LEVEL / tests)
    return {
        "suite": tasks[0].scores.suite,
        "members": list(members),
        "before": fmean(float(task.before.mean()) for task in tasks),
        "after": fmean(float(task.after.mean()) for task in tasks),
        "difference": found.mean,
        "ci": found.interval(),
        "p_value": found.p_value(),
        "p_adjusted": p_adjusted,
        "n": n,
        "detectable": detectable,
        "verdict": verdict(found.mean, p_adjusted, detectable, n),
    }


def _average(tasks: dict[str, _Task], groups: dict[str, list[str]]) -> dict[str, Any]:
    """Over the scores that are shares of which more is better: of the tasks in a group, then of the groups."""
    members = [[tasks[name] for name in names if tasks[name].averaged] for names in groups.values()]
    members = [of_group for of_group in members if of_group]
    if not members:
        return {"tasks": 0}
    weighted = [(task, 1 / len(of_group) / len(members)) for of_group in members for task in of_group]
    found = weighted_mean([task.found for task, _ in weighted], [weight for _, weight in weighted])
    return {
        "tasks": len(weighted),
        "groups": len(members),
        "before": sum(weight * float(task.before.mean()) for task, weight in weighted),
        "after": sum(weight * float(task.after.mean()) for task, weight in weighted),
        "difference": found.mean,
        "ci": found.interval(),
        "p_value": found.p_value() if len(weighted) > 1 else weighted[0][0].p_value,
        "n": sum(len(task.before) for task, _ in weighted),
    }
