"""The DPO loss against numbers derived by hand and against TRL's formula in value and gradient."""

from __future__ import annotations

import math

import pytest
import torch

from prefold.algorithms.dpo import DPO, dpo_loss
from prefold.trees.logprobs import TreeLogprobs


def test_numbers_by_hand() -> None:
    """Pair 1: policy as the reference, so both rewards are 0 and the loss is ln 2.

    Pair 2: chosen ratio 2 nats, rejected ratio -2, beta 0.5: rewards 1 and -1, margin 2,
    loss = -ln(1 / (1 + e^-2)) = ln(1 + e^-2).
    """
    chosen, rejected = torch.tensor([-10.0, -8.0]), torch.tensor([-20.0, -7.0])
    ref_chosen, ref_rejected = torch.tensor([-10.0, -10.0]), torch.tensor([-20.0, -5.0])
    losses, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.5)
    torch.testing.assert_close(losses, torch.tensor([math.log(2), math.log(1 + math.exp(-2))]))
    assert chosen_rewards.tolist() == [0.0, 1.0]
    assert rejected_rewards.tolist() == [0.0, -1.0]


def test_gradient_by_hand() -> None:
    """By equation 7 the gradient by the chosen log-prob is -beta * sigmoid(-margin), by the rejected one its
    opposite."""
    values = [torch.tensor([value], requires_grad=True) for value in (-8.0, -7.0, -10.0, -5.0)]
    dpo_loss(*values, beta=0.5)[0].backward()
    expected = 0.5 / (1 + math.exp(2))
    assert values[0].grad is not None and values[1].grad is not None
    assert values[0].grad.item() == pytest.approx(-expected)
    assert values[1].grad.item() == pytest.approx(expected)


def test_extremes_stay_finite() -> None:
    huge = torch.tensor([-1e4, 0.0], requires_grad=True)
    losses = dpo_loss(huge, huge.flip(0), torch.zeros(2), torch.zeros(2), beta=1.0)[0]
    losses.sum().backward()
    assert losses.tolist() == [1e4, 0.0]
    assert huge.grad is not None and torch.isfinite(huge.grad).all()


def test_sums_and_metrics() -> None:
    """Two pairs, completions of 2, 1, 1 and 3 tokens; metrics are sums with the number of pairs."""
    completion = torch.tensor([0, 0, 1, 2, 3, 3, 3])
    lengths = torch.tensor([2, 1, 1, 3])
    policy = TreeLogprobs(torch.tensor([-1.0, -2.0, -4.0, -3.0, -1.0, -1.0, -1.0]), completion, lengths)
    reference = TreeLogprobs(torch.tensor([-2.0, -2.0, -3.0, -3.0, -1.0, -1.0, -1.0]), completion, lengths)
    output = DPO(beta=0.1).loss(policy, reference)
    # pair 1: ratios 1 and -1, margin 0.2; pair 2: 0 and 0
    assert output.loss["pairs"].item() == pytest.approx(math.log(1 + math.exp(-0.2)) + math.log(2))
    means = {name: mean.total.item() / mean.number for name, mean in output.metrics.items()}
    assert means == pytest.approx(
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
