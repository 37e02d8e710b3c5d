"""The scorer: log-probs of trees under one model, in rows within a token budget, packed or plain."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import nn
from transformers.distributed.fsdp import is_fsdp_managed_module

from prefold import ranks
from prefold.errors import StageError
from prefold.terminal import progress_bar
from prefold.trees.attention import candidates, evaluating, unwrapped, using_attention
from prefold.trees.budget import attempt, from_all, lowered, row_by_row, split_by_budget
from prefold.trees.logprobs import TreeLogprobs, packed_logprobs, plain_logprobs
from prefold.trees.memory import free_memory
from prefold.trees.packing import TokenTree, pack
from prefold.trees.self_check import (
    NONE_IS_RIGHT,
    choose_attention,
    obstacle,
    packing_fault,
    revealing,
    stretched_positions,
    window_of,
)

T = TypeVar("T")

PADDING = TokenTree((0,), ((0,),))
"""The smallest tree that can be scored, for passes that only the other processes need."""

TIMED_TOKENS = 4096
"""Largest row of whole trees on which the attention backends are timed."""
OUT_OF_MEMORY = (
    "out of memory in the self-check with {}; take a smaller model or `load_in_4bit`, or a `model.attn_implementation` "
    "that needs no check (sdpa; eager for attention with a soft-cap)"
)

logger = logging.getLogger("prefold")


@dataclass
class Scorer:
    """Computes log-probs of trees under one model.

    `attention` is the name of the backend, None for the plain path; then `reason` says why. `max_tokens` is the budget
    of a micro-batch. `one_by_one`: plain rows must not share a batch. `temperature` divides the logits, as in sampling.
    """

    model: nn.Module
    max_tokens: int
    attention: str | None
    reason: str = ""
    one_by_one: bool = False
    temperature: float = 1.0

    @property
    def packed(self) -> bool:
        return self.attention is not None

    def score(self, trees: Sequence[TokenTree], statistics: bool = False, scores_prompt: bool = False) -> TreeLogprobs:
        """Log-probs of the trees' completions, all in one row when packed.

        Args:
            statistics: also entropy, squares and top-1 of every scored position.
            scores_prompt: also the log-probs of the prompts.
        """
        row = pack(trees, next(self.model.parameters()).device, scores_prompt)
        if self.packed:
            with self.in_place():
                return packed_logprobs(self.model, row, statistics, self.temperature)
        max_tokens = 0 if self.one_by_one else self.max_tokens
        return plain_logprobs(self.model, row, max_tokens, statistics, self.temperature)

    def in_place(self) -> AbstractContextManager[None]:
        """While open, the model uses the scorer's attention; for a backward pass too, in which gradient checkpointing
        runs the layers again."""
        return nullcontext() if self.attention is None else using_attention(self.model, self.attention)

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the weights, so that every pass involves all processes."""
        return is_fsdp_managed_module(unwrapped(self.model))

    def size(self, tree: TokenTree) -> int:
        """Tokens of a tree as this model computes it."""
        return tree.size if self.packed else tree.plain_size

    def rows(self, trees: Sequence[TokenTree], indices: Iterable[int] | None = None) -> list[list[int]]:
        """Indices of the trees of each micro-batch of at most `max_tokens`: of all trees, or of those at `indices`.
        Trees without completions are left out."""
        indices = range(len(trees)) if indices is None else indices
        scored = [i for i in indices if trees[i].completions]
        rows = split_by_budget([self.size(trees[i]) for i in scored], self.max_tokens)
        return [[scored[i] for i in row] for row in rows]

    def share(self, trees: Sequence[TokenTree]) -> list[int]:
        """Indices of the trees that this process scores: in a single process all that have completions, else its share
        of them, balanced by tokens."""
        scored = [i for i, tree in enumerate(trees) if tree.completions]
        return [scored[i] for i in ranks.share([self.size(trees[i]) for i in scored])]

    def behind(self, rows: Sequence[list[int]]) -> int:
        """How many passes this process has to make besides those of its rows: with sharded weights, all processes make
        the same number."""
        return ranks.missing(len(rows)) if self.sharded else 0

    def scored(
        self, trees: Sequence[TokenTree], statistics: bool = False, scores_prompt: bool = False
    ) -> Iterator[tuple[list[int], TreeLogprobs]]:
        """Log-probs of many trees, row by row with the indices of each row's trees, for use without gradients.

        Several processes score a share each, and all of them get all results.

        Raises:
            StageError: out of memory with a single tree.
        """

        def score(row: list[int]) -> TreeLogprobs | None:
            return self.attempt(partial(self.score, [trees[i] for i in row], statistics, scores_prompt))

        def smaller(row: list[int], left: list[int]) -> list[list[int]]:
            self.lower_budget([trees[i] for i in row])
            return self.rows(trees, left)

        rows = self.rows(trees, self.share(trees))
        for _ in range(self.behind(rows)):
            self.score([PADDING], statistics, scores_prompt)
        yield from from_all(row_by_row(rows, score, smaller))

    def attempt(self, perform: Callable[[], T], together: bool = False) -> T | None:
        """The result of `perform`; None if memory ran out, and the budget is to be lowered before the next attempt.

        Args:
            together: all processes perform this at once, and if it fails in one, it fails in all.

        Raises:
            StageError: memory ran out, and the weights are sharded: the others wait for this process's part of them.
        """
        fatal = f"out of memory with rows of {self.max_tokens:,} tokens; lower `train.max_tokens`"
        return attempt(perform, fatal if self.sharded else "", together)

    def lower_budget(self, trees: Sequence[TokenTree]) -> None:
        """Halve the token budget after memory ran out on these trees, until they are split.

        Raises:
            StageError: they cannot be split further.
        """
        sizes = [self.size(tree) for tree in trees if tree.completions]
        single = (
            f"a single prompt and its completions ({max(map(self.size, trees)):,} tokens); set "
            "`train.gradient_checkpointing: true`, lower `data.max_length`, or take a smaller model"
        )
        self.max_tokens = lowered(self.max_tokens, sizes, single, partial(split_by_budget, sizes))


# ---- packed or plain --------------------------------------------------------------------------------------------


def choose_scorer(
    model: nn.Module,
    trees: Sequence[TokenTree],
    max_tokens: int,
    setting: str = "auto",
    longest: int | None = None,
    deepest: TokenTree | None = None,
    dtype: torch.dtype | None = None,
) -> Scorer:
    """Packed if the model allows it and the self-check on `trees` passes, else plain, with the reason in the log.

    Args:
        trees: a few real ones, parts of which are checked in one row, so that attention across trees shows.
        setting: `model.attn_implementation` of the recipe; `trees` raises instead of falling back.
        longest: tokens of the longest prompt with completion to be scored; by default that of `trees`.
        deepest: the longest tree, which is checked as well if it exceeds the model's window.
        dtype: the compute dtype; by default that of the weights.

    Raises:
        StageError: `setting` is `trees` and the model cannot be packed, or out of memory with parts of a single tree.
    """
    longest = max(tree.longest for tree in trees) if longest is None else longest
    stretched = stretched_positions(model, longest)
    scorer = Scorer(model, max_tokens, None, one_by_one=stretched is not None)
    if setting in ("sdpa", "eager"):
        scorer.reason = f"the recipe asks for {setting}"
        return scorer
    base = unwrapped(model)
    dtype, config = dtype or base.dtype, base.config.get_text_config()
    names = candidates(base.device, dtype, config)
    rows = revealing([*trees, *([deepest] if deepest else [])], window_of(config))
    reason = stretched or obstacle(model) or _self_checked(model, names[-1], rows)
    if not reason:
        most = min(max_tokens, TIMED_TOKENS)
        if typical := max((tree for tree in trees if tree.size <= most), key=lambda tree: tree.size, default=None):
            rows.append([typical] * (most // typical.size))
        layouts = [pack(row, base.device) for row in rows]
        choose = partial(choose_attention, model, names, layouts, dtype)
        scorer.attention = ranks.from_first(lambda: attempt(choose, OUT_OF_MEMORY.format("trees")))
        reason = NONE_IS_RIGHT
    if scorer.packed:
        return scorer
    if setting == "trees":
        raise StageError(f"`model.attn_implementation: trees` is not possible with this model: {reason}")
    logger.warning("prompts are encoded once per completion (plain path): %s", reason)
    scorer.reason = reason
    return scorer


def _self_checked(model: nn.Module, attention: str, rows: Sequence[Sequence[TokenTree]]) -> str | None:
    """How packed log-probs of these rows differ from plain ones, or None. If memory runs out, a row is divided.

    Raises:
        StageError: out of memory with parts of a single tree.
    """
    with reference_model(model), progress_bar("self-check", len(rows)) as advance:
        for parts in rows:
            advance(text=f"{sum(tree.size + tree.plain_size for tree in parts):,} tokens")
            if reason := _fault(model, attention, parts):
                return reason
            advance(advance=1)
    return None


def _fault(model: nn.Module, attention: str, parts: Sequence[TokenTree]) -> str | None:
    def fault() -> str:
        row = pack(parts, unwrapped(model).device)
        plain = Scorer(model, row.tokens, None)  # as many tokens at once
        return packing_fault(model, row, attention, lambda: plain.score(parts).tokens) or ""

    is_last = len(parts) == 1 or is_fsdp_managed_module(unwrapped(model))
    reason = attempt(fault, OUT_OF_MEMORY.format(f"{sum(tree.size for tree in parts):,} tokens") if is_last else "")
    if reason is not None:
        return reason
    free_memory()
    logger.warning("out of memory: the self-check of %s trees goes on with half of them at a time", len(parts))
    half = len(parts) // 2
    return _fault(model, attention, parts[:half]) or _fault(model, attention, parts[half:])


# ---- the reference ----------------------------------------------------------------------------------------------


def freeze_reference(policy: nn.Module) -> None:
    """Make a frozen copy of the adapter as it is now part of the reference, which otherwise is the bare base model."""
    policy.frozen_adapter = {  # type: ignore[assignment]
        name: parameter.detach().clone() for name, parameter in policy.named_parameters() if parameter.requires_grad
    }


def frozen_adapter(policy: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of the reference's adapter by name; empty if the reference is the bare base model."""
    weights: dict[str, torch.Tensor] = vars(policy).get("frozen_adapter", {})
    return weights


def can_be_reference(policy: nn.Module) -> bool:
    """Whether `reference_model` gives the reference during training; not if the base model's weights are trained."""
    return hasattr(policy, "disable_adapter")


@contextmanager
def reference_model(policy: nn.Module) -> Iterator[None]:
    """While open, `policy` computes as the reference: adapter off, or as `frozen_adapter` has it; dropout off."""
    frozen = frozen_adapter(policy)
    can_be_off = can_be_reference(policy) and not frozen
    off = policy.disable_adapter() if can_be_off else nullcontext()  # type: ignore[operator]
    with evaluating(policy), holding(policy, frozen), off:
        yield


@contextmanager
def holding(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """While open, the parameters of these names have these values."""
    own = [(weight, weight.data, weights[name]) for name, weight in model.named_parameters() if name in weights]
    try:
        for weight, _, given in own:
            weight.data = given.to(weight.device, weight.dtype)
        yield
    finally:
        for weight, before, _ in own:
            weight.data = before
