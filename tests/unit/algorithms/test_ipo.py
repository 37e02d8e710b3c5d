"""IPO against numbers derived by hand."""

from __future__ import annotations

import pytest
from of_pairs import by_ratios

from prefold.algorithms.ipo import IPO


def test_numbers_by_hand() -> None:
    """beta 0.25, so the target is 2 nats per token. Ratios 4 over 2 tokens and -3 over 3: difference 3, loss 1,
    gradients 2 * 1 / 2 and -2 * 1 / 3: beyond the target it pulls back."""
    output, gradient = by_ratios(IPO(beta=0.25), 4.0, -3.0, lengths=[2, 3])
    assert output.loss["pairs"].item() == pytest.approx(1.0)
    assert gradient.tolist() == pytest.approx([1.0, -2 / 3])


def test_untrained() -> None:
    """Policy as the reference: the loss is the target squared, 25 at TRL's default."""
    output, gradient = by_ratios(IPO(), 0.0, 0.0)
    assert output.loss["pairs"].item() == pytest.approx(25.0)
    assert gradient[0] < 0 < gradient[1]
