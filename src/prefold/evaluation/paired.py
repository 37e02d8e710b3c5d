"""Two models on the same questions, pairs or prompts: one rule for estimate, interval, p-value and verdict.

A difference is shown where its p-value is below 0.05, and exactly then the interval leaves out 0: whatever the measure,
both come from one `Difference`. Coverage and agreement are tested by simulation in
`tests/unit/evaluation/test_intervals_cover.py` and `test_verdicts_agree.py`.

The p-value is the exact one of the sign-flip (permutation) test: how often a difference as large comes about if the two
models are exchanged at random, question by question, or cluster by cluster where questions belong together (those about
one passage). For right and wrong answers that is McNemar's exact test, and it is computed for any number of them. For
more than `FEW` other values it is Student's, which by then is the same.

The interval is Student's, with the jackknife's standard error over clusters. To right and wrong answers (differences of
-1, 0, 1 and halves) two imaginary ones are added, one each way, as by Bonett and Price (Journal of Educational and
Behavioral Statistics 37, 2012): with few answers that changed, Student's interval covers too rarely, and with none it
has no width. Where Student's test and the p-value disagree whether there is a difference, the standard error is the one
with which they agree (Miettinen's test-based limits, American Journal of Epidemiology 103, 1976).

Several comparisons are corrected together by Bonferroni, a correction that applies to intervals as well: p-values are
multiplied by the number of comparisons, and the intervals hold for all of them at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEVEL = 0.05
POWER = 0.8
FEW = 25
"""Most values other than right and wrong (zeros aside) for which the exact test is computed."""
_CELLS = 2**15
"""Steps that the sum of such values is divided into; the rounding does not show in a p-value."""


@dataclass(frozen=True)
class Difference:
    """A mean difference with its uncertainty.

    Args:
        mean: the difference that was measured.
        centre: of its interval; differs from `mean` only for right and wrong answers.
        error: standard error; infinite for a single observation.
        freedom: degrees of freedom of Student's distribution.
        moves: how much each independent observation, a cluster, contributes to the mean.
        largest: the mean cannot be beyond this; infinite if unknown.
        step: all of `moves` are multiples of it; None if they are arbitrary numbers.
        tests: number of comparisons that are corrected together.
    """

    mean: float
    centre: float
    error: float
    freedom: float
    moves: Floats
    largest: float = math.inf
    step: float | None = None
    tests: int = 1

    def among(self, tests: int) -> Difference:
        """The same difference as one of `tests` comparisons."""
        return replace(self, tests=tests)

    @property
    def units(self) -> int:
        return len(self.moves)

    @cached_property
    def alone(self) -> float:
        """The p-value before any correction; 1 where nothing can be said."""
        if not math.isfinite(self.error) or self.mean * self.centre <= 0:
            return 1.0
        if self.step is not None or np.count_nonzero(self.moves) <= FEW:
            return _exchanged(self.moves, self.step)
        return 2 * float(scipy.stats.t.sf(abs(self.centre) / self.error, self.freedom)) if self.error else 0.0

    @property
    def p_value(self) -> float:
        return min(1.0, self.tests * self.alone)

    @property
    def is_shown(self) -> bool:
        return self.p_value < LEVEL

    def interval(self) -> list[float] | None:
        """`[low, high]`, 95 % for all of the comparisons at once; None for a single observation."""
        if not math.isfinite(self.error):
            return None
        quantile = float(scipy.stats.t.isf(LEVEL / self.tests / 2, self.freedom))
        half = quantile * self.error
        if (half < abs(self.centre)) != self.is_shown and self.alone < 1:
            half = quantile * abs(self.centre) / float(scipy.stats.t.isf(self.alone / 2, self.freedom))
        low, high = self.centre - half, self.centre + half
        if not self.is_shown:  # to the last digit
            low, high = min(low, 0.0), max(high, 0.0)
        return [max(low, -self.largest), min(high, self.largest)]

    def detectable(self) -> float | None:
        """The smallest true difference that so many observations would show in 4 of 5 cases; None if they are too few
        to show any, because even full agreement would come about by chance too often."""
        level = LEVEL / self.tests
        needed = math.ceil(1 - math.log2(level))
        if self.units < needed or not math.isfinite(self.error):
            return None
        distance = scipy.stats.t.isf(level / 2, self.freedom) + scipy.stats.t.ppf(POWER, self.freedom)
        smallest = float(distance) * self.error
        if self.step is None:
            return smallest
        return min(self.largest, max(smallest, self.largest * needed / self.units))

    def facts(self, n: int, of: str = "question", shares: bool = True, higher_is_better: bool = True) -> dict[str, Any]:
        """The facts of a comparison, under the names that they have in all files of a run. `n`: how many of the unit
        `of` there are; `shares`: whether the difference is one of shares, which the verdict gives in points."""
        return {
            "difference": self.mean,
            "ci": self.interval(),
            "p_value": self.p_value,
            "tests": self.tests,
            "changed": int(np.count_nonzero(self.moves)),
            "detectable": self.detectable(),
            "verdict": self._in_words(n, of, shares, higher_is_better),
        }

    def _in_words(self, n: int, of: str, shares: bool, higher_is_better: bool) -> str:
        if self.is_shown:
            return "better" if (self.mean > 0) == higher_is_better else "worse"
        smallest = self.detectable()
        limits = ["all came out the same"] if n > 1 and not self.moves.any() else []
        if smallest is None:
            limits.append("too few to show any")
        elif smallest:
            in_words = f"{100 * smallest:.1f} points" if shares else f"{smallest:.3g}"
            limits.append(f"smallest one they could show: {in_words}")
        return f"no difference that {n:,} {of}{'' if n == 1 else 's'} can show ({'; '.join(limits)})"


def measured_facts(metric: str, unit: str, before: Floats, after: Floats, difference: Difference) -> dict[str, Any]:
    """The facts of a measure before and after, `[n]` values each, other than a task's: of pairs or prompts."""
    shares, n = metric != "reward", len(after)
    return {
        "metric": metric,
        "shares": shares,
        "before": float(before.mean()),
        "after": float(after.mean()),
        **difference.facts(n, unit, shares),
        "n": n,
        "unit": unit,
    }


def estimate(before: Floats, after: Floats, clusters: Sequence[str] | None = None) -> Difference:
    """The mean difference `after - before` of values `[n]`. `clusters`: the cluster of each question (unset: questions
    are independent)."""
    change = after - before
    numbers = np.arange(len(change)) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    sums: Floats = np.bincount(numbers, change).astype(np.float64)
    sizes = np.bincount(numbers).astype(np.int64)
    n, scale = len(change), _scale(before, after)
    mean, moves = float(change.mean()), sums / n
    if scale:
        sums, sizes = np.append(sums, (scale, -scale)), np.append(sizes, (1, 1))
    elif len(sums) < 2:
        return Difference(mean, mean, math.inf, 1.0, moves)
    total, observations = int(sizes.sum()), len(sums)
    centre = float(sums.sum()) / total
    moved = (sums - sizes * centre) / (total - sizes)  # by which the mean changes without that cluster
    error = math.sqrt((observations - 1) / observations * float((moved**2).sum()))
    largest = scale or (1.0 if are_shares(before, after) else math.inf)
    return Difference(mean, centre, error, observations - 1.0, moves, largest, scale / 2 / n if scale else None)


def weighted_mean(parts: Sequence[Difference], weights: Sequence[float]) -> Difference:
    """The weighted mean of independent differences; the degrees of freedom are Satterthwaite's."""
    if len(parts) == 1:
        return parts[0]
    variances = [(weight * part.error) ** 2 for part, weight in zip(parts, weights, strict=True)]
    error = math.sqrt(math.fsum(variances))
    known = [variance**2 / part.freedom for variance, part in zip(variances, parts, strict=True) if variance]
    return Difference(
        mean=math.fsum(weight * part.mean for part, weight in zip(parts, weights, strict=True)),
        centre=math.fsum(weight * part.centre for part, weight in zip(parts, weights, strict=True)),
        error=error,
        freedom=error**4 / math.fsum(known) if known and math.isfinite(error) else 1.0,
        moves=np.concatenate([weight * part.moves for part, weight in zip(parts, weights, strict=True)]),
        largest=math.fsum(weight * part.largest for part, weight in zip(parts, weights, strict=True)),
    )


def rate(wins: Floats, clusters: Sequence[str] | None = None, of: str = "prompt") -> dict[str, Any]:
    """The facts of a share of wins `[n]`, ties counted one half, against one half; `ci` is that of the share."""
    difference = beyond_half(wins, clusters)
    facts = difference.facts(difference.units, of)
    return facts | {"ci": facts["ci"] and [0.5 + end for end in facts["ci"]]}


def beyond_half(wins: Floats, clusters: Sequence[str] | None = None) -> Difference:
    """The difference of a share of wins `[n]`, ties counted one half, from one half."""
    twice = estimate(1 - wins, wins, clusters)
    return replace(
        twice,
        mean=twice.mean / 2,
        centre=twice.centre / 2,
        error=twice.error / 2,
        moves=twice.moves / 2,
        largest=0.5,
        step=twice.step and twice.step / 2,
    )


def are_shares(*values: Floats) -> bool:
    return all(bool(((side >= 0) & (side <= 1)).all()) for side in values)


def won(differences: Floats) -> Floats:
    """`[n]`: 1 where a difference is above 0, one half for a tie, else 0."""
    return (np.sign(differences) + 1) / 2


def wilson(shares: Floats, level: float = LEVEL) -> list[float]:
    """Wilson's interval of a mean of right and wrong, at `1 - level`."""
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(shares.sum(), len(shares), alpha=level, method="wilson")
    return [float(low), float(high)]


def mean_interval(values: Floats, level: float = LEVEL) -> list[float] | None:
    """Student's interval of the mean of one model, at `1 - level`; None for a single value."""
    if len(values) < 2:
        return None
    half = float(scipy.stats.t.isf(level / 2, len(values) - 1)) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return [float(values.mean()) - half, float(values.mean()) + half]


def _scale(before: Floats, after: Floats) -> float:
    """How far right is from wrong, if there are no other values (shares may also be one half); else 0."""
    pooled = np.concatenate([before, after])
    if are_shares(pooled):
        return float(np.isin(pooled, (0, 0.5, 1)).all())
    return float(np.ptp(pooled)) if len(before) > 2 and len(np.unique(pooled)) == 2 else 0.0


def _exchanged(moves: Floats, step: float | None) -> float:
    """The exact p-value of the sign-flip test. Values without a common step are rounded to `_CELLS` steps."""
    steps = np.rint(moves / (step or float(np.abs(moves).sum()) / _CELLS)).astype(np.int64)
    probabilities = np.ones(1)  # of the sums -total, -total + 2, ..., total
    for size in np.abs(steps[steps != 0]).tolist():
        flipped = np.zeros(len(probabilities) + size)
        flipped[: len(probabilities)] = probabilities / 2
        flipped[size:] += probabilities / 2
        probabilities = flipped
    beyond = (len(probabilities) - 1 - abs(int(steps.sum()))) // 2
    return min(1.0, 2 * float(probabilities[: beyond + 1].sum()))
