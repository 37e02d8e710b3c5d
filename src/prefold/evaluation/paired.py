"""Two models on the same questions, pairs or prompts: the interval of their mean difference, and tests of it.

The one place for the statistics of whatever is compared. What they promise is held by simulation in
`tests/unit/evaluation/test_intervals_cover.py`: 95 % intervals hold the truth in 93 to 97 % of all repeats.

The interval is Student's with the jackknife's standard error, over clusters: differences that belong together
(questions about one passage) are left out together. Where each stands for itself that is the ordinary interval of a
mean. Verdicts (one model is right and the other wrong: -1, 0, 1 and halves) have two made-up ones added, of
+-sqrt(1/2), which is the interval of Agresti and Min (Statistics in Medicine 24, 2005): with few verdicts that changed
the ordinary interval covers too rarely, as does the percentile bootstrap, and with none it has no width at all. Where
questions share passages they are +-1/2: with few passages Student's quantile has widened the interval already.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import scipy
from numpy.typing import NDArray

Key = TypeVar("Key", bound=Hashable)
Floats = NDArray[np.float64]

CONFIDENCE = 0.95
LEVEL = 0.05
POWER = 0.8
RESAMPLES = 10_000
_VERDICTS = (-1.0, -0.5, 0.0, 0.5, 1.0)
_MADE_UP = math.sqrt(0.5)
_MADE_UP_OF_CLUSTERS = 0.5


@dataclass(frozen=True)
class Estimate:
    """A mean difference, and how well it is known.

    Args:
        mean: the difference that was measured.
        centre: of its interval; other than `mean` for verdicts alone.
        error: standard error.
        freedom: degrees of freedom of Student's distribution.
        units: independent observations, which are clusters.
        verdicts: whether the difference is one of verdicts, and cannot be beyond -1 and 1.
    """

    mean: float
    centre: float
    error: float
    freedom: float
    units: int
    verdicts: bool

    def interval(self) -> list[float] | None:
        """`[low, high]`, 95 %; None where nothing can be said about the spread: a single observation."""
        if not math.isfinite(self.error):
            return None
        half = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, self.freedom)) * self.error
        low, high = self.centre - half, self.centre + half
        return [max(low, -1.0), min(high, 1.0)] if self.verdicts else [low, high]

    def p_value(self) -> float:
        """Of Student's test that the difference is 0; 1 where nothing can be said."""
        if not math.isfinite(self.error) or self.mean == 0:
            return 1.0
        return float(2 * scipy.stats.t.sf(abs(self.mean) / self.error, self.freedom)) if self.error else 0.0

    def detectable(self, level: float = LEVEL) -> float | None:
        """The smallest true difference that so many observations would show in 4 of 5 cases at this level; None if
        they are too few to show any, because even if all agreed that would come about by chance more often."""
        needed = math.ceil(1 - math.log2(level))
        if self.units < needed or not math.isfinite(self.error):
            return None
        smallest = (
            float(scipy.stats.t.ppf(1 - level / 2, self.freedom) + scipy.stats.t.ppf(POWER, self.freedom)) * self.error
        )
        return min(1.0, max(smallest, needed / self.units)) if self.verdicts else smallest


def estimate(before: Floats, after: Floats, clusters: Sequence[str] | None = None) -> Estimate:
    """The mean difference `after - before` of values `[n]`. `clusters` has one for each question; those of one cluster
    belong together (unset: each stands for itself)."""
    change = after - before
    sums, sizes = _by_cluster(change, clusters)
    units, verdicts = len(sums), are_shares(before, after) and bool(np.isin(change, _VERDICTS).all())
    mean = float(change.mean())
    if verdicts:
        made_up = _MADE_UP if units == len(change) else _MADE_UP_OF_CLUSTERS
        sums, sizes = np.append(sums, (made_up, -made_up)), np.append(sizes, (1, 1))
    elif units < 2:
        return Estimate(mean, mean, math.inf, 1.0, units, verdicts)
    total, observations = int(sizes.sum()), len(sums)
    centre = float(sums.sum()) / total
    moved = (sums - sizes * centre) / (total - sizes)  # by which the mean changes without that cluster
    error = math.sqrt((observations - 1) / observations * float((moved**2).sum()))
    return Estimate(mean, centre, error, observations - 1.0, units, verdicts)


def are_shares(*values: Floats) -> bool:
    return all(bool(((side >= 0) & (side <= 1)).all()) for side in values)


def won(differences: Floats) -> Floats:
    """`[n]`: 1 where a difference is above 0, one half for a tie, else 0."""
    return (np.sign(differences) + 1) / 2


def wilson(shares: Floats, level: float = LEVEL) -> list[float]:
    """The interval of a mean of right and wrong, `1 - level`."""
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(shares.sum(), len(shares), alpha=level, method="wilson")
    return [float(low), float(high)]


def mean_interval(values: Floats, confidence: float = CONFIDENCE) -> list[float] | None:
    """The interval of a mean of one model, Student's; None for a single value."""
    if len(values) < 2:
        return None
    half = (
        float(scipy.stats.t.ppf((1 + confidence) / 2, len(values) - 1))
        * float(values.std(ddof=1))
        / math.sqrt(len(values))
    )
    return [float(values.mean()) - half, float(values.mean()) + half]


def weighted_mean(estimates: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """Of independent estimates; the degrees of freedom are Satterthwaite's."""
    variances = [(weight * part.error) ** 2 for part, weight in zip(estimates, weights, strict=True)]
    error = math.sqrt(math.fsum(variances))
    known = [variance**2 / part.freedom for variance, part in zip(variances, estimates, strict=True) if variance]
    return Estimate(
        mean=math.fsum(weight * part.mean for part, weight in zip(estimates, weights, strict=True)),
        centre=math.fsum(weight * part.centre for part, weight in zip(estimates, weights, strict=True)),
        error=error,
        freedom=error**4 / math.fsum(known) if known and math.isfinite(error) else 1.0,
        units=sum(part.units for part in estimates),
        verdicts=all(part.verdicts for part in estimates),
    )


def sign_test(change: Floats) -> float:
    """The exact p-value of as many for and against, among the differences that are not 0; for right and wrong answers
    that is McNemar's exact test."""
    better, worse = int((change > 0).sum()), int((change < 0).sum())
    return float(scipy.stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0


def paired_test(change: Floats, clusters: Sequence[str] | None = None) -> float:
    """The p-value of no difference: exact where each difference is one answer more or less that is right, else that of
    the permutation test."""
    alone = clusters is None or len(set(clusters)) == len(clusters)
    if alone and np.isin(change, (-1, 0, 1)).all():
        return sign_test(change)
    return exchange_test(change, clusters)


def exchange_test(change: Floats, clusters: Sequence[str] | None = None, seed: int = 0) -> float:
    """The p-value of the paired permutation test: how often a mean difference as large comes about if the two models
    are exchanged at random, within each cluster as a whole."""
    sums, _ = _by_cluster(change, clusters)
    sums = sums[sums != 0]
    if len(sums) < 2:  # both signs are as large
        return 1.0
    result = scipy.stats.permutation_test(
        (sums,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=1000,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def _by_cluster(change: Floats, clusters: Sequence[str] | None) -> tuple[Floats, NDArray[np.int64]]:
    """Sums and sizes."""
    if clusters is None:
        return change, np.ones(len(change), dtype=np.int64)
    _, numbers = np.unique(np.asarray(clusters), return_inverse=True)
    sums: Floats = np.bincount(numbers, change).astype(np.float64)
    return sums, np.bincount(numbers).astype(np.int64)


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """P-values after Holm's correction (1979)."""
    if len(p_values) < 2:
        return dict(p_values)
    from statsmodels.stats.multitest import multipletests

    adjusted = multipletests(list(p_values.values()), method="holm")[1]
    return dict(zip(p_values, map(float, adjusted), strict=True))


def in_words(
    gain: float, p_adjusted: float, detectable: float | None, n: int, shares: bool = True, of: str = "question"
) -> str:
    """The verdict on a comparison of `n` questions (or others, `of`). `gain` is the difference, above 0 where it is one
    for the better, `detectable` the smallest that could have been shown, if there is one; of `shares` in points."""
    if p_adjusted < LEVEL and gain:
        return "better" if gain > 0 else "worse"
    of_what = f"{n} {of}" if n == 1 else f"{n:,} {of}s"
    if detectable is None:
        return f"no difference that {of_what} can show (too few to show any)"
    smallest = f"{100 * detectable:.1f} points" if shares else f"{detectable:.3g}"
    return f"no difference that {of_what} can show (smallest one they could show: {smallest})"
