"""What one pass of the engine over a row allocates: the engine's own code, on a model without contents.

A model of one layer and one of two say what a layer keeps, so a pass takes as long for 80 layers as for 2.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from functools import wraps
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from prefold.plan.live_bytes import LiveBytes
from prefold.plan.meta_model import Blueprint, fill, without_contents
from prefold.trees.attention import BACKENDS, Shape, register, unwrapped, using_attention
from prefold.trees.head import head_logprobs, head_of
from prefold.trees.logprobs import packed_logprobs, plain_logprobs
from prefold.trees.memory import token_bytes
from prefold.trees.packing import PackedTrees, TokenTree, pack

logger = logging.getLogger("prefold")

Call = TypeVar("Call", bound=Callable[..., Any])
Lengths = tuple[int, ...]
"""Tokens of a tree's prompt and of each of its completions."""


def shaped(trees: Sequence[Lengths]) -> list[TokenTree]:
    """Trees of these lengths."""
    return [TokenTree((0,) * prompt, tuple((0,) * length for length in rest)) for prompt, *rest in trees]


def _remembered(perform: Call) -> Call:
    """A pass takes a second, and the runs of a sweep ask for the same ones."""
    known: dict[tuple[str, str], Any] = {}

    @wraps(perform)
    def remembering(blueprint: Blueprint, *asked: Any) -> Any:
        key = (blueprint.identity, repr(asked))
        if key not in known:
            known[key] = perform(blueprint, *asked)
        return known[key]

    return cast(Call, remembering)


@_remembered
def training_pass(blueprint: Blueprint, row: Sequence[Lengths], budget: int, attention: str | None) -> tuple[int, int]:
    """Bytes of activations and of the head while the log-probs of a row are computed and differentiated, on top of
    weights and gradients.

    Args:
        row: the trees of a micro-batch.
        budget: tokens of a micro-batch.
        attention: name of the backend, None for the plain path.
    """
    packed = pack(shaped(row), scores_prompt=blueprint.recipe.algorithm.scores_prompt)
    try:
        one = _training_pass(blueprint, 1, packed, budget, attention)
        two = _training_pass(blueprint, 2, packed, budget, attention) if blueprint.layers > 1 else one
    except Exception as error:  # the pass of a model that depends on its contents cannot be foreseen
        logger.debug("no dry run: %s", error)
        return _coarse(blueprint, packed), 0
    total = two.peak + max(blueprint.layers - 2, 0) * (two.kept - one.kept)
    return total - two.head, two.head


class Pass(NamedTuple):
    """Bytes of a pass: what is `kept` for the backward pass, the `peak` of both, and that of the `head` alone, which
    comes on top of what is kept."""

    kept: int
    peak: int
    head: int


def _training_pass(blueprint: Blueprint, layers: int, packed: PackedTrees, budget: int, attention: str | None) -> Pass:
    model = blueprint.policy(layers).train()
    if blueprint.recipe.train.gradient_checkpointing:
        settings = {"use_reentrant": False, "preserve_rng_state": False}
        unwrapped(model).activation_checkpointing_enable(settings)
    with without_contents() as mode:
        fill(model)
        for weight in model.parameters():
            weight.grad = torch.empty_like(weight) if weight.requires_grad else None
        row = _emptied(packed, mode)
        with _attention_in_place(model, attention), LiveBytes(_resident(model)) as live:
            with computing_in(blueprint.dtype):
                tokens = _scored(blueprint, model, row, budget, attention)
            kept = live.now
            tokens.sum().backward()
        head = _head_bytes(blueprint, model, row) if attention else 0
    return Pass(kept, live.peak, min(head, live.peak))


@_remembered
def scoring_pass(
    blueprint: Blueprint, dtype: torch.dtype, row: Sequence[Lengths], budget: int, attention: str | None
) -> int:
    """Bytes while the log-probs of a row are computed without gradients, by the whole model in a dtype: those of one
    layer at a time."""
    packed = pack(shaped(row))
    try:
        model = blueprint.base(dtype, 1)
        with without_contents() as mode:
            fill(model)
            with torch.no_grad(), LiveBytes(_resident(model)) as live:
                _scored(blueprint, model, _emptied(packed, mode), budget, attention)
        return int(live.peak)
    except Exception as error:
        logger.debug("no dry run: %s", error)
        return _coarse(blueprint, packed) // blueprint.layers


def _scored(blueprint: Blueprint, model: nn.Module, row: PackedTrees, budget: int, attention: str | None) -> Tensor:
    statistics = blueprint.recipe.algorithm.needs_statistics
    if attention is None:
        return plain_logprobs(model, row, budget, statistics).tokens
    with _attention_in_place(model, attention):
        return packed_logprobs(model, row, statistics).tokens


def _head_bytes(blueprint: Blueprint, model: nn.Module, row: PackedTrees) -> int:
    head = head_of(unwrapped(model))
    hidden = head.linear.weight.new_empty(len(row.targets), head.linear.weight.shape[1]).requires_grad_()
    with LiveBytes([*_resident(model), hidden]) as live:
        head_logprobs(hidden, head, row.targets, blueprint.recipe.algorithm.needs_statistics)
    return int(live.peak)


def _resident(model: nn.Module) -> Iterator[Tensor]:
    for weight in model.parameters():
        yield weight.detach()
        if weight.grad is not None:
            yield weight.grad
    yield from model.buffers()


def _coarse(blueprint: Blueprint, row: PackedTrees) -> int:
    return token_bytes(blueprint.config, blueprint.recipe.train.gradient_checkpointing) * row.tokens


def _attention_in_place(model: nn.Module, attention: str | None) -> Any:
    return using_attention(unwrapped(model), attention) if attention else nullcontext()


def _emptied(row: PackedTrees, mode: FakeTensorMode) -> PackedTrees:
    """A row laid out in earnest, its tensors without contents."""
    given = {field.name: getattr(row, field.name) for field in fields(row)}
    emptied: Any = {name: mode.from_tensor(value) for name, value in given.items() if isinstance(value, Tensor)}
    return replace(row, **emptied, scratch={})


@contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    """Mixed precision as the Trainer sets it up."""
    with torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext():
        yield


# ---- attention of a GPU -----------------------------------------------------------------------------------------


def _on_gpu(query: Tensor, key: Tensor, value: Tensor, trees: PackedTrees, shape: Shape) -> Tensor:
    """Variable-length attention in the dtype that a GPU computes it in."""
    half = value.dtype if value.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    states = (query.to(half), key.to(half), value.to(half))
    return BACKENDS["prefold_variable_length"](*states, trees, shape)


ON_GPU = "prefold_planned_on_gpu"
register(ON_GPU, _on_gpu)


def attention_on(device: str, dtype: torch.dtype) -> str:
    """The backend whose pass stands for that of a device."""
    return ON_GPU if device == "cuda" and dtype != torch.float32 else "prefold_joined"
