"""Batches of log-probs for the tests of the losses: random ones, extreme ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefold.algorithms import Algorithm, LossOutput
from prefold.training.loop import value_of
from prefold.trees.head import Statistics
from prefold.trees.logprobs import TreeLogprobs
from prefold.trees.packing import TokenTree


@dataclass(frozen=True)
class Batch:
    """Log-probs of trees with two completions each; `policy.tokens` is a leaf that takes gradients."""

    policy: TreeLogprobs
    reference: TreeLogprobs
    trees: list[TokenTree]


def logprobs(tokens: Tensor, lengths: Sequence[int], **others: Any) -> TreeLogprobs:
    """Completions of these lengths, their tokens' log-probs end to end."""
    counts = torch.tensor(lengths)
    return TreeLogprobs(tokens, torch.arange(len(counts)).repeat_interleave(counts), counts, **others)


def batch(policy: Tensor, reference: Tensor, lengths: Sequence[int], squares: Tensor | None = None) -> Batch:
    """Pairs whose completions have these log-probs, with prompts of 3 to 6 tokens; all token ids are 5.

    Args:
        policy, reference: of all tokens, end to end.
        squares: sum of squared probabilities where each was predicted.
    """
    trees = [
        TokenTree((5,) * (3 + i % 4), ((5,) * lengths[2 * i], (5,) * lengths[2 * i + 1]))
        for i in range(len(lengths) // 2)
    ]
    squares = torch.full_like(policy, 0.4) if squares is None else squares
    statistics = Statistics(torch.zeros_like(squares), squares, torch.zeros_like(squares, dtype=torch.bool))
    scored = logprobs(policy.detach().clone().requires_grad_(), lengths, statistics=statistics)
    return Batch(scored, logprobs(reference, lengths), trees)


def random_batch(
    lengths: Sequence[int], apart: float = 0.3, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Batch:
    """Tokens of 1.5 nats on average; the reference's differ by `apart` nats of standard deviation."""
    draw = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    policy = 1.5 * torch.rand(count, generator=draw, dtype=torch.float64).log()
    reference = policy + apart * torch.randn(count, generator=draw, dtype=torch.float64)
    squares = 0.1 + 0.8 * torch.rand(count, generator=draw, dtype=torch.float64)
    return batch(policy.to(dtype), reference.to(dtype), lengths, squares.to(dtype))


CASES = ("ordinary", "extreme", "equal", "single tokens", "2000 tokens")


def case(name: str, dtype: torch.dtype = torch.float64) -> Batch:
    if name == "extreme":
        policy = torch.tensor([-1e3, -1e-3, -1e-3, -1e3, -1e3, -1e3, -50.0, -1e-6], dtype=dtype)
        return batch(policy, torch.full_like(policy, -2.0), [1] * 8)
    if name == "equal":
        even = torch.full((8,), -1.5, dtype=dtype)
        return batch(even, even.clone(), [2] * 4)
    lengths = {"ordinary": [5, 3, 1, 7, 4, 4, 2, 9], "single tokens": [1] * 12, "2000 tokens": [2000, 1500, 3, 2000]}
    return random_batch(lengths[name], apart=0.02 if name == "2000 tokens" else 0.3, dtype=dtype)


def step_loss(output: LossOutput, algorithm: Algorithm, trees: Sequence[TokenTree]) -> Tensor:
    """What the training step makes of the sums."""
    units = algorithm.units(trees)
    return torch.stack([total / units[unit] for unit, total in output.loss.items()]).sum()


def metric_means(output: LossOutput) -> dict[str, float]:
    return {name: value_of([metric]) for name, metric in output.metrics.items()}
