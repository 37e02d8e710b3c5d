"""GRPO against numbers derived by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from preference_batches import logprobs, metric_means, step_loss
from torch import Tensor

from prefold.algorithms import LossOutput
from prefold.algorithms.grpo import GRPO, k3
from prefold.trees.head import Statistics
from prefold.trees.packing import TokenTree

NAN = math.nan


def numbers(*values: float, gradient: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=gradient)


# ---- advantages --------------------------------------------------------------------------------------------------


def test_advantages_by_hand() -> None:
    """1, 2, 3, 6: mean 3, squares 4 + 1 + 0 + 9, over 3: deviation sqrt(14 / 3). The second group is all equal."""
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]], dtype=torch.float64)
    of_group = math.sqrt(14 / 3) + 1e-4
    found = GRPO().advantages(rewards)
    assert found[0].tolist() == pytest.approx([-2 / of_group, -1 / of_group, 0.0, 3 / of_group])
    assert found[1].tolist() == [0.0] * 4
    assert GRPO(scale_rewards="none").advantages(rewards)[0].tolist() == [-2.0, -1.0, 0.0, 3.0]
    # All eight: mean 4, squares 9 + 4 + 1 + 4 + 4 * 1, over 7.
    of_batch = math.sqrt(22 / 7) + 1e-4
    assert GRPO(scale_rewards="batch").advantages(rewards)[0].tolist() == pytest.approx(
        [-2 / of_batch, -1 / of_batch, 0.0, 3 / of_batch]
    )


def test_what_no_reward_speaks_of_has_no_advantage() -> None:
    """1 and 3 are compared with each other; alone, or of none at all, there is nothing to compare."""
    rewards = torch.tensor([[1.0, NAN, 3.0], [NAN, 2.0, NAN], [NAN, NAN, NAN]], dtype=torch.float64)
    for scale, size in (("group", 1 / (math.sqrt(2) + 1e-4)), ("none", 1.0)):
        found = GRPO(scale_rewards=scale).advantages(rewards)  # type: ignore[arg-type]
        assert found[0].tolist() == pytest.approx([-size, 0.0, size])
        assert found[1:].tolist() == [[0.0] * 3] * 2


def test_leave_one_out_by_hand() -> None:
    """Each of 1, 2, 3, 6 less the mean of the other three; 1 and 3 less the other; of a single one nothing."""
    rewards = torch.tensor([[1, 2, 3, 6], [1, NAN, 3, NAN], [NAN, 2, NAN, NAN]], dtype=torch.float64)
    found = GRPO(baseline="leave_one_out", scale_rewards="none").advantages(rewards)
    assert found[0].tolist() == pytest.approx([1 - 11 / 3, 2 - 10 / 3, 0, 6 - 2])
    assert found[1:].tolist() == [[-2.0, 0.0, 2.0, 0.0], [0.0] * 4]
    # The six differences: squares of -8/3, -4/3, 0, 4, -2 and 2, over 5.
    scaled = GRPO(baseline="leave_one_out", scale_rewards="batch").advantages(rewards)
    assert scaled[0, 3].item() == pytest.approx(4 / (math.sqrt((64 / 9 + 16 / 9 + 16 + 8) / 5) + 1e-4))


def test_each_reward_by_itself_by_hand() -> None:
    """Of two rewards of very different size, each says as much as its weight; the second group is equal in both."""
    small = torch.tensor([[0.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
    large = torch.tensor([[3000.0, 1000.0], [7.7, 7.7]], dtype=torch.float64)
    gdpo = GRPO(multi_objective_aggregation="normalize_then_sum")
    found = gdpo.advantages(3 * small + large, [(3.0, small), (1.0, large)])
    # +-(3 - 1) / sqrt(2) in the first group, but for the small number; squares 2 + 2, over 3.
    assert found[0].tolist() == pytest.approx([-math.sqrt(2) / math.sqrt(4 / 3), math.sqrt(2) / math.sqrt(4 / 3)], 1e-3)
    assert found[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_have_no_advantage_at_all(scale: Any) -> None:
    """The mean of three times 0.1 is not 0.1 in floating point."""
    for size, value in itertools.product(range(2, 12), (0.1, 0.3, 1 / 3, -7.7)):
        found = GRPO(scale_rewards=scale).advantages(torch.full((2, size), value, dtype=torch.float64))
        assert found.tolist() == [[0.0] * size] * 2


# ---- losses of tokens --------------------------------------------------------------------------------------------


def test_clipping_by_hand() -> None:
    """A ratio is only held where going on would pay: above for a positive advantage, below for a negative one."""
    ratios = numbers(1.5, 0.5, 1.5, 0.5, 1.1, gradient=True)
    clipped = GRPO(epsilon=0.2, epsilon_high=0.3)
    losses = clipped.token_losses(ratios, numbers(1, 1, -1, -1, -2), numbers(-1, -1, -1, -1, -1))
    assert losses.tolist() == pytest.approx([-1.3, -0.5, 1.5, 0.8, 2.2])
    (slopes,) = torch.autograd.grad(losses.sum(), ratios)
    assert slopes.tolist() == [0.0, -1.0, 1.0, 0.0, 2.0]


def test_two_sided_clipping_by_hand() -> None:
    """A ratio of 9 counts as 4 where the advantage is negative, and as 1.2 where it is positive; 3 as it is."""
    ratios = numbers(9, 9, 3, 0.5, gradient=True)
    losses = GRPO(delta=4.0).token_losses(ratios, numbers(-1, 1, -1, -1), numbers(-1, -1, -1, -1))
    assert losses.tolist() == pytest.approx([4.0, -1.2, 3.0, 0.8])
    (slopes,) = torch.autograd.grad(losses.sum(), ratios)
    assert slopes.tolist() == [0.0, 0.0, 1.0, 0.0]


def test_cispo_by_hand() -> None:
    """A ratio of 2 weighs 1.5 and still has a gradient; one of 0.5 weighs 0.5."""
    ratios, tokens = numbers(2, 0.5, gradient=True), numbers(-2, -3, gradient=True)
    losses = GRPO(loss_type="cispo", epsilon_high=1.5).token_losses(ratios, numbers(1, -1), tokens)
    assert losses.tolist() == [3.0, -1.5]
    (slopes,) = torch.autograd.grad(losses.sum(), tokens)
    assert slopes.tolist() == [-1.5, 0.5]


def test_divergence_by_hand() -> None:
    """Reference twice, half and equally likely: 2 - ln 2 - 1, 1/2 + ln 2 - 1, 0."""
    tokens = numbers(-1, -1, -1, gradient=True)
    found = k3(tokens, numbers(-1 + math.log(2), -1 - math.log(2), -1))
    assert found.tolist() == pytest.approx([1 - math.log(2), math.log(2) - 0.5, 0.0])
    (slopes,) = torch.autograd.grad(found.sum(), tokens)
    assert slopes.tolist() == pytest.approx([-1.0, 0.5, 0.0])


# ---- the loss of a step ------------------------------------------------------------------------------------------

TREES = [TokenTree((1,), ((2,), (2, 2, 2)))]
"""Completions of one and of three tokens."""


def loss_of(
    algorithm: GRPO,
    ratios: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    advantages: Sequence[float] = (1.0, -1.0),
    reference: Sequence[float] | None = None,
) -> tuple[LossOutput, float, list[float]]:
    """Output, loss and gradient by the log-probs, which are ln 1/2 each; `reference` is relative to them."""
    tokens = torch.full((4,), math.log(0.5), dtype=torch.float64).requires_grad_()
    old = tokens.detach() - numbers(*ratios).log()
    nothing = torch.zeros(4, dtype=torch.float64)
    policy = logprobs(
        tokens,
        [1, 3],
        statistics=Statistics(nothing + 0.25, nothing, nothing > 0),
        extras={"advantages": numbers(*advantages), **({} if ratios == (1.0, 1.0, 1.0, 1.0) else {"old": old})},
    )
    other = None if reference is None else logprobs(tokens.detach() + numbers(*reference), [1, 3])
    output = algorithm.loss(policy, other)
    total = step_loss(output, algorithm, TREES)
    (gradient,) = torch.autograd.grad(total, tokens)
    return output, total.item(), gradient.tolist()


def make(**settings: Any) -> GRPO:
    return GRPO(num_generations=2, max_completion_length=10, **settings)


@pytest.mark.parametrize(
    ("settings", "loss", "gradient"),
    [
        ({"loss_type": "grpo"}, 0.0, [-1 / 2, *[1 / 6] * 3]),
        ({"loss_type": "dapo"}, 2 / 4, [-1 / 4, *[1 / 4] * 3]),
        ({"loss_type": "bnpo"}, 2 / 4, [-1 / 4, *[1 / 4] * 3]),
        ({"loss_type": "dr_grpo"}, 2 / 20, [-1 / 20, *[1 / 20] * 3]),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, 2 * math.log(0.5) / 4, [-1 / 4, *[1 / 4] * 3]),
        ({"loss_type": "dapo", "importance_sampling_level": "sequence"}, 2 / 4, [-1 / 4, *[1 / 4] * 3]),
    ],
    ids=lambda value: ",".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_first_step_by_hand(settings: dict[str, Any], loss: float, gradient: list[float]) -> None:
    """Advantages 1 of one token and -1 of three, all ratios 1: each token's gradient is minus its advantage over what
    the variant divides by."""
    output, found, slopes = loss_of(make(**settings))
    assert found == pytest.approx(loss, abs=1e-12)
    assert slopes == pytest.approx(gradient)
    assert metric_means(output)["entropy"] == 0.25


def test_token_and_sequence_ratios_by_hand() -> None:
    """The tokens of the second completion have ratios 2, 1/2 and 1, whose geometric mean is 1."""
    ratios = (1.1, 2.0, 0.5, 1.0)
    output, loss, gradient = loss_of(make(loss_type="dapo", epsilon=0.2), ratios)
    # Of a negative advantage 0.5 is held at 0.8.
    assert loss == pytest.approx((-1.1 + 2.0 + 0.8 + 1.0) / 4)
    assert gradient == pytest.approx([-1.1 / 4, 2 / 4, 0.0, 1 / 4])
    means = metric_means(output)
    assert means["clip_ratio/low_mean"] == means["clip_ratio/region_mean"] == 0.25
    assert means["clip_ratio/high_mean"] == 0.0

    output, loss, gradient = loss_of(make(loss_type="dapo", importance_sampling_level="sequence"), ratios)
    assert loss == pytest.approx((-1.1 + 3 * 1.0) / 4)
    assert gradient == pytest.approx([-1.1 / 4, *[1 / 4] * 3])
    assert metric_means(output)["clip_ratio/region_mean"] == 0.0

    output, _, _ = loss_of(make(importance_sampling_level="sequence", epsilon=0.05), ratios)
    assert metric_means(output)["clip_ratio/high_mean"] == 0.5  # one of two completions


def test_divergence_in_the_loss_by_hand() -> None:
    """No advantages, one token whose reference is twice as likely: its gradient is that of k3, -1, times beta; with the
    correction it is log(pi / pi_ref) = -ln 2, that of the reverse KL divergence."""
    for corrected, slope in ((False, -1.0), (True, -math.log(2))):
        algorithm = make(beta=0.5, use_bias_correction_kl=corrected)
        output, loss, gradient = loss_of(algorithm, advantages=(0.0, 0.0), reference=(math.log(2), 0, 0, 0))
        assert loss == pytest.approx(0.5 * (1 - math.log(2)) / 4)
        assert gradient == pytest.approx([0.5 * slope / 4, 0, 0, 0])
        assert metric_means(output)["kl"] == pytest.approx((1 - math.log(2)) / 4)


@pytest.mark.parametrize(
    ("mode", "bounds", "weights"),
    [
        ("none", {}, [1.0, 1.0, 1.0, 1.0]),
        ("token_truncate", {}, [3.0, 2.0, 0.5, 0.25]),
        ("token_truncate", {"clip_min": 0.4}, [3.0, 2.0, 0.5, 0.4]),
        ("token_mask", {}, [0.0, 2.0, 0.5, 0.25]),
        ("token_mask", {"clip_min": 0.4}, [0.0, 2.0, 0.5, 0.0]),
        ("sequence_truncate", {}, [3.0, 0.25, 0.25, 0.25]),
        ("sequence_truncate", {"clip_max": None, "clip_min": 0.5}, [4.0, 0.5, 0.5, 0.5]),
        ("sequence_mask", {}, [0.0, 0.25, 0.25, 0.25]),
        ("sequence_mask", {"clip_max": None}, [4.0, 0.25, 0.25, 0.25]),
    ],
)
def test_weights_of_what_servers_draw_by_hand(mode: Any, bounds: dict[str, Any], weights: list[float]) -> None:
    """To the policy the first completion's token is 4 times as likely as to the server, those of the second 2, 1/2 and
    1/4 times, together 1/4. The weights multiply the losses and their gradients, and nothing of the divergence."""
    bounds = {f"importance_sampling_{name}": value for name, value in bounds.items()}
    algorithm = make(loss_type="dapo", beta=0.5, importance_sampling_correction=mode, **bounds)
    tokens = torch.full((4,), math.log(0.5), dtype=torch.float64).requires_grad_()
    nothing = torch.zeros(4, dtype=torch.float64)
    served = tokens.detach() - numbers(4, 2, 0.5, 0.25).log()
    extras = {"advantages": numbers(1.0, -1.0), "served": served}
    policy = logprobs(tokens, [1, 3], statistics=Statistics(nothing, nothing, nothing > 0), extras=extras)
    output = algorithm.loss(policy, logprobs(tokens.detach() + numbers(math.log(2), 0, 0, 0), [1, 3]))
    total = step_loss(output, algorithm, TREES)
    (gradient,) = torch.autograd.grad(total, tokens)
    divergence = 0.5 * (1 - math.log(2)) / 4
    assert total.item() == pytest.approx((-weights[0] + sum(weights[1:])) / 4 + divergence)
    slopes = [-weights[0] / 4 - 0.5 * math.log(2) / 4, *(weight / 4 for weight in weights[1:])]
    assert gradient.tolist() == pytest.approx(slopes)
    means = metric_means(output)
    assert means["sampling/sampling_logp_difference/mean"] == pytest.approx((2 + 1 + 1 + 2) * math.log(2) / 4)
    name = "sampling/importance_sampling_ratio"
    each = weights if mode.startswith("token") else weights[:2]
    assert mode == "none" or means[f"{name}/mean"] == pytest.approx(sum(each) / len(each))
    assert mode == "none" or float(output.metrics[f"{name}/max"][0]) == pytest.approx(max(each))


def test_equal_rewards_teach_nothing() -> None:
    assert loss_of(make(), advantages=(0.0, 0.0))[2] == [0.0] * 4


def test_units_count_completions_that_are_left_out() -> None:
    trees = [TokenTree((1,), ((2, 2),)), TokenTree((1,), ())]
    assert make(loss_type="grpo").units(trees) == {"completions": 4}
    assert make(loss_type="dapo").units(trees) == {"completion_tokens": 2}
    assert make(loss_type="dapo").units(trees[1:]) == {"completion_tokens": 1}


# ---- settings ----------------------------------------------------------------------------------------------------


def test_needs() -> None:
    assert GRPO().kind.samples and not GRPO().needs_reference and GRPO(beta=0.1).needs_reference
    assert GRPO(num_iterations=3).iterations == 3 and GRPO().iterations == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 1}, "num_generations must be 2 or more, got 1"),
        ({"temperature": 0.0}, "temperature must be greater than 0"),
        ({"epsilon": 0.0}, "epsilon must be greater than 0"),
        ({"epsilon_high": -1.0}, "epsilon_high must be greater than 0"),
        ({"num_iterations": 0}, "num_iterations must be greater than 0"),
        ({"max_completion_length": 0}, "max_completion_length must be greater than 0"),
        ({"beta": -0.1}, "beta must be at least 0"),
        ({"top_p": 0.0}, "top_p must be greater than 0 and at most 1"),
        ({"min_p": 1.5}, "min_p must be at least 0 and less than 1"),
        ({"loss_type": "sapo"}, "loss_type must be one of grpo, bnpo, dr_grpo, dapo, cispo"),
        ({"scale_rewards": "yes"}, "scale_rewards must be one of"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level must be one of token, sequence"),
        ({"loss_type": "cispo"}, "cispo clips at `epsilon_high` alone"),
        ({"loss_type": "cispo", "epsilon_high": 5.0, "epsilon": 0.1}, "cispo clips at `epsilon_high` alone"),
        ({"loss_type": "cispo", "epsilon_high": 5.0, "delta": 9.0}, "remove `delta`"),
        ({"delta": 0.0}, "delta must be greater than 0"),
        ({"delta": 1.2}, "delta must be greater than 1 \\+ epsilon_high, here 1.2, got 1.2"),
        ({"delta": 1.25, "epsilon_high": 0.3}, "delta must be greater than 1 \\+ epsilon_high, here 1.3, got 1.25"),
        (
            {"importance_sampling_clip_min": 3.0},
            "importance_sampling_clip_min must be less than importance_sampling_clip_max, got 3.0 and 3.0",
        ),
        (
            {"importance_sampling_correction": "token_truncate", "importance_sampling_clip_max": None},
            "importance_sampling_correction holds weights within bounds, and has none",
        ),
        ({"resample": -1}, "resample must be at least 0"),
        ({"baseline": "leave_one_out"}, "set `scale_rewards: none`, or `batch`"),
        ({"baseline": "others"}, "baseline must be one of mean, leave_one_out"),
        ({"multi_objective_aggregation": "sum"}, "multi_objective_aggregation must be one of"),
        ({"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "none"}, "remove `scale_rewards`"),
        ({"multi_objective_aggregation": "normalize_then_sum", "baseline": "leave_one_out"}, "remove `baseline`"),
    ],
    ids=lambda value: ",".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRPO(**settings)
