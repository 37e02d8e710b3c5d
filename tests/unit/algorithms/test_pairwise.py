"""What the losses of pairs share: LD-DPO's tails, WPO's weights, f-divergences, and which settings go together."""

from __future__ import annotations

import math

import pytest
import torch
from preference_batches import case, logprobs

from prefold.algorithms.divergence import divergence_scores
from prefold.algorithms.dpo import DPO
from prefold.algorithms.hinge import Hinge
from prefold.algorithms.ipo import IPO
from prefold.algorithms.pairwise import discount_tails, pair_weights
from prefold.trees.head import Statistics


def test_tails_by_hand() -> None:
    """Lengths 3 and 1: one token is shared, two lie behind it. Lengths 2 and 2: all are shared."""
    found = discount_tails(logprobs(torch.tensor([-1.0, -2.0, -4.0, -8.0, -1.0, -1.0, -3.0, -3.0]), [3, 1, 2, 2]), 0.5)
    assert found.tokens.tolist() == [-1.0, -1.0, -2.0, -8.0, -1.0, -1.0, -3.0, -3.0]


def test_no_tail_weight_is_a_weight_of_one() -> None:
    pairs = case("ordinary")
    plain, whole, cut = (
        DPO(ld_alpha=alpha).loss(pairs.policy, pairs.reference).loss["pairs"] for alpha in (None, 1.0, 0.0)
    )
    assert plain == whole != cut


def test_weights_by_hand() -> None:
    """Two tokens of probability 1/2 where the squares sum to 1/4 and 1: ratios 2 and 1/2, geometric mean 1. One token
    of probability 1/4 with squares of 1/2: 1/2. The pair weighs 1 * 1/2."""
    squares = torch.tensor([0.25, 1.0, 0.5], dtype=torch.float64)
    policy = logprobs(
        torch.tensor([0.5, 0.5, 0.25], dtype=torch.float64).log().requires_grad_(),
        [2, 1],
        statistics=Statistics(squares, squares, squares.bool()),
    )
    weights = pair_weights(policy)
    assert weights.tolist() == pytest.approx([0.5])
    assert not weights.requires_grad


def test_weights_scale_each_pair() -> None:
    pairs = case("ordinary")
    plain = torch.autograd.grad(DPO().loss(pairs.policy, pairs.reference).loss["pairs"], pairs.policy.tokens)[0]
    weighted = torch.autograd.grad(
        DPO(use_weighting=True).loss(pairs.policy, pairs.reference).loss["pairs"], pairs.policy.tokens
    )[0]
    per_token = pair_weights(pairs.policy)[pairs.policy.completion // 2]
    torch.testing.assert_close(weighted, plain * per_token)
    assert DPO(use_weighting=True).needs_statistics and not DPO().needs_statistics


@pytest.mark.parametrize(
    ("kind", "alpha", "at_two", "at_half"),
    [
        ("reverse_kl", 0.5, math.log(2), -math.log(2)),
        ("forward_kl", 0.5, 1 - 1 / 2, 1 - 2),
        ("js_divergence", 0.5, math.log(4 / 3), math.log(2 / 3)),
        ("alpha_divergence", 0.5, (2**-0.5 - 1) / -0.5, (2**0.5 - 1) / -0.5),
        ("alpha_divergence", 0.0, 1 - 1 / 2, 1 - 2),
        ("alpha_divergence", 1.0, math.log(2), -math.log(2)),
    ],
)
def test_divergences_by_hand(kind: str, alpha: float, at_two: float, at_half: float) -> None:
    """Ratios of 2, 1 and 1/2 in the derivative of f, which is 0 at 1."""
    ratios = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64).log()
    scores = divergence_scores(ratios, kind, alpha)  # type: ignore[arg-type]
    assert scores.tolist() == pytest.approx([at_two, 0.0, at_half], abs=1e-12)


@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_divergences_stay_finite(kind: str, alpha: float) -> None:
    ratios = torch.tensor([-1e3, 0.0, 1e3], requires_grad=True)
    scores = divergence_scores(ratios, kind, alpha)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(scores.sum(), ratios)
    assert scores.isfinite().all() and gradient.isfinite().all()
    assert (scores.diff() >= 0).all()


def test_settings_that_would_change_nothing() -> None:
    with pytest.raises(
        ValueError, match="f_alpha_divergence_coef is used by `f_divergence_type: alpha_divergence` only"
    ):
        Hinge(f_alpha_divergence_coef=0.3)
    with pytest.raises(ValueError, match="f_divergence_type must be one of reverse_kl, "):
        IPO(f_divergence_type="kl")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ld_alpha must be from 0 to 1, got"):
        DPO(ld_alpha=1.5)
