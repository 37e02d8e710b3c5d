"""CPO against numbers derived by hand."""

from __future__ import annotations

import math

import pytest
from of_pairs import scored
from preference_batches import metric_means, step_loss

from prefold.algorithms.cpo import CPO
from prefold.trees.packing import TokenTree

TREES = [TokenTree((1,), ((2, 2), (2, 2, 2)))]


def loss_of(algorithm: CPO) -> float:
    """-4 nats over 2 tokens against -9 over 3."""
    return step_loss(algorithm.loss(scored([-4.0, -9.0], [2, 3]), None), algorithm, TREES).item()


def test_numbers_by_hand() -> None:
    """Difference of the sums 5, beta 0.2, margin 1; 2 nats per chosen token. IPO's difference is per token, 1."""
    assert loss_of(CPO(beta=0.2, cpo_alpha=0.0)) == pytest.approx(math.log(1 + math.exp(-1)))
    assert loss_of(CPO(beta=0.2, cpo_alpha=0.5)) == pytest.approx(math.log(1 + math.exp(-1)) + 0.5 * 2)
    assert loss_of(CPO(beta=0.1, cpo_alpha=0.0, loss_type="hinge")) == pytest.approx(0.5)
    assert loss_of(CPO(beta=0.25, cpo_alpha=0.0, loss_type="ipo")) == pytest.approx((1 - 2) ** 2)
    smooth = 0.9 * math.log(1 + math.exp(-1)) + 0.1 * math.log(1 + math.exp(1))
    assert loss_of(CPO(beta=0.2, cpo_alpha=0.0, label_smoothing=0.1)) == pytest.approx(smooth)


def test_metrics() -> None:
    found = metric_means(CPO(beta=0.2).loss(scored([-4.0, -9.0], [2, 3]), None))
    assert found["nll_loss"] == pytest.approx(2.0)
    assert (found["rewards/chosen"], found["logps/rejected"]) == pytest.approx((-0.8, -9.0))
    assert CPO().units(TREES) == {"pairs": 1, "chosen_tokens": 2}


@pytest.mark.parametrize("kind", ["hinge", "ipo"])
def test_smoothing_belongs_to_sigmoid(kind: str) -> None:
    with pytest.raises(ValueError, match="label_smoothing is used by `loss_type: sigmoid` only"):
        CPO(loss_type=kind, label_smoothing=0.1)  # type: ignore[arg-type]


def test_settings() -> None:
    with pytest.raises(ValueError, match="loss_type must be one of sigmoid, hinge, ipo"):
        CPO(loss_type="simpo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cpo_alpha must be 0 or more"):
        CPO(cpo_alpha=-1.0)
