"""NCA against numbers derived by hand."""

from __future__ import annotations

import math

import pytest
from of_pairs import by_ratios

from prefold.algorithms.nca import NCA


def test_numbers_by_hand() -> None:
    """Policy as the reference: 2 ln 2. Each reward has a gradient of its own: by the chosen one -beta/2 + beta/4, by
    the rejected one beta/4."""
    output, gradient = by_ratios(NCA(beta=0.4), 0.0, 0.0)
    assert output.loss["pairs"].item() == pytest.approx(2 * math.log(2))
    assert gradient.tolist() == pytest.approx([-0.1, 0.1])


def test_keeps_the_chosen_reward_at_a_height() -> None:
    """-ln s(r) - 1/2 ln s(-r) is least where s(r) = 2/3, at r = ln 2, whatever the rejected one does."""
    for rejected in (-50.0, 0.0, 50.0):
        _, gradient = by_ratios(NCA(beta=0.5), 2 * math.log(2), rejected)
        assert gradient[0].item() == pytest.approx(0.0, abs=1e-12)
        assert gradient[1] > 0
