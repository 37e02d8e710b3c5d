"""What is promised of the best of many: simulated runs whose truth is known."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from prefold.evaluation.best_of_many import best_of_many, expected_largest, luck
from prefold.evaluation.paired import holm


@pytest.fixture(autouse=True)
def _without_collecting(monkeypatch: pytest.MonkeyPatch) -> None:
    """statsmodels collects garbage at every correction, which costs more than everything else here."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


def equal_runs(generator: np.random.Generator, runs: int, pairs: int) -> np.ndarray:
    """`[runs, pairs]` verdicts of runs that are right in 70 % of all pairs; hard pairs are hard for all of them."""
    easy = generator.normal(size=pairs)
    return (0.742 + easy + generator.normal(size=(runs, pairs)) > 0).astype(float)


def test_the_expected_largest_of_few_normal_values() -> None:
    """Of 2 it is 1 / sqrt(pi), of 3 three halves of that."""
    assert [expected_largest(number) for number in (1, 2, 3)] == pytest.approx([0, 0.564190, 0.846284], abs=1e-6)


def test_holm_by_hand() -> None:
    """0.01 three times, 0.03 twice, 0.04 not less than the one before."""
    assert holm({"a": 0.04, "b": 0.01, "c": 0.03}) == pytest.approx({"a": 0.06, "b": 0.03, "c": 0.06})
    assert holm({}) == {}


def test_luck_is_what_the_best_of_equal_runs_has() -> None:
    generator = np.random.default_rng(0)
    drawn = [equal_runs(generator, 8, 100) for _ in range(600)]
    too_high = np.mean([values.mean(axis=1).max() for values in drawn]) - np.mean(drawn)
    assert too_high == pytest.approx(np.mean([luck(values) for values in drawn]), rel=0.08)
    assert too_high > 0.03


def test_the_interval_of_the_best_holds_its_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the best of 12 equal runs does; its ordinary one leaves the truth out in more than 5 % of all cases."""
    monkeypatch.setattr("prefold.evaluation.best_of_many.paired_test", lambda change: 1.0)
    generator = np.random.default_rng(1)
    kept = plain = 0
    for _ in range(300):
        values = {str(name): one for name, one in enumerate(equal_runs(generator, 12, 100))}
        found = best_of_many(values, dict.fromkeys(values, 0.0))
        ordinary = proportion_confint(values[found["best"]].sum(), 100, method="wilson")
        intervals = (found["runs"][found["best"]]["after_ci_of_all"], ordinary)
        holds = [low <= 0.70 <= high for low, high in intervals]
        kept, plain = kept + holds[0], plain + holds[1]
    assert kept / 300 >= 0.95 > plain / 300


def test_equal_runs_are_seldom_told_apart() -> None:
    generator = np.random.default_rng(2)
    wrong = 0
    for _ in range(100):
        values = {str(name): one for name, one in enumerate(equal_runs(generator, 5, 60))}
        wrong += len(best_of_many(values, dict.fromkeys(values, 0.0))["as_good"]) < 4
    assert wrong <= 6


def test_a_clearly_better_run_is_told_from_the_others() -> None:
    generator = np.random.default_rng(3)
    worse = equal_runs(generator, 2, 80)
    found = best_of_many({"a": worse[0], "b": np.ones(80), "c": worse[1]}, {"a": 9.0, "b": 0.0, "c": 9.0})
    assert found["best"] == "b" and found["as_good"] == []
    assert found["runs"]["b"]["to_best"] is None
    behind = found["runs"]["a"]["to_best"]
    assert behind["difference"] == pytest.approx(worse[0].mean() - 1) and behind["p_adjusted"] < 0.001


def test_ties_and_values_that_are_no_verdicts() -> None:
    one = np.array([0.25, 1.5, -3.0, 2.0])
    found = best_of_many({"a": one, "b": one.copy()}, {"a": 0.1, "b": 0.2})
    assert found["best"] == "b" and found["as_good"] == ["a"] and found["luck"] == 0.0
    low, high = found["runs"]["a"]["after_ci_of_all"]
    # Student's with 3 degrees of freedom at 97.5 %: 4.1765 standard errors to each side.
    assert (high - low) / 2 == pytest.approx(4.1765 * one.std(ddof=1) / 2, rel=1e-4)


def test_a_single_run_and_a_single_pair() -> None:
    alone = best_of_many({"a": np.array([1.0, 0.0])}, {"a": 0.0})
    assert (alone["best"], alone["as_good"], alone["luck"]) == ("a", [], 0.0)
    assert luck(np.array([[1.0], [0.0]])) == 0.0
