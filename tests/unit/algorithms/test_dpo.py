"""DPO against numbers derived by hand."""

from __future__ import annotations

import math

import pytest
import torch
from of_pairs import by_ratios
from preference_batches import logprobs, metric_means

from prefold.algorithms.dpo import DPO, dpo_loss


def test_numbers_by_hand() -> None:
    """Pair 1: policy as the reference, so both rewards are 0 and the loss is ln 2.

    Pair 2: chosen ratio 2 nats, rejected ratio -2, beta 0.5: rewards 1 and -1, margin 2,
    loss = -ln(1 / (1 + e^-2)) = ln(1 + e^-2).
    """
    losses = dpo_loss(torch.tensor([0.0, 4.0]), beta=0.5)
    torch.testing.assert_close(losses, torch.tensor([math.log(2), math.log(1 + math.exp(-2))]))


def test_gradient_by_hand() -> None:
    """By equation 7 the gradient by the chosen log-prob is -beta * sigmoid(-margin), by the rejected one its
    opposite."""
    _, gradient = by_ratios(DPO(beta=0.5), 2.0, -2.0)
    expected = 0.5 / (1 + math.exp(2))
    assert gradient.tolist() == pytest.approx([-expected, expected])


def test_label_smoothing_by_hand() -> None:
    """Margin 2, smoothing 0.1: 0.9 ln(1 + e^-2) + 0.1 ln(1 + e^2). Beyond a margin of ln(0.9 / 0.1) it pulls back."""
    loss = dpo_loss(torch.tensor(4.0, dtype=torch.float64), beta=0.5, label_smoothing=0.1)
    assert loss.item() == pytest.approx(0.9 * math.log(1 + math.exp(-2)) + 0.1 * math.log(1 + math.exp(2)))
    least = math.log(9)
    below, above = (by_ratios(DPO(beta=1.0, label_smoothing=0.1), least + step, 0.0)[1] for step in (-0.1, 0.1))
    assert below[0] < 0 < above[0]


def test_extremes_stay_finite() -> None:
    difference = torch.tensor([-1e4, 1e4], requires_grad=True)
    for smoothing in (0.0, 0.1):
        losses = dpo_loss(difference, beta=1.0, label_smoothing=smoothing)
        (gradient,) = torch.autograd.grad(losses.sum(), difference)
        assert losses.tolist() == pytest.approx([1e4 * (1 - smoothing), 1e4 * smoothing])
        assert gradient.isfinite().all()


def test_sums_and_metrics() -> None:
    """Two pairs, completions of 2, 1, 1 and 3 tokens; metrics are sums with the number of pairs."""
    lengths = [2, 1, 1, 3]
    policy = logprobs(torch.tensor([-1.0, -2.0, -4.0, -3.0, -1.0, -1.0, -1.0]), lengths)
    reference = logprobs(torch.tensor([-2.0, -2.0, -3.0, -3.0, -1.0, -1.0, -1.0]), lengths)
    output = DPO(beta=0.1).loss(policy, reference)
    # pair 1: ratios 1 and -1, margin 0.2; pair 2: 0 and 0
    assert output.loss["pairs"].item() == pytest.approx(math.log(1 + math.exp(-0.2)) + math.log(2))
    assert metric_means(output) == pytest.approx(
        {
            "rewards/chosen": 0.05,
            "rewards/rejected": -0.05,
            "rewards/accuracies": 0.5,
            "rewards/margins": 0.1,
            "logps/chosen": -3.0,
            "logps/rejected": -3.5,
        }
    )


@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan")])
def test_beta_must_be_positive(beta: float) -> None:
    with pytest.raises(ValueError, match="beta must be greater than 0"):
        DPO(beta=beta)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, float("nan")])
def test_smoothing_is_less_than_half(smoothing: float) -> None:
    with pytest.raises(ValueError, match="label_smoothing must be at least 0 and less than"):
        DPO(label_smoothing=smoothing)
