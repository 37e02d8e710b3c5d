"""KTO against numbers derived by hand."""

from __future__ import annotations

import math

import pytest
import torch
from preference_batches import logprobs, metric_means, step_loss

from prefold.algorithms.kto import KTO
from prefold.trees.packing import TokenTree


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def loss_of(
    ratios: list[float], labels: list[bool], others: list[float], **weights: float
) -> tuple[float, dict[str, float], list[float]]:
    """Sum of the losses, metrics and gradient for log-ratios against a reference of 0, with beta 0.5."""
    tokens = torch.tensor(ratios, dtype=torch.float64, requires_grad=True)
    away = torch.tensor(others, dtype=torch.float64, requires_grad=True)
    lengths = [1] * len(ratios)
    policy = logprobs(tokens, lengths, extras={"label": torch.tensor(labels), "mismatched": away})
    reference = logprobs(torch.zeros_like(tokens), lengths, extras={"mismatched": torch.zeros_like(away)})
    output = KTO(beta=0.5, **weights).loss(policy, reference)
    loss = output.loss["completions"]
    gradient, no_gradient = torch.autograd.grad(loss, [tokens, away], allow_unused=True)
    assert no_gradient is None
    return loss.item(), metric_means(output), gradient.tolist()


def test_numbers_by_hand() -> None:
    """Mismatched ratios 3 and -1: divergence 1. Desirable, ratio 3: 1 - s(0.5 * 2). Undesirable, ratio -1: 1 - s(0.5 *
    2) as well; twice the weight."""
    loss, metrics, gradient = loss_of([3.0, -1.0], [True, False], [3.0, -1.0], undesirable_weight=2.0)
    assert metrics["kl"] == pytest.approx(1.0)
    assert loss == pytest.approx(3 * (1 - sigmoid(1)))
    assert (metrics["rewards/chosen"], metrics["rewards/rejected"]) == (1.5, -0.5)
    slope = 0.5 * sigmoid(1) * sigmoid(-1)
    assert gradient == pytest.approx([-slope, 2 * slope])


def test_divergence_is_not_negative() -> None:
    for label in (True, False):
        loss, metrics, _ = loss_of([0.0], [label], [-3.0, 1.0])
        assert metrics["kl"] == 0.0 and loss == 0.5


def test_extremes() -> None:
    """Far from the reference point the loss is 0 or its weight, and has no gradient."""
    for ratio, label, weight in ((1e4, True, 0.0), (-1e4, True, 1.5), (1e4, False, 1.0), (-1e4, False, 0.0)):
        loss, _, gradient = loss_of([ratio], [label], [0.0], desirable_weight=1.5)
        assert loss == weight and gradient == [0.0]


def test_mismatched() -> None:
    trees = [TokenTree((i,), ((10 + i,),)) for i in range(3)]
    mismatched = KTO().further_trees(trees)["mismatched"]
    assert [(tree.prompt[0], tree.completions[0][0]) for tree in mismatched] == [(0, 12), (1, 10), (2, 11)]
    assert KTO().further_trees(trees[:1]) == {"mismatched": trees[:1]}


def test_mismatched_completions_keep_their_own_context() -> None:
    trees = [TokenTree((1,), ((2, 3),), (((0, 1),),)), TokenTree((4,), ((5, 6, 7),))]
    first, second = KTO().further_trees(trees)["mismatched"]
    assert (first, second) == (TokenTree((1,), ((5, 6, 7),)), TokenTree((4,), ((2, 3),), (((0, 1),),)))


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
