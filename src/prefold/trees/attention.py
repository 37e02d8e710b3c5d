"""The prefix attention, the choice between packed and plain, and the self-check that guards it.

The only module that knows an attention backend. One function is registered with transformers under a name of our own
that the mask interface does not know, so models build no mask; the layout of the row reaches it as the keyword `trees`,
which every model's `forward(**kwargs)` hands down.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from prefold.errors import StageError
from prefold.trees.logprobs import TreeLogprobs, head_obstacle, packed_logprobs, plain_logprobs
from prefold.trees.packing import PackedTrees, Span, TokenTree, pack, split_by_budget

NAME = "prefold_trees"

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.25}
"""Largest difference of a token's log-prob, in nats, that rounding in a dtype explains."""

logger = logging.getLogger("prefold")


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    trees: PackedTrees | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over a packed row: prompts causally to themselves, completions to their prompt and to themselves.

    Args:
        query: `[1, heads, T, D]`; key, value: `[1, key heads, T, D]`.
        trees: the layout of the row.

    Returns:
        `[1, T, heads, D]` and None for the weights.

    Raises:
        NotImplementedError: for what this function cannot honour; the self-check turns it into the plain path.
    """
    refused = {"softcap": softcap, "dropout": dropout or None, "s_aux": kwargs.get("s_aux"), "mask": attention_mask}
    for name, given in refused.items():
        if given is not None:
            raise NotImplementedError(f"the tree attention has no {name}")
    if trees is None:
        raise NotImplementedError("the model does not hand the layout of the row to its attention layers")

    def attend(queries: Span, key_spans: list[Span]) -> Tensor:
        keys, values = (_gather(states, key_spans) for states in (key, value))
        rows, columns = queries[1] - queries[0], keys.shape[2]
        masked = rows != columns or (sliding_window is not None and columns > sliding_window)
        return scaled_dot_product_attention(
            query[:, :, slice(*queries)],
            keys,
            values,
            attn_mask=_lower_right(rows, columns, sliding_window, query.device) if masked else None,
            is_causal=not masked,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    pieces: list[Tensor] = []
    for block in trees.blocks:
        pieces.append(attend(block.prompt, [block.prompt]))
        pieces += [attend(completion, [block.prompt, completion]) for completion in block.completions]
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def _gather(states: Tensor, spans: list[Span]) -> Tensor:
    parts = [states[:, :, slice(*span)] for span in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


@lru_cache(maxsize=256)
def _lower_right(rows: int, columns: int, window: int | None, device: torch.device) -> Tensor:
    """`[rows, columns]`, True where the last `rows` positions of `columns` may look: at or before themselves, and less
    than `window` positions back."""
    query = torch.arange(columns - rows, columns, device=device)[:, None]
    distance = query - torch.arange(columns, device=device)[None]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


AttentionInterface.register(NAME, tree_attention)


@contextmanager
def using_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Switch the attention implementation of a model for a while."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


# ---- packed or plain --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scorer:
    """How the log-probs of trees are computed with one model: packed, or the plain way and why."""

    model: nn.Module
    max_tokens: int
    packed: bool
    reason: str = ""
    """Why the plain path is taken; empty when packed."""

    def score(self, trees: Sequence[TokenTree], model: nn.Module | None = None) -> TreeLogprobs:
        """Log-probs of the trees' completions, all in one row when packed.

        Args:
            model: the wrapped model to call instead of `self.model` (DDP, FSDP, autocast).
        """
        called = self.model if model is None else model
        row = pack(trees, next(self.model.parameters()).device)
        if not self.packed:
            return plain_logprobs(called, row, self.max_tokens)
        with self.attention():
            return packed_logprobs(called, row)

    def attention(self) -> AbstractContextManager[None]:
        """Keeps the attention in place for a backward pass too, where gradient checkpointing runs the layers again."""
        return using_attention(unwrapped(self.model), NAME) if self.packed else nullcontext()

    def rows(self, trees: Sequence[TokenTree]) -> list[list[int]]:
        """Indices of the trees of each micro-batch of at most `max_tokens`."""
        return split_by_budget([tree.size if self.packed else tree.plain_size for tree in trees], self.max_tokens)


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, return-value]


def choose_scorer(model: nn.Module, trees: Sequence[TokenTree], max_tokens: int, setting: str = "auto") -> Scorer:
    """Packed if the model allows it and the self-check on `trees` passes, else plain, with the reason in the log.

    Args:
        setting: `model.attn_implementation` of the recipe; `trees` raises instead of falling back.

    Raises:
        StageError: `trees` was asked for and cannot be had.
    """
    if setting in ("sdpa", "eager"):
        return Scorer(model, max_tokens, packed=False, reason=f"the recipe asks for {setting}")
    reason = obstacle(model) or failed_self_check(model, trees)
    if reason is None:
        return Scorer(model, max_tokens, packed=True)
    if setting == "trees":
        raise StageError(f"`model.attn_implementation: trees` cannot be had for this model: {reason}")
    logger.warning("prompts are encoded once per completion (plain path): %s", reason)
    return Scorer(model, max_tokens, packed=False, reason=reason)


def obstacle(model: nn.Module) -> str | None:
    """What about the model is known to rule packing out, or None."""
    if not unwrapped(model)._can_set_attn_implementation():
        return "its attention cannot be replaced"
    return head_obstacle(unwrapped(model))


@torch.no_grad()
def failed_self_check(model: nn.Module, trees: Sequence[TokenTree]) -> str | None:
    """Compare packed with plain log-probs of a few real trees; say what is wrong, or None.

    The trees are checked together in one row, so that a token that sees a neighbouring tree shows as well.
    """
    dtype = unwrapped(model).dtype
    training = model.training
    model.eval()
    try:
        packed = Scorer(model, 0, packed=True).score(trees)
    except (NotImplementedError, TypeError, RuntimeError) as error:
        return f"its packed forward pass failed ({str(error).splitlines()[0]})"
    finally:
        model.train(training)
    model.eval()
    plain = Scorer(model, max(tree.plain_size for tree in trees), packed=False).score(trees)
    model.train(training)
    difference = float((packed.tokens - plain.tokens).abs().max())
    if not difference <= TOLERANCE[dtype]:
        return (
            f"packed log-probs differ from plain ones by {difference:.2g} nats, {dtype} explains {TOLERANCE[dtype]:.2g}"
        )
    return None
