"""Held-out prompts before and after: what the rewards say about a completion of each."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, permutation_test

from prefold.rollouts.completions import Group

Floats = NDArray[np.float64]

RESAMPLES = 10_000


def compare_rewards(before: Sequence[Group], after: Sequence[Group], seed: int = 0) -> dict[str, Any]:
    """The content of `evaluation/rewards.json`.

    Compared are the prompts whose completions both have a reward: of several completions, their mean. Intervals are
    95 %, the percentile bootstrap over prompts (10,000 resamples), for the difference over its pairs. The p-value is
    that of the paired permutation test: how often a mean difference as large comes about if before and after are
    exchanged at random within the prompts.
    """
    both = [(one, two) for one, two in zip(before, after, strict=True) if _known(one.rewards) and _known(two.rewards)]
    if not both:
        return {"prompts": 0}
    sides = {"before": [one for one, _ in both], "after": [two for _, two in both]}
    values = {when: np.array([fmean(_known(one.rewards)) for one in groups]) for when, groups in sides.items()}
    change = values["after"] - values["before"]
    return {
        "prompts": len(both),
        **{when: _one_model(groups, values[when], seed) for when, groups in sides.items()},
        "difference": {
            "reward": float(change.mean()),
            "ci": _interval(change, seed),
            "p_value": _permutation_test(change, seed),
        },
    }


def _one_model(groups: Sequence[Group], values: Floats, seed: int) -> dict[str, Any]:
    completions = [one for group in groups for one in group.completions]
    said = {name: [value for group in groups for value in _known(group.scores[name])] for name in groups[0].scores}
    return {
        "reward": float(values.mean()),
        "reward_ci": _interval(values, seed),
        "rewards": {name: fmean(values) for name, values in said.items() if values},
        "tokens": fmean(len(one.token_ids) for one in completions),
        "finished": fmean(one.finished for one in completions),
    }


def _interval(values: Floats, seed: int) -> list[float]:
    if np.ptp(values) == 0:  # every resample is the same: the bootstrap has nothing to say
        return [float(values[0]), float(values[0])]
    generator = np.random.default_rng(seed)
    found = bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=generator, batch=1000)
    return [float(found.confidence_interval.low), float(found.confidence_interval.high)]


def _permutation_test(change: Floats, seed: int) -> float:
    """Of the mean of paired differences: exchanging a pair turns its sign."""
    if len(change) < 2:  # both signs are as large
        return 1.0
    generator = np.random.default_rng(seed)
    found = permutation_test(
        (change,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=1000,
        rng=generator,
    )
    return float(found.pvalue)


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]
