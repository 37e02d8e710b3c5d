"""Length-normalised DPO against numbers derived by hand."""

from __future__ import annotations

import math

import pytest
from of_pairs import by_ratios

from prefold.algorithms.sigmoid_norm import SigmoidNorm


def test_numbers_by_hand() -> None:
    """Ratios 4 over 2 tokens and -3 over 3: 2 and -1 per token, margin beta * 3 = 6. By the chosen log-prob the
    gradient is -beta sigmoid(-6) / 2, by the rejected one beta sigmoid(-6) / 3."""
    output, gradient = by_ratios(SigmoidNorm(beta=2.0), 4.0, -3.0, lengths=[2, 3])
    assert output.loss["pairs"].item() == pytest.approx(math.log(1 + math.exp(-6)))
    slope = 2 / (1 + math.exp(6))
    assert gradient.tolist() == pytest.approx([-slope / 2, slope / 3])
