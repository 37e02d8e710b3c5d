"""Two models on the same tasks, question by question: what got better, what got worse, and how sure that is.

Interval, p-value and verdict are those of `paired`, corrected for all tasks at once. A group of tasks counts as one in
that correction and in the average, as on leaderboards; the tasks inside a group are corrected among themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefold.evaluation.paired import Difference, Floats, are_shares, estimate, weighted_mean
from prefold.evaluation.scores import TaskScores

FLIPPED_SHOWN = 5
"""Flipped questions that are kept with their texts, for each task and direction."""
Marks = NDArray[np.bool_]


@dataclass(frozen=True)
class _Task:
    """A task as both models answered it: the questions that both were asked, with their scores."""

    scores: TaskScores
    other: TaskScores
    questions: list[tuple[int, int]]
    """The index of each in `scores` and in `other`."""
    before: Floats
    after: Floats
    difference: Difference
    contaminated: Marks | None
    """Questions that either model was trained on; None where no training data is known."""

    @property
    def shares(self) -> bool:
        """Whether its score is a share, so that it can be averaged with others."""
        return are_shares(self.before, self.after)

    @property
    def averaged(self) -> bool:
        return self.shares and self.scores.higher_is_better

    def among(self, tests: int) -> _Task:
        return replace(self, difference=self.difference.among(tests))


def compare_tasks(before: Sequence[TaskScores], after: Sequence[TaskScores]) -> dict[str, Any]:
    """The content of `evaluation/tasks.json`.

    `tasks` has an entry for each task that both models were measured on in the same way, `groups` one for each group
    of several tasks, `average` is over all of them (`suites`: over those of each suite, where there are several), a
    group counting once. `left_out` names the tasks that cannot be compared, with the reason.

    A difference is `after - before`. `ci` and `p_value` are corrected for the number of `tests` made together; `ci` is
    null for a single question whose score is not right or wrong. `fixed` and `broken` count answers that became right
    and wrong; they are null for other scores. `contaminated` are the questions that occur in the training data of
    either model, `clean` all others, each set compared by itself; null where no training data is known.
    """
    tasks, left_out = _matched(before, after)
    groups = _groups(tasks)
    several = {name: [tasks[member] for member in members] for name, members in groups.items() if len(members) > 1}
    means = {
        name: weighted_mean([task.difference for task in members], [1 / len(members)] * len(members))
        for name, members in several.items()
    }
    together = dict.fromkeys(tasks, len(groups))
    together |= {name: len(members) for members in groups.values() if len(members) > 1 for name in members}
    result: dict[str, Any] = {
        "tasks": {name: _facts(task.among(together[name])) for name, task in tasks.items()},
        "groups": {
            name: _group_facts(groups[name], members, means[name].among(len(groups)))
            for name, members in several.items()
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
    left_out = dict.fromkeys(sorted(first.keys() ^ second.keys()), "only one of the models was measured on it")
    both = {name: _paired(task, second[name]) for name, task in first.items() if name in second}
    left_out |= {name: reason for name, reason in both.items() if isinstance(reason, str)}
    return {name: task for name, task in both.items() if not isinstance(task, str)}, left_out


def _named(scores: Sequence[TaskScores]) -> dict[str, TaskScores]:
    """Scores by the task's name; if several have the same name, with suite and number of examples."""
    counts = Counter(task.task for task in scores)
    return {
        task.task if counts[task.task] == 1 else f"{task.task} ({task.suite or 'alone'}, {task.num_fewshot}-shot)": task
        for task in scores
    }


def _paired(before: TaskScores, after: TaskScores) -> _Task | str:
    """The task, or why it cannot be compared."""
    for field, words in (("version", "version"), ("metric", "metric"), ("num_fewshot", "number of examples")):
        if getattr(before, field) != getattr(after, field):
            return f"the {words} differs: {getattr(before, field)} and {getattr(after, field)}"
    questions = [
        (here, there)
        for here, there in _same_questions(before.questions, after.questions)
        if np.isfinite((before.values[here], after.values[there])).all()
    ]
    if not questions:
        return "the models have no question in common"
    first = np.array([before.values[here] for here, _ in questions], dtype=float)
    second = np.array([after.values[there] for _, there in questions], dtype=float)
    clusters = [before.clusters[here] for here, _ in questions]
    marks = [
        [side.contaminated[index] for index in column]
        for side, column in zip((before, after), zip(*questions, strict=True), strict=True)
        if side.contaminated is not None
    ]
    contaminated: Marks | None = np.logical_or.reduce(np.array(marks, dtype=np.bool_), axis=0) if marks else None
    return _Task(before, after, questions, first, second, estimate(first, second, clusters), contaminated)


def _same_questions(first: Sequence[str], second: Sequence[str]) -> Iterator[tuple[int, int]]:
    """The indices of each question in both; questions that occur several times are matched in order."""
    waiting: dict[str, list[int]] = {}
    for index, key in reversed(list(enumerate(second))):
        waiting.setdefault(key, []).append(index)
    for index, key in enumerate(first):
        if waiting.get(key):
            yield index, waiting[key].pop()


# ---- one task ---------------------------------------------------------------------------------------------------


def _facts(task: _Task) -> dict[str, Any]:
    scores, n, marks = task.scores, len(task.before), task.contaminated
    gain = (task.after - task.before) * (1 if scores.higher_is_better else -1)
    right_or_wrong = bool(np.isin(np.concatenate([task.before, task.after]), (0, 1)).all())
    flips = {"fixed": gain > 0, "broken": gain < 0} if right_or_wrong else {}
    return {
        **{name: getattr(scores, name) for name in ("metric", "suite", "group", "num_fewshot", "version")},
        "higher_is_better": scores.higher_is_better,
        "shares": task.shares,
        "before": float(task.before.mean()),
        "after": float(task.after.mean()),
        **task.difference.facts(n, shares=task.shares, higher_is_better=scores.higher_is_better),
        "n": n,
        "asked": [len(scores.questions), len(task.other.questions)],
        "clusters": task.difference.units,
        "fixed": int(flips["fixed"].sum()) if flips else None,
        "broken": int(flips["broken"].sum()) if flips else None,
        "flipped": {name: _texts(task, flips[name]) if flips else [] for name in ("fixed", "broken")},
        "contaminated": None if marks is None else _some_questions(task, marks),
        "clean": None if marks is None else _some_questions(task, ~marks),
    }


def _some_questions(task: _Task, marks: Marks) -> dict[str, Any]:
    """The comparison on the marked questions alone."""
    chosen = np.flatnonzero(marks)
    if not len(chosen):
        return {"n": 0}
    before, after = task.before[chosen], task.after[chosen]
    clusters = [task.scores.clusters[task.questions[index][0]] for index in chosen]
    difference = estimate(before, after, clusters).among(task.difference.tests)
    facts = difference.facts(len(chosen), shares=task.shares, higher_is_better=task.scores.higher_is_better)
    return {"n": len(chosen), "before": float(before.mean()), "after": float(after.mean()), **facts}


def _texts(task: _Task, marks: Marks) -> list[dict[str, str]]:
    """The first marked questions, as a person reads them."""
    first, second, shown = task.scores, task.other, []
    for here, there in (task.questions[index] for index in np.flatnonzero(marks)[:FLIPPED_SHOWN]):
        answers = {"before": first.answers[here], "after": second.answers[there]}
        shown.append({"question": first.texts[here], **answers, "target": first.targets[here]})
    return shown


# ---- several tasks ----------------------------------------------------------------------------------------------


def _groups(tasks: dict[str, _Task]) -> dict[str, list[str]]:
    """Names of tasks by their group; a task that is in none, or cannot be averaged, is a group of its own."""
    by_group: dict[tuple[str | None, str], list[str]] = {}
    for name, task in tasks.items():
        group = task.scores.group if task.averaged else None
        by_group.setdefault((task.scores.suite, group or name), []).append(name)
    taken = Counter(group for _, group in by_group)
    groups: dict[str, list[str]] = {}
    for (suite, group), members in by_group.items():
        label = group if taken[group] == 1 else f"{group} ({suite or 'alone'})"
        groups[label if len(members) > 1 else members[0]] = members
    return groups


def _group_facts(members: Sequence[str], tasks: Sequence[_Task], mean: Difference) -> dict[str, Any]:
    n = sum(len(task.before) for task in tasks)
    return {
        "suite": tasks[0].scores.suite,
        "members": list(members),
        "before": fmean(float(task.before.mean()) for task in tasks),
        "after": fmean(float(task.after.mean()) for task in tasks),
        **mean.facts(n),
        "n": n,
    }


def _average(tasks: dict[str, _Task], groups: dict[str, list[str]]) -> dict[str, Any]:
    """The average of scores that are shares and better if higher: over the tasks of a group, then over groups."""
    members = [[tasks[name] for name in names if tasks[name].averaged] for names in groups.values()]
    members = [of_group for of_group in members if of_group]
    if not members:
        return {"tasks": 0}
    weighted = [(task, 1 / len(of_group) / len(members)) for of_group in members for task in of_group]
    mean = weighted_mean([task.difference for task, _ in weighted], [weight for _, weight in weighted])
    n = sum(len(task.before) for task, _ in weighted)
    return {
        "tasks": len(weighted),
        "groups": len(members),
        "before": sum(weight * float(task.before.mean()) for task, weight in weighted),
        "after": sum(weight * float(task.after.mean()) for task, weight in weighted),
        **mean.facts(n),
        "n": n,
    }
