"""What a model wrote while it trained on its own completions: the best and the worst by reward, which shows whether the
reward is being gamed."""

from __future__ import annotations

from prefold.reports.numbers import finite
from prefold.reports.run_files import RunRecord, Values, objects


def sampled(run: RunRecord) -> list[tuple[Values, Values, Values]]:
    """For the first, the middle and the last recorded step, the group whose rewards differ most, with its worst and its
    best completion."""
    by_step: dict[str, list[tuple[Values, Values, Values]]] = {}
    for group in run.rollouts:
        completions = objects(group.get("completions"))
        judged = [completion for completion in completions if finite(completion.get("reward")) is not None]
        if len(judged) > 1:
            judged.sort(key=lambda completion: float(completion["reward"]))
            by_step.setdefault(str(group.get("step")), []).append((group, judged[0], judged[-1]))
    steps = list(by_step.values())
    shown = dict.fromkeys((0, len(steps) // 2, len(steps) - 1)) if steps else {}
    return [max(steps[index], key=lambda row: float(row[2]["reward"]) - float(row[1]["reward"])) for index in shown]
