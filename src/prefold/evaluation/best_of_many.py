"""The best of many runs that were measured on the same held-out pairs or prompts, and how far to believe it.

Who takes the highest of many numbers takes luck along with skill. Three things are said about that:

- intervals that hold the truth of all runs at once in 95 % of all cases (Bonferroni), and so of whichever is taken;
- every two runs are compared pair by pair, corrected for all comparisons of two: what is left of the difference to the
  best one holds although the same numbers chose it;
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
        values: of each run `[n]`, one for each held-out pair or prompt, in the same order for all runs.
        of: what they are of, a pair or a prompt.

    Returns:
        `{"best": NAME, "tied": the NAMEs that share the highest mean, "as_good": the NAMEs that cannot be told from the
        highest beside those, "luck": as `luck`, "runs": {NAME: {"after_ci_of_all": [low, high], "to_best": as
        `Difference.facts`}}}`. Of several that are equal none is the best: `best` is null. `to_best` is null for the
        highest; of several highest ones it is to the one with the larger p-value.
    """
    means = {name: float(scores.mean()) for name, scores in values.items()}
    # Sums of the same numbers in another order differ in the last digits.
    tied = [
        name for name, mean in means.items() if math.isclose(mean, max(means.values()), rel_tol=1e-12, abs_tol=1e-12)
    ]
    pairs = math.comb(len(values), 2)
    behind = {
        name: max((estimate(values[top], values[name]).among(pairs) for top in tied), key=lambda two: two.p_value)
        for name in values
        if name not in tied
    }
    to_best = {name: two.facts(two.units, of, shares=of == "pair") for name, two in behind.items()}
    return {
        "best": tied[0] if len(tied) == 1 else None,
        "tied": tied if len(tied) > 1 else [],
        "as_good": [name for name, two in behind.items() if not two.is_shown],
        "luck": luck(np.stack(list(values.values()))),
        "runs": {
            name: {"after_ci_of_all": _interval(scores, LEVEL / len(values)), "to_best": to_best.get(name)}
            for name, scores in values.items()
        },
    }


def luck(values: Floats) -> float:
    """How far the best mean of `[runs, n]` values lies above the truth on average, if all runs are equally good.

    What a pair does to all runs alike moves no run before another. The error of a run's own is what a two-way layout
    leaves: the values without the mean of their pair and that of their run.
    """
    runs, units = values.shape
    if min(runs, units) < 2:
        return 0.0
    own = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    variance = float((own**2).sum()) / ((runs - 1) * (units - 1))
    return expected_largest(runs) * math.sqrt(variance / units)


@cache
def expected_largest(number: int) -> float:
    """The mean of the largest of so many independent standard normal values."""
    norm = scipy.stats.norm
    mean, _ = scipy.integrate.quad(lambda x: 1 - norm.cdf(x) ** number - norm.sf(x) ** number, 0, math.inf)
    return float(mean)


def _interval(values: Floats, level: float) -> list[float] | None:
    """Of a mean, at `1 - level`: Wilson's for right and wrong, as in `held_out_pairs.py`, else Student's."""
    if np.isin(values, (0, 0.5, 1)).all():
        return wilson(values, level)
    return mean_interval(values, level)
