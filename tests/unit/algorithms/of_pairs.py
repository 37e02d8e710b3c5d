"""Pairs made by hand: completions of given lengths whose log-probs lie in their first tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from preference_batches import logprobs
from torch import Tensor

from prefold.algorithms import Algorithm, LossOutput
from prefold.algorithms.pairwise import Pairs
from prefold.trees.logprobs import TreeLogprobs


def scored(sums: Sequence[float], lengths: Sequence[int] | None = None) -> TreeLogprobs:
    """Completions of these summed log-probs, as a leaf that takes gradients; of one token each unless said."""
    lengths = [1] * len(sums) if lengths is None else lengths
    tokens = [value for total, length in zip(sums, lengths, strict=True) for value in (total, *[0.0] * (length - 1))]
    return logprobs(torch.tensor(tokens, dtype=torch.float64, requires_grad=True), lengths)


def by_ratios(algorithm: Algorithm, *ratios: float, lengths: Sequence[int] | None = None) -> tuple[LossOutput, Tensor]:
    """Loss and its gradient by the first token of each completion, for log-ratios of chosen and rejected completions in
    turn against a reference of -10 nats."""
    policy = scored([ratio - 10 for ratio in ratios], lengths)
    output = algorithm.loss(policy, scored([-10.0] * len(ratios), lengths))
    (gradient,) = torch.autograd.grad(torch.stack(list(output.loss.values())).sum(), policy.tokens)
    return output, gradient[policy.lengths.cumsum(0) - policy.lengths]


def pairs_apart(difference: Tensor) -> Pairs:
    """Pairs of one token each whose log-ratios differ by this; the rejected completion is as likely as before."""
    same, one_token = torch.zeros_like(difference), torch.ones_like(difference)
    return Pairs(difference, same, same, same, one_token, one_token)
