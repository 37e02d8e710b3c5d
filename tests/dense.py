"""The definition that the engine is held against: dense attention and full logits, one completion at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from families import StayDouble
from tiny import gradients
from torch import Tensor, nn

from prefold.trees.attention import unwrapped, using_attention
from prefold.trees.packing import TokenTree

Outcome = tuple[Tensor, dict[str, Tensor]]


def dense_logprobs(model: nn.Module, trees: list[TokenTree], temperature: float = 1.0) -> Tensor:
    """One completion at a time, unpadded, full logits, and then without those of its context: the definition."""
    scored = []
    with using_attention(unwrapped(model), "dense_for_tests"):
        for tree in trees:
            for ids, is_scored in zip(tree.completions, masks(tree), strict=True):
                row = torch.tensor([tree.prompt + ids])
                logits = model(input_ids=row, use_cache=False).logits[0, -len(ids) - 1 : -1] / temperature
                logprobs = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).squeeze(-1)
                scored.append(logprobs[is_scored])
    return torch.cat(scored)


def masks(tree: TokenTree) -> list[Tensor]:
    """For each completion, True where a token is scored."""
    scored = [torch.ones(len(ids), dtype=torch.bool) for ids in tree.completions]
    for mask, spans in zip(scored, tree.context, strict=False):
        for start, stop in spans:
            mask[start:stop] = False
    return scored


def outcome(model: nn.Module, logprobs: Callable[[], Tensor]) -> Outcome:
    """Log-probs, and the gradients of a sum that weights every token differently."""
    model.zero_grad()
    tokens = logprobs()
    (tokens * torch.linspace(-1, 2, len(tokens), dtype=tokens.dtype)).sum().backward()
    return tokens.detach(), gradients(model)


def assert_same(found: Outcome, wanted: Outcome, tolerance: float) -> None:
    """Relative: log-probs by the largest of them, gradients by their norm."""
    assert (found[0] - wanted[0]).abs().max() <= tolerance * wanted[0].abs().max()
    assert found[1].keys() == wanted[1].keys()
    assert all(gradient.norm() > 0 for gradient in wanted[1].values())
    for name, gradient in wanted[1].items():
        assert (found[1][name] - gradient).norm() <= tolerance * gradient.norm(), name


@contextmanager
def exactly(dtype: torch.dtype) -> Iterator[None]:
    with StayDouble() if dtype == torch.float64 else nullcontext():
        yield
