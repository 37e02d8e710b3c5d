"""BCO against numbers derived by hand: the classifier, and the mean reward that is carried from step to step."""

from __future__ import annotations

import math

import pytest
import torch
from of_pairs import by_ratios, scored

from prefold.algorithms.bco import BCO


def softplus(value: float) -> float:
    return math.log(1 + math.exp(value))


def test_without_shift_by_hand() -> None:
    """Rewards 1 and -2: ln(1 + e^-1) + ln(1 + e^-2)."""
    output, gradient = by_ratios(BCO(beta=0.5, reward_shift=False), 2.0, -4.0)
    assert output.loss["pairs"].item() == pytest.approx(softplus(-1) + softplus(-2))
    assert gradient[0] < 0 < gradient[1]
    assert not output.state
    assert not BCO(reward_shift=False).couples_step and BCO().couples_step


def test_shift_by_hand() -> None:
    """Step 1: rewards 1 and 3 of one pair, mean 2: -ln s(1 - 2) - ln s(2 - 3). Step 2: rewards 4, 4, 0, 0 of two pairs;
    the mean of all six is 2 again, where a mean of the two steps' would be 2, too: so step 3 tells, rewards 8 and 8:
    mean of all eight is 3.5, mean of the three steps' means would be 4."""
    algorithm = BCO(beta=1.0)
    first = algorithm.loss(scored([1.0, 3.0]), scored([0.0, 0.0]))
    assert first.loss["pairs"].item() == pytest.approx(softplus(1) + softplus(1))
    assert dict(first.state) == pytest.approx({"mean": 2.0, "count": 2.0})
    second = algorithm.loss(scored([4.0, 4.0, 0.0, 0.0]), scored([0.0] * 4), first.state)
    assert second.loss["pairs"].item() == pytest.approx(softplus(-2) + softplus(2) + softplus(2) + softplus(-2))
    third = algorithm.loss(scored([8.0, 8.0]), scored([0.0, 0.0]), second.state)
    assert dict(third.state) == pytest.approx({"mean": 3.5, "count": 8.0})
    assert third.loss["pairs"].item() == pytest.approx(softplus(-4.5) + softplus(4.5))


def test_a_step_can_be_done_again() -> None:
    state = {"mean": 0.5, "count": 4.0}
    once, again = (BCO(beta=1.0).loss(scored([1.0, 3.0]), scored([0.0, 0.0]), state) for _ in range(2))
    assert once.loss["pairs"] == again.loss["pairs"] and once.state == again.state
    assert state == {"mean": 0.5, "count": 4.0}


def test_no_gradient_through_the_shift() -> None:
    """Rewards 1 and 3, shift 2: by the chosen one -s(1), by the rejected one s(1), as if 2 were a constant."""
    _, gradient = by_ratios(BCO(beta=1.0), 1.0, 3.0)
    slope = 1 / (1 + math.exp(-1))
    assert gradient.tolist() == pytest.approx([-slope, slope])


def test_state_is_plain_numbers() -> None:
    policy = scored([1.0, 3.0])
    state = BCO().loss(policy, scored([0.0, 0.0])).state
    assert all(type(value) is float for value in state.values())
    assert not torch.is_tensor(state)
