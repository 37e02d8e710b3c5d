"""Robust DPO against numbers derived by hand."""

from __future__ import annotations

import math

import pytest
from of_pairs import by_ratios

from prefold.algorithms.dpo import DPO
from prefold.algorithms.robust import Robust


def test_numbers_by_hand() -> None:
    """Margin 2, a fifth of the pairs flipped: (0.8 ln(1 + e^-2) - 0.2 ln(1 + e^2)) / 0.6."""
    output, _ = by_ratios(Robust(beta=0.5, label_smoothing=0.2), 2.0, -2.0)
    wanted = (0.8 * math.log(1 + math.exp(-2)) - 0.2 * math.log(1 + math.exp(2))) / 0.6
    assert output.loss["pairs"].item() == pytest.approx(wanted) and wanted < 0


def test_unbiased() -> None:
    """The mean over flipped and unflipped labels, at the rate of flips, is DPO's loss of the right label."""
    robust = Robust(beta=0.5, label_smoothing=0.2)
    right, flipped = (by_ratios(robust, *ratios)[0].loss["pairs"].item() for ratios in ((3.0, 1.0), (1.0, 3.0)))
    clean = by_ratios(DPO(beta=0.5), 3.0, 1.0)[0].loss["pairs"].item()
    assert 0.8 * right + 0.2 * flipped == pytest.approx(clean)


def test_rewards_ever_larger_margins() -> None:
    """Where conservative DPO pulls back, this loss still pushes."""
    _, robust = by_ratios(Robust(beta=1.0, label_smoothing=0.1), 10.0, 0.0)
    _, conservative = by_ratios(DPO(beta=1.0, label_smoothing=0.1), 10.0, 0.0)
    assert robust[0] < 0 < conservative[0]


def test_half_is_refused() -> None:
    with pytest.raises(ValueError, match="label_smoothing must be at least 0 and less than"):
        Robust(label_smoothing=0.5)
