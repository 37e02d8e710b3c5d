"""The best of many runs that were measured on the same held-out pairs or prompts, and how far to trust it.

The highest of many numbers owes something to luck. Three results take that into account:

- intervals that contain the true values of all runs at once in 95 % of all cases (Bonferroni), and so that of whichever
  run is chosen;
- paired comparisons with the highest run, corrected for all comparisons of two: a difference that they show holds
  although the same data chose the run;
- by how much the best of so many runs would be too high on average if all of them were equally good (`luck`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import scipy

from prefold.evaluation.paired import LEVEL, Floats, estimate, mean_interval, wilson


def best_of_many(values: Mapping[str, Floats], of: str = "pair") -> dict[str, Any]:
    """Rank runs by their means.

    Args:
        values: `[n]` values of each run, one for each held-out pair or prompt, in the same order for all runs.
        of: what each value is of, `pair` or `prompt`.

    Returns:
        `{"best": NAME, "tied": the NAMEs that share the highest mean, "as_good": the further NAMEs that cannot be told
        from the highest, "luck": as `luck`, "runs": {NAME: {"after_ci_of_all": [low, high], "to_best": as
        `Difference.facts`}}}`. If several share the highest mean, `best` is null. `to_best` is null for the highest; if
        there are several, the difference is to the one with the largest p-value.
    """
    means = {name: float(scores.mean()) for name, scores in values.items()}
    # Sums of the same numbers in another order differ in the last digits.
    tied = [
        name for name, mean in means.items() if math.isclose(mean, max(means.values()), rel_tol=1e-12, abs_tol=1e-12)
    ]
    pairs = math.comb(len(values), 2)
    behind = {
        name: max((estimate(values[top], values[name]).among(pairs) for top in tied), key=lambda gap: gap.p_value)
        for name in values
        if name not in tied
    }
    to_best = {name: gap.facts(gap.units, of, shares=of == "pair") for name, gap in behind.items()}
    return {
        "best": tied[0] if len(tied) == 1 else None,
        "tied": tied if len(tied) > 1 else [],
        "as_good": [name for name, gap in behind.items() if not gap.is_shown],
        "luck": luck(np.stack(list(values.values()))),
        "runs": {
            name: {"after_ci_of_all": _interval(scores, LEVEL / len(values)), "to_best": to_best.get(name)}
            for name, scores in values.items()
        },
    }


def luck(values: Floats) -> float:
    """How far the best mean of `[runs, n]` values lies above the truth on average, if all runs are equally good.

    What a pair does to all runs alike favours none of them. A run's own error is the residual of a two-way layout: the
    values minus the mean of their pair and that of their run.
    """
    runs, units = values.shape
    if min(runs, units) < 2:
        return 0.0
    own = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    variance = float((own**2).sum()) / ((runs - 1) * (units - 1))
    return expected_largest(runs) * math.sqrt(variance / units)


@cache
def expected_largest(number: int) -> float:
    """The expected value of the largest of `number` independent standard normal values."""
    norm = scipy.stats.norm
    mean, _ = scipy.integrate.quad(lambda x: 1 - norm.cdf(x) ** number - norm.sf(x) ** number, 0, math.inf)
    return float(mean)


def _interval(values: Floats, level: float) -> list[float] | None:
    """The interval of a mean, at `1 - level`: Wilson's for right and wrong, as in `held_out_pairs.py`, else
    Student's."""
    if np.isin(values, (0, 0.5, 1)).all():
        return wilson(values, level)
    return mean_interval(values, level)
