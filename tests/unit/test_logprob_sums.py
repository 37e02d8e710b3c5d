"""Sums of log-probs by completion."""

from __future__ import annotations

import torch
from preference_batches import logprobs, random_batch

from prefold.trees.logprobs import sums_by


def test_long_completions_lose_nothing_but_the_last_rounding() -> None:
    """About 3,000 nats in float32 are rounded to 1.2e-4 at best."""
    lengths = [2000, 1, 2000, 300]
    exact = random_batch(lengths).policy
    rounded = logprobs(exact.tokens.float(), lengths)
    wanted = torch.stack([part.sum() for part in rounded.tokens.double().split(lengths)])
    assert rounded.sums().dtype == torch.float32
    assert (rounded.sums().double() - wanted).abs().max() < 1.3e-4


def test_an_owner_of_nothing_has_zero() -> None:
    values = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    sums = sums_by(torch.tensor([0, 2, 0]), values, 3)
    assert sums.tolist() == [5.0, 0.0, 2.0]
    (gradient,) = torch.autograd.grad(sums[0] * 3, values)
    assert gradient.tolist() == [3.0, 0.0, 3.0]
