"""What one pass of the engine over a row allocates, found by running the engine's own code on fake tensors.

Models of one layer and of two show what a layer keeps, so a pass takes as long for 80 layers as for 2. Results are
cached, since the runs of a sweep and the changes to a recipe need the same passes.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prefold.device import is_half
from prefold.plan.meta_model import MetaModel, move_to_cpu
from prefold.trees.attention import BACKENDS, CHECKPOINTING, Shape, register, unwrapped, using_attention
from prefold.trees.head import head_logprobs, head_of
from prefold.trees.logprobs import packed_logprobs, plain_logprobs
from prefold.trees.memory import token_bytes
from prefold.trees.packing import PackedTrees, TokenTree, pack

logger = logging.getLogger("prefold")

Lengths = tuple[int, ...]
"""Tokens of a tree's prompt and of each of its completions."""
Row = tuple[Lengths, ...]
"""The trees of a micro-batch."""


def trees_of(row: Sequence[Lengths]) -> list[TokenTree]:
    return [TokenTree((0,) * prompt, tuple((0,) * length for length in rest)) for prompt, *rest in row]


@lru_cache(maxsize=256)
def training_pass(meta: MetaModel, row: Row, budget: int, attention: str | None) -> tuple[int, int]:
    """Bytes of activations and of the head while the log-probs of a row are computed and differentiated, on top of
    weights and gradients. `budget`: tokens of a micro-batch; `attention`: the backend, None for the plain path."""
    packed = pack(trees_of(row), scores_prompt=meta.recipe.algorithm.scores_prompt)
    try:
        kept, peak, head = _training_pass(meta, min(meta.layers, 2), packed, budget, attention)
        kept_by_one = _training_pass(meta, 1, packed, budget, attention, forward_only=True)[0] if meta.layers > 2 else 0
    except Exception as error:  # a pass that depends on the contents of tensors cannot run on fake ones
        logger.debug("no dry run: %s", error)
        return _roughly(meta, packed), 0
    return peak + max(meta.layers - 2, 0) * (kept - kept_by_one) - head, head


def _training_pass(
    meta: MetaModel, layers: int, packed: PackedTrees, budget: int, attention: str | None, forward_only: bool = False
) -> tuple[int, int, int]:
    """Bytes: what is kept for the backward pass, the peak of both passes, and the peak of the head alone, which is on
    top of what is kept."""
    model = meta.policy(layers).train()
    if meta.recipe.train.gradient_checkpointing:
        settings = {"use_reentrant": False, "preserve_rng_state": False}
        getattr(unwrapped(model), f"{CHECKPOINTING}_enable")(settings)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        move_to_cpu(model)
        for weight in model.parameters():
            weight.grad = torch.empty_like(weight) if weight.requires_grad else None
        row = _without_contents(packed, mode)
        with _using(attention, model), AllocatedBytes(_resident(model)) as allocated:
            # Mixed precision as in training.
            with torch.autocast("cpu", meta.dtype, enabled=meta.dtype != torch.float32):
                tokens = _scored(meta, model, row, budget, attention)
            kept = allocated.now
            if forward_only:
                return kept, 0, 0
            tokens.sum().backward()
        head = _head_bytes(meta, model, row) if attention else 0
    return kept, allocated.peak, min(head, allocated.peak)


@lru_cache(maxsize=256)
def scoring_pass(meta: MetaModel, dtype: torch.dtype, row: Row, budget: int, attention: str | None) -> int:
    """Bytes of activations while a whole model in `dtype` computes the log-probs of a row without gradients: those of
    one layer at a time."""
    packed = pack(trees_of(row))
    try:
        model = meta.base(dtype, 1)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            move_to_cpu(model)
            with torch.no_grad(), _using(attention, model), AllocatedBytes(_resident(model)) as allocated:
                _scored(meta, model, _without_contents(packed, mode), budget, attention)
        return int(allocated.peak)
    except Exception as error:
        logger.debug("no dry run: %s", error)
        return _roughly(meta, packed) // meta.layers


def _scored(meta: MetaModel, model: nn.Module, row: PackedTrees, budget: int, attention: str | None) -> Tensor:
    statistics = meta.recipe.algorithm.needs_statistics
    if attention is None:
        return plain_logprobs(model, row, budget, statistics).tokens
    return packed_logprobs(model, row, statistics).tokens


def _using(attention: str | None, model: nn.Module) -> Any:
    return using_attention(unwrapped(model), attention) if attention else nullcontext()


def _head_bytes(meta: MetaModel, model: nn.Module, row: PackedTrees) -> int:
    head = head_of(unwrapped(model))
    hidden = head.linear.weight.new_empty(len(row.targets), head.linear.weight.shape[1]).requires_grad_()
    with AllocatedBytes([*_resident(model), hidden]) as allocated:
        head_logprobs(hidden, head, row.targets, meta.recipe.algorithm.needs_statistics)
    return int(allocated.peak)


def _resident(model: nn.Module) -> Iterator[Tensor]:
    for weight in model.parameters():
        yield weight.detach()
        if weight.grad is not None:
            yield weight.grad
    yield from model.buffers()


def _roughly(meta: MetaModel, row: PackedTrees) -> int:
    return token_bytes(meta.config, meta.recipe.train.gradient_checkpointing) * row.tokens


def _without_contents(row: PackedTrees, mode: FakeTensorMode) -> PackedTrees:
    """A packed row with fake tensors in place of its own."""
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    fake: Any = {name: mode.from_tensor(value) for name, value in values.items() if isinstance(value, Tensor)}
    return replace(row, **fake, scratch={})


class AllocatedBytes(TorchDispatchMode):
    """While open, counts the bytes of every storage that an operation allocates, until it is freed; `resident` tensors
    are not counted. What autograd saves is counted; what a kernel allocates internally is not seen."""

    def __init__(self, resident: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._resident = [tensor.untyped_storage() for tensor in resident]
        self._sizes = {storage._cdata: 0 for storage in self._resident}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes:
                    self._sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._release, storage._cdata)
        return result

    def _release(self, address: int) -> None:
        self.now -= self._sizes.pop(address)


def _on_gpu(query: Tensor, key: Tensor, value: Tensor, trees: PackedTrees, shape: Shape) -> Tensor:
    """Variable-length attention in the dtype that a GPU computes it in."""
    half = value.dtype if is_half(value.dtype) else torch.bfloat16
    states = (query.to(half), key.to(half), value.to(half))
    return BACKENDS["prefold_variable_length"](*states, trees, shape)


ON_GPU = "prefold_planned_on_gpu"
register(ON_GPU, _on_gpu)


def attention_on(device: str, dtype: torch.dtype) -> str:
    """The attention backend whose allocations stand for those on a device."""
    return ON_GPU if device == "cuda" and dtype != torch.float32 else "prefold_joined"
