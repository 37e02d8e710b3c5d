"""KTO against numbers derived by hand."""

from __future__ import annotations

import math

import pytest
import torch
from preference_batches import logprobs, metric_means, step_loss

from prefold.algorithms import KTO
from prefold.algorithms.kto import kto_loss, mismatched
from prefold.trees.packing import TokenTree


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def loss_of(ratios: list[float], labels: list[bool], others: list[float], **weights: float) -> tuple[torch.Tensor, ...]:
    """Losses, rewards and divergence for log-ratios against a reference of 0, with beta 0.5, and the gradient."""
    policy = torch.tensor(ratios, dtype=torch.float64, requires_grad=True)
    away = torch.tensor(others, dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(len(others), dtype=torch.float64)
    found = kto_loss(policy, torch.zeros_like(policy), torch.tensor(labels), away, zeros, beta=0.5, **weights)
    (gradient,) = torch.autograd.grad(found[0].sum(), policy)
    assert not found[2].requires_grad
    return *found, gradient


def test_numbers_by_hand() -> None:
    """Mismatched ratios 3 and -1: divergence 1. Desirable, ratio 3: 1 - s(0.5 * 2). Undesirable, ratio -1: 1 - s(0.5 *
    2) as well; twice the weight."""
    losses, rewards, kl, gradient = loss_of([3.0, -1.0], [True, False], [3.0, -1.0], undesirable_weight=2.0)
    assert kl.item() == pytest.approx(1.0)
    assert losses.tolist() == pytest.approx([1 - sigmoid(1), 2 * (1 - sigmoid(1))])
    assert rewards.tolist() == [1.5, -0.5]
    slope = 0.5 * sigmoid(1) * sigmoid(-1)
    assert gradient.tolist() == pytest.approx([-slope, 2 * slope])


def test_divergence_is_not_negative() -> None:
    losses, _, kl, _ = loss_of([0.0, 0.0], [True, False], [-3.0, 1.0])
    assert kl.item() == 0.0
    assert losses.tolist() == [0.5, 0.5]


def test_extremes() -> None:
    """Far from the reference point the loss is 0 or its weight, and has no gradient."""
    losses, _, _, gradient = loss_of([1e4, -1e4, 1e4, -1e4], [True, True, False, False], [0.0], desirable_weight=1.5)
    assert losses.tolist() == [0.0, 1.5, 1.0, 0.0]
    assert gradient.tolist() == [0.0] * 4


def test_mismatched() -> None:
    trees = [TokenTree((place,), ((10 + place,),)) for place in range(3)]
    assert [(tree.prompt[0], tree.completions[0][0]) for tree in mismatched(trees)] == [(0, 12), (1, 10), (2, 11)]
    assert mismatched(trees[:1]) == trees[:1]


def test_metrics() -> None:
    """Ratios 2, 4 desirable and -2 not, beta 0.5; the mismatched ones of mean 1."""
    trees = [TokenTree((1,), ((2,),))] * 3
    labels = torch.tensor([True, False, True])
    policy = logprobs(
        torch.tensor([-1.0, -5.0, 1.0]), [1, 1, 1], extras={"label": labels, "mismatched": torch.tensor([-1.0, 0.0])}
    )
    reference = logprobs(torch.tensor([-3.0, -3.0, -3.0]), [1, 1, 1], extras={"mismatched": torch.tensor([-2.0, -1.0])})
    output = KTO(beta=0.5).loss(policy, reference)
    wanted = (1 - sigmoid(0.5)) + (1 - sigmoid(1.5)) + (1 - sigmoid(1.5))
    assert step_loss(output, KTO(), trees).item() == pytest.approx(wanted / 3)
    assert metric_means(output) == pytest.approx(
        {
            "kl": 1.0,
            "rewards/chosen": 1.5,
            "rewards/rejected": -1.0,
            "rewards/margins": 2.5,
            "logps/chosen": 0.0,
            "logps/rejected": -5.0,
        }
    )


def test_one_kind_alone() -> None:
    """A step without undesirable completions has no metrics of them, and no margin."""
    away = torch.zeros(1)
    policy = logprobs(torch.tensor([-1.0]), [1], extras={"label": torch.tensor([True]), "mismatched": away})
    output = KTO().loss(policy, logprobs(torch.tensor([-1.0]), [1], extras={"mismatched": away}))
    assert set(output.metrics) == {"kl", "rewards/chosen", "logps/chosen"}


def test_needs() -> None:
    kto = KTO()
    assert kto.kind.data == "unpaired" and kto.needs_reference and kto.record_fields == ("label",) and kto.couples_step
    with pytest.raises(ValueError, match="desirable_weight must be greater than 0"):
        KTO(desirable_weight=0.0)
