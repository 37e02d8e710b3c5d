"""The loss of reward models against numbers derived by hand."""

from __future__ import annotations

import math

import pytest
import torch
from of_pairs import scored
from preference_batches import metric_means

from prefold.algorithms.reward import BradleyTerry
from prefold.training.loop import value_of


def test_numbers_by_hand() -> None:
    """Scores 2 and 0.5, then -1 and 1: differences 1.5 and -2. By a chosen score the gradient is -s(-difference)."""
    policy = scored([2.0, 0.5, -1.0, 1.0])
    output = BradleyTerry().loss(policy, None)
    assert output.loss["pairs"].item() == pytest.approx(math.log(1 + math.exp(-1.5)) + math.log(1 + math.exp(2.0)))
    (gradient,) = torch.autograd.grad(output.loss["pairs"], policy.tokens)
    first, second = 1 / (1 + math.exp(1.5)), 1 / (1 + math.exp(-2.0))
    assert gradient.tolist() == pytest.approx([-first, first, -second, second])
    assert metric_means(output) == pytest.approx(
        {"accuracy": 0.5, "margin": -0.25, "mean_reward": 0.625, "min_reward": -1.0, "max_reward": 2.0}
    )


def test_centering_by_hand() -> None:
    """0.1 * (2 + 0.5)^2 is added, and 0.2 * 2.5 to both gradients."""
    policy = scored([2.0, 0.5])
    output = BradleyTerry(center_rewards_coefficient=0.1).loss(policy, None)
    assert output.loss["pairs"].item() == pytest.approx(math.log(1 + math.exp(-1.5)) + 0.625)
    (gradient,) = torch.autograd.grad(output.loss["pairs"], policy.tokens)
    slope = 1 / (1 + math.exp(1.5))
    assert gradient.tolist() == pytest.approx([0.5 - slope, 0.5 + slope])


def test_extremes_of_a_step_that_came_in_parts() -> None:
    parts = [BradleyTerry().loss(scored(scores), None).metrics for scores in ([2.0, 0.5], [-1.0, 1.0, 0.0, 0.2])]
    assert value_of([part["min_reward"] for part in parts]) == -1.0
    assert value_of([part["max_reward"] for part in parts]) == 2.0
    assert value_of([part["mean_reward"] for part in parts]) == pytest.approx(2.7 / 6)


def test_settings() -> None:
    with pytest.raises(ValueError, match="center_rewards_coefficient must be greater than 0"):
        BradleyTerry(center_rewards_coefficient=0.0)
