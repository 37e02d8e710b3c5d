"""Held-out prompts before and after: the rewards of the completions of each."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np

from prefold.evaluation.paired import Floats, estimate, mean_interval
from prefold.rewards.scoring import Group


def compare_rewards(before: Sequence[Group], after: Sequence[Group]) -> dict[str, Any]:
    """The content of `evaluation/rewards.json`.

    The prompts that have a reward before and after are compared; several completions of a prompt count by their mean.
    Intervals are 95 %, over prompts; null for a single one.
    """
    known = [both for both in zip(before, after, strict=True) if None not in map(_mean, both)]
    if not known:
        return {"prompts": 0}
    first, second = zip(*known, strict=True)
    was, became = (np.array([_mean(group) for group in side], dtype=float) for side in (first, second))
    facts = estimate(was, became).facts(len(known), "prompt", shares=False)
    return {
        "prompts": len(known),
        "before": _one_model(first, was),
        "after": _one_model(second, became),
        "difference": {"reward": facts.pop("difference"), **facts},
    }


def by_prompt(keys: Sequence[str], before: Sequence[Group], after: Sequence[Group]) -> list[dict[str, Any]]:
    """The lines of `evaluation/heldout.jsonl`: the mean reward of each prompt, null if it has none, and its first
    completion. `keys`: the same for the same prompt in every run."""
    return [
        {
            "key": key,
            "before": _mean(first),
            "after": _mean(second),
            "row": str(first.prompt.origin),
            "prompt": list(first.prompt.prompt),
            "answer_before": first.completions[0].text,
            "answer_after": second.completions[0].text,
        }
        for key, first, second in zip(keys, before, after, strict=True)
    ]


def _mean(group: Group) -> float | None:
    known = _known(group.rewards)
    return fmean(known) if known else None


def _one_model(groups: Sequence[Group], values: Floats) -> dict[str, Any]:
    completions = [completion for group in groups for completion in group.completions]
    scores = {name: [value for group in groups for value in _known(group.scores[name])] for name in groups[0].scores}
    return {
        "reward": float(values.mean()),
        "reward_ci": mean_interval(values),
        "rewards": {name: fmean(values) for name, values in scores.items() if values},
        "tokens": fmean(len(completion.token_ids) for completion in completions),
        "finished": fmean(completion.finished for completion in completions),
    }


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]
