"""The hinge loss against numbers derived by hand."""

from __future__ import annotations

import pytest
from of_pairs import by_ratios

from prefold.algorithms.hinge import Hinge


def test_numbers_by_hand() -> None:
    """beta 0.5. Pair 1: difference 1, margin 0.5, loss 0.5. Pair 2: difference 4, behind the margin: loss and gradient
    0. Pair 3: difference -4: loss 3."""
    output, gradient = by_ratios(Hinge(beta=0.5), 1.0, 0.0, 2.0, -2.0, -2.0, 2.0)
    assert output.loss["pairs"].item() == pytest.approx(0.5 + 0 + 3)
    assert gradient.tolist() == [-0.5, 0.5, 0.0, 0.0, -0.5, 0.5]
