"""APO against numbers derived by hand."""

from __future__ import annotations

import math

import pytest
from of_pairs import by_ratios

from prefold.algorithms.apo import APODown, APOZero


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_zero_by_hand() -> None:
    """Rewards 1 and -2: 1 - s(1) + s(-2). Raises the chosen one, lowers the rejected one."""
    output, gradient = by_ratios(APOZero(beta=0.5), 2.0, -4.0)
    assert output.loss["pairs"].item() == pytest.approx(1 - sigmoid(1) + sigmoid(-2))
    assert gradient.tolist() == pytest.approx([-0.5 * sigmoid(1) * sigmoid(-1), 0.5 * sigmoid(2) * sigmoid(-2)])


def test_down_by_hand() -> None:
    """Rewards 1 and 0.5: s(1) + 1 - s(0.5)."""
    output, _ = by_ratios(APODown(beta=0.5), 2.0, 1.0)
    assert output.loss["pairs"].item() == pytest.approx(sigmoid(1) + 1 - sigmoid(0.5))


def test_down_lowers_both() -> None:
    """With a margin of 2 behind it, what is left of the pull on the chosen completion is downwards."""
    _, gradient = by_ratios(APODown(beta=1.0), 0.0, -2.0)
    assert gradient[0] > 0 and gradient[1] > 0


@pytest.mark.parametrize("kind", [APOZero, APODown])
def test_extremes(kind: type[APOZero] | type[APODown]) -> None:
    output, gradient = by_ratios(kind(beta=1.0), 1e4, -1e4, -1e4, 1e4)
    assert output.loss["pairs"].isfinite() and gradient.isfinite().all()
