"""Held-out prompts before and after: what the rewards say about a completion of each."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np

from prefold.evaluation.paired import Floats, estimate, exchange_test, mean_interval
from prefold.rewards.scoring import Group


def compare_rewards(before: Sequence[Group], after: Sequence[Group], seed: int = 0) -> dict[str, Any]:
    """The content of `evaluation/rewards.json`.

    Compared are the prompts whose completions both have a reward: of several completions, their mean. Intervals are
    95 %, over prompts; null for a single one. The p-value is that of the paired permutation test: how often a mean
    difference as large comes about if before and after are exchanged at random within the prompts.
    """
    both = [(one, two) for one, two in zip(before, after, strict=True) if _known(one.rewards) and _known(two.rewards)]
    if not both:
        return {"prompts": 0}
    sides = {"before": [one for one, _ in both], "after": [two for _, two in both]}
    values = {when: np.array([fmean(_known(one.rewards)) for one in groups]) for when, groups in sides.items()}
    change = values["after"] - values["before"]
    return {
        "prompts": len(both),
        **{when: _one_model(groups, values[when]) for when, groups in sides.items()},
        "difference": {
            "reward": float(change.mean()),
            "ci": estimate(values["before"], values["after"]).interval(),
            "p_value": exchange_test(change, seed=seed),
        },
    }


def by_prompt(before: Sequence[Group], after: Sequence[Group]) -> list[dict[str, float | None]]:
    """The lines of `evaluation/heldout.jsonl`: the mean reward of each prompt; null where nothing is said."""
    return [{"before": _mean(one), "after": _mean(two)} for one, two in zip(before, after, strict=True)]


def _mean(group: Group) -> float | None:
    known = _known(group.rewards)
    return fmean(known) if known else None


def _one_model(groups: Sequence[Group], values: Floats) -> dict[str, Any]:
    completions = [one for group in groups for one in group.completions]
    said = {name: [value for group in groups for value in _known(group.scores[name])] for name in groups[0].scores}
    return {
        "reward": float(values.mean()),
        "reward_ci": mean_interval(values),
        "rewards": {name: fmean(values) for name, values in said.items() if values},
        "tokens": fmean(len(one.token_ids) for one in completions),
        "finished": fmean(one.finished for one in completions),
    }


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]
