"""DiscoPOP against numbers derived by hand."""

from __future__ import annotations

import math

import pytest
import torch
from of_pairs import by_ratios, pairs_apart

from prefold.algorithms.discopop import DiscoPOP


def test_numbers_by_hand() -> None:
    """z = 0: half of ln 2 and half of 1. z = 1, tau 0.5: the blend is s(2)."""
    output, _ = by_ratios(DiscoPOP(beta=0.5, discopop_tau=0.5), 0.0, 0.0, 1.0, -1.0)
    blend = 1 / (1 + math.exp(-2))
    wanted = (math.log(2) + 1) / 2 + (1 - blend) * math.log(1 + math.exp(-1)) + blend * math.exp(-1)
    assert output.loss["pairs"].item() == pytest.approx(wanted)


def test_not_convex() -> None:
    """The paper's figure: near z = 0 the exponential takes over and the loss rises for a while, then falls."""
    margins = torch.tensor([-0.5, -0.1, 0.05, 1.0], dtype=torch.float64)
    before, dip, top, after = DiscoPOP(beta=1.0, discopop_tau=0.05).losses(pairs_apart(margins)).tolist()
    assert before > dip < top > after


def test_extremes_stay_finite() -> None:
    difference = torch.tensor([-1e4, -1e2, 1e2, 1e4], requires_grad=True)
    losses = DiscoPOP(beta=1.0, discopop_tau=0.05).losses(pairs_apart(difference))
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([1e4, 1e2, 0.0, 0.0])
    assert difference.grad is not None and difference.grad.tolist() == pytest.approx([-1.0, -1.0, 0.0, 0.0])


@pytest.mark.parametrize(("tau", "said"), [(0.0, "greater than 0"), (1.5, "at most 1")])
def test_temperature_is_bounded(tau: float, said: str) -> None:
    with pytest.raises(ValueError, match=f"discopop_tau must be {said}"):
        DiscoPOP(discopop_tau=tau)
