"""SPPO against numbers derived by hand."""

from __future__ import annotations

import pytest
from of_pairs import by_ratios

from prefold.algorithms.sppo import SPPO


def test_numbers_by_hand() -> None:
    """beta 0.25, targets 2 and -2 nats. Ratios 1 and 1: errors -1 and 3, loss 1 + 9, gradients twice the errors."""
    output, gradient = by_ratios(SPPO(beta=0.25), 1.0, 1.0)
    assert output.loss["pairs"].item() == pytest.approx(10.0)
    assert gradient.tolist() == pytest.approx([-2.0, 6.0])


def test_least_at_the_targets() -> None:
    output, gradient = by_ratios(SPPO(beta=0.25), 2.0, -2.0)
    assert output.loss["pairs"].item() == 0.0 and gradient.tolist() == [0.0, 0.0]
