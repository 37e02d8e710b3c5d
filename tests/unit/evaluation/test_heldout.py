"""Held-out comparison: numbers by hand, and intervals that cover."""

from __future__ import annotations

import numpy as np
import pytest

from prefold.evaluation.held_out_pairs import PairScores, compare_pairs


def scores(chosen: list[float], rejected: list[float], tokens: float = 2.0) -> PairScores:
    sums = np.array([chosen, rejected], dtype=float).T
    return PairScores(sums, sums / tokens)


def test_numbers_by_hand() -> None:
    """Before: one win, one tie, two losses = 1.5 of 4. After: three wins, one loss.

    Two verdicts went from loss to win, one from tie to win, one from win to loss: 3 better, 1 worse. The exact
    two-sided sign test gives 2 * (C(4,0) + C(4,1)) / 16 = 0.625.
    """
    before = scores([-4, -4, -4, -2], [-2, -4, -2, -4])
    after = scores([-1, -1, -1, -4], [-3, -3, -3, -2])
    found = compare_pairs(before, after, reward_scale=0.1)
    assert found["pairs"] == 4
    assert found["before"]["accuracy"] == pytest.approx(1.5 / 4)
    assert found["before"]["margin"] == pytest.approx((-1 + 0 - 1 + 1) / 4)
    assert found["after"]["accuracy"] == 0.75
    assert found["after"]["margin"] == pytest.approx((1 + 1 + 1 - 1) / 4)
    assert found["difference"]["accuracy"] == pytest.approx(0.375)
    assert found["difference"]["p_value"] == pytest.approx(0.625)
    # rewards: 0.1 * (after - before): chosen .3 .3 .3 -.2; rejected -.1 .1 -.1 .2
    assert found["reward"]["accuracy"] == 0.75
    assert found["reward"]["margin"] == pytest.approx((0.4 + 0.2 + 0.4 - 0.4) / 4)


def test_wilson_interval() -> None:
    """8 of 10: the textbook's Wilson interval is 0.490 to 0.943."""
    one = scores([0.0] * 8 + [-2.0] * 2, [-1.0] * 10)
    low, high = compare_pairs(one, one, 1.0)["after"]["accuracy_ci"]
    assert (low, high) == pytest.approx((0.490, 0.943), abs=1e-3)


def test_nothing_changed() -> None:
    """Two pairs that stayed as they were leave nearly everything open, a thousand do not."""
    one = scores([0.0, -2.0], [-1.0, -1.0])
    difference = compare_pairs(one, one, 1.0)["difference"]
    assert (difference["accuracy"], difference["p_value"]) == (0.0, 1.0)
    assert difference["ci"][0] < -0.4 and difference["ci"][1] > 0.4
    many = scores([0.0] * 1000, [-1.0] * 1000)
    assert compare_pairs(many, many, 1.0)["difference"]["ci"] == pytest.approx([-0.0028, 0.0028], abs=1e-4)


def test_the_interval_of_the_difference_covers() -> None:
    """400 simulated comparisons of 90 pairs whose true difference is 0.2: 95 % intervals hold it in 91 to 98 %."""
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        before, after = draw.random(90) < 0.5, draw.random(90) < 0.7
        one, two = (scores(list(wins - 0.5), [0.0] * 90) for wins in (before, after))
        low, high = compare_pairs(one, two, 1.0)["difference"]["ci"]
        covered += low <= 0.2 <= high
    assert 0.91 <= covered / 400 <= 0.98
