"""What is promised of the best of many: simulated runs whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest
from statsmodels.stats.proportion import proportion_confint

from prefold.evaluation.best_of_many import best_of_many, expected_largest, luck


def equal_runs(generator: np.random.Generator, runs: int, pairs: int) -> np.ndarray:
    """`[runs, pairs]` verdicts of runs that are right in 70 % of all pairs; hard pairs are hard for all of them."""
    easy = generator.normal(size=pairs)
    return (0.742 + easy + generator.normal(size=(runs, pairs)) > 0).astype(float)


def test_the_expected_largest_of_few_normal_values() -> None:
    """Of 2 it is 1 / sqrt(pi), of 3 three halves of that."""
    assert [expected_largest(number) for number in (1, 2, 3)] == pytest.approx([0, 0.564190, 0.846284], abs=1e-6)


def test_luck_is_what_the_best_of_equal_runs_has() -> None:
    generator = np.random.default_rng(0)
    drawn = [equal_runs(generator, 8, 100) for _ in range(600)]
    too_high = np.mean([values.mean(axis=1).max() for values in drawn]) - np.mean(drawn)
    assert too_high == pytest.approx(np.mean([luck(values) for values in drawn]), rel=0.08)
    assert too_high > 0.03


def test_the_interval_of_the_best_holds_its_truth() -> None:
    """That of the best of 12 equal runs does; its ordinary one leaves the truth out in more than 5 % of all cases."""
    generator = np.random.default_rng(1)
    kept = plain = 0
    for _ in range(300):
        values = {str(name): one for name, one in enumerate(equal_runs(generator, 12, 100))}
        found = best_of_many(values)
        highest = found["best"] or found["tied"][0]
        ordinary = proportion_confint(values[highest].sum(), 100, method="wilson")
        intervals = (found["runs"][highest]["after_ci_of_all"], ordinary)
        holds = [low <= 0.70 <= high for low, high in intervals]
        kept, plain = kept + holds[0], plain + holds[1]
    assert kept / 300 >= 0.95 > plain / 300


def test_equal_runs_are_seldom_told_apart() -> None:
    generator = np.random.default_rng(2)
    wrong = 0
    for _ in range(100):
        values = {str(name): one for name, one in enumerate(equal_runs(generator, 5, 60))}
        found = best_of_many(values)
        wrong += len(found["as_good"]) + max(1, len(found["tied"])) < 5
    assert wrong <= 6


def test_a_clearly_better_run_is_told_from_the_others() -> None:
    generator = np.random.default_rng(3)
    worse = equal_runs(generator, 2, 80)
    found = best_of_many({"a": worse[0], "b": np.ones(80), "c": worse[1]})
    assert found["best"] == "b" and found["as_good"] == []
    assert found["runs"]["b"]["to_best"] is None
    behind = found["runs"]["a"]["to_best"]
    assert behind["difference"] == pytest.approx(worse[0].mean() - 1) and behind["p_value"] < 0.001


def test_of_equal_runs_none_is_the_best() -> None:
    one = np.array([0.25, 1.5, -3.0, 2.0])
    found = best_of_many({"a": one, "b": one[::-1], "c": one - 1})
    assert (found["best"], found["tied"], found["as_good"]) == (None, ["a", "b"], ["c"])
    assert found["runs"]["a"]["to_best"] is None and found["runs"]["b"]["to_best"] is None
    low, high = found["runs"]["a"]["after_ci_of_all"]
    # Student's with 3 degrees of freedom at 98.33 %: 4.8567 standard errors to each side.
    assert (high - low) / 2 == pytest.approx(4.8567 * one.std(ddof=1) / 2, rel=1e-4)
    assert best_of_many({"a": one, "b": one.copy()})["luck"] == 0.0


def test_a_run_is_compared_with_the_highest_one_that_it_is_nearest_to() -> None:
    """Of two that are equally high, it has fewer different answers to the second: 8 of 40 against none, for two
    comparisons of the three. 3 * 2 / 2^8 is below 0.05; where the other has 12 against 4, it is not."""
    low = np.array([0.0] * 20 + [1.0] * 20)
    near = np.array([1.0] * 8 + [0.0] * 12 + [1.0] * 20)
    far = np.array([1.0] * 12 + [0.0] * 8 + [1.0] * 16 + [0.0] * 4)
    found = best_of_many({"low": low, "near": near, "far": far})
    assert found["tied"] == ["near", "far"] and found["as_good"] == ["low"]
    assert found["runs"]["low"]["to_best"]["p_value"] == pytest.approx(3 * binomtest(4, 16).pvalue)
    assert best_of_many({"low": low, "near": near})["as_good"] == []


def test_a_single_run_and_a_single_pair() -> None:
    alone = best_of_many({"a": np.array([1.0, 0.0])})
    assert (alone["best"], alone["as_good"], alone["luck"]) == ("a", [], 0.0)
    assert luck(np.array([[1.0], [0.0]])) == 0.0
