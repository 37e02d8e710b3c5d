"""What a model wrote while it trained on its own completions: the best and the worst by their rewards, so that a reward
that is being gamed is seen."""

from __future__ import annotations

from prefold.reports.numbers import finite
from prefold.reports.run_files import RunRecord, Values, objects


def sampled(run: RunRecord) -> list[tuple[Values, Values, Values]]:
    """Of the first, a middle and the last step that was recorded, a group whose rewards differ if there is one, with
    its worst and its best completion."""
    by_step: dict[str, list[Values]] = {}
    for group in run.rollouts:
        if len(_judged(group)) > 1:
            by_step.setdefault(str(group.get("step")), []).append(group)
    steps = list(by_step.values())
    shown = dict.fromkeys((0, len(steps) // 2, len(steps) - 1)) if steps else {}
    groups = [max(steps[index], key=_spread) for index in shown]
    return [(group, _judged(group)[0], _judged(group)[-1]) for group in groups]


def _spread(group: Values) -> float:
    judged = _judged(group)
    return float(judged[-1]["reward"]) - float(judged[0]["reward"])


def _judged(group: Values) -> list[Values]:
    """The completions that a reward says something about, the worst first."""
    judged = [
        completion for completion in objects(group.get("completions")) if finite(completion.get("reward")) is not None
    ]
    return sorted(judged, key=lambda completion: float(completion["reward"]))
