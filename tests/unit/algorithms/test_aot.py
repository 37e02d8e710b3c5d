"""AOT against numbers derived by hand: what is compared is ranks, not pairs."""

from __future__ import annotations

import math

import pytest
from of_pairs import by_ratios, scored

from prefold.algorithms.aot import AOT, AOTUnpaired
from prefold.algorithms.dpo import DPO


def softplus(value: float) -> float:
    return math.log(1 + math.exp(value))


def test_margins_by_rank() -> None:
    """Policy margins 3 and -1, reference margins 0 and 2: sorted -1, 3 against 0, 2, so differences -1 and 1. By pairs
    they would be 3 and -3."""
    policy, reference = scored([3.0, 0.0, -1.0, 0.0]), scored([0.0, 0.0, 2.0, 0.0])
    loss = AOT(beta=1.0).loss(policy, reference).loss["pairs"].item()
    assert loss == pytest.approx(softplus(1) + softplus(-1))
    assert DPO(beta=1.0).loss(policy, reference).loss["pairs"].item() == pytest.approx(softplus(-3) + softplus(3))


def test_ratios_by_rank() -> None:
    """Chosen ratios 5 and 1, rejected ratios 2 and 3: sorted 1, 5 against 2, 3."""
    output, gradient = by_ratios(AOTUnpaired(beta=1.0), 5.0, 2.0, 1.0, 3.0)
    assert output.loss["pairs"].item() == pytest.approx(softplus(1) + softplus(-2))
    low, high = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(2))
    # In turn: chosen 5 (rank 2), rejected 2 (rank 1), chosen 1 (rank 1), rejected 3 (rank 2).
    assert gradient.tolist() == pytest.approx([-high, low, -low, high])


@pytest.mark.parametrize("kind", [AOT, AOTUnpaired])
def test_one_pair_is_dpo(kind: type[AOT]) -> None:
    found = by_ratios(kind(beta=0.3, label_smoothing=0.1), 1.5, -0.5)
    wanted = by_ratios(DPO(beta=0.3, label_smoothing=0.1), 1.5, -0.5)
    assert found[0].loss["pairs"].item() == pytest.approx(wanted[0].loss["pairs"].item())
    assert found[1].tolist() == pytest.approx(wanted[1].tolist())


@pytest.mark.parametrize("kind", [AOT, AOTUnpaired])
def test_order_of_the_pairs_does_not_matter(kind: type[AOT]) -> None:
    forth = by_ratios(kind(), 5.0, 2.0, 1.0, 3.0, -2.0, 0.5)
    back = by_ratios(kind(), -2.0, 0.5, 1.0, 3.0, 5.0, 2.0)
    assert forth[0].loss["pairs"].item() == pytest.approx(back[0].loss["pairs"].item())
    assert forth[1].tolist() == pytest.approx(back[1].view(3, 2).flip(0).flatten().tolist())
    assert kind().couples_step
