"""EXO against numbers derived by hand."""

from __future__ import annotations

import math

import pytest
import torch
from of_pairs import by_ratios, pairs_apart

from prefold.algorithms.exo import EXO


def test_numbers_by_hand() -> None:
    """Policy as the reference: q = 1/2, label 3/4: 1/2 ln(2/3) + 1/2 ln(2) = 1/2 ln(4/3)."""
    output, gradient = by_ratios(EXO(beta=0.5, label_smoothing=0.25), 0.0, 0.0)
    assert output.loss["pairs"].item() == pytest.approx(0.5 * math.log(4 / 3))
    assert gradient[0] < 0 < gradient[1]


def test_least_where_the_policy_agrees_with_the_label() -> None:
    """q = 3/4 at a margin of ln 3: the divergence is 0, and so is its gradient."""
    output, gradient = by_ratios(EXO(beta=0.5, label_smoothing=0.25), math.log(3), -math.log(3))
    assert output.loss["pairs"].item() == pytest.approx(0.0, abs=1e-12)
    assert gradient.tolist() == pytest.approx([0.0, 0.0], abs=1e-12)


def test_extremes_stay_finite() -> None:
    """Sure of the wrong one, the loss is -ln e and hardly moves: the reverse divergence does not cover."""
    difference = torch.tensor([-1e4, 1e4], requires_grad=True)
    losses = EXO(beta=1.0, label_smoothing=1e-3).losses(pairs_apart(difference))
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([-math.log(1e-3), -math.log1p(-1e-3)], rel=1e-3)
    assert difference.grad is not None and difference.grad.isfinite().all()


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_smoothing_is_needed(smoothing: float) -> None:
    with pytest.raises(ValueError, match="label_smoothing must be greater than 0 and less than"):
        EXO(label_smoothing=smoothing)
