"""SimPO against numbers derived by hand."""

from __future__ import annotations

import math

import pytest
import torch
from of_pairs import scored
from preference_batches import metric_means

from prefold.algorithms.simpo import SimPO


def test_numbers_by_hand() -> None:
    """-4 nats over 2 tokens and -9 over 3: -2 and -3 per token, rewards -4 and -6, margin 2 - 0.5. By the chosen
    log-prob the gradient is -beta s(-1.5) / 2."""
    policy = scored([-4.0, -9.0], [2, 3])
    output = SimPO(beta=2.0, simpo_gamma=0.5).loss(policy, None)
    assert output.loss["pairs"].item() == pytest.approx(math.log(1 + math.exp(-1.5)))
    (gradient,) = torch.autograd.grad(output.loss["pairs"], policy.tokens)
    slope = 2 / (1 + math.exp(1.5))
    assert gradient.tolist() == pytest.approx([-slope / 2, -slope / 2, slope / 3, slope / 3, slope / 3])
    assert metric_means(output) == pytest.approx(
        {
            "rewards/chosen": -4.0,
            "rewards/rejected": -6.0,
            "rewards/accuracies": 1.0,
            "rewards/margins": 2.0,
            "logps/chosen": -2.0,
            "logps/rejected": -3.0,
        }
    )
    assert not SimPO().needs_reference


def test_settings() -> None:
    with pytest.raises(ValueError, match="simpo_gamma must be 0 or more"):
        SimPO(simpo_gamma=-1.0)
    with pytest.raises(ValueError, match="beta must be greater than 0"):
        SimPO(beta=0.0)
