"""Keys and values while completions are generated: of a prompt once for all its sequences, and each sequence's own.

Sequences that begin together are a batch: they have the same number of tokens of their own at every step, so no call
needs a mask. The model sees all of them as one row of tokens, `[1, R]`. In each layer a sequence attends to its
prompt's keys, together with the prompt's other sequences, and to its own; the two halves of the softmax are joined by
their normalisers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prefold.trees.attention import Shape, register, segments
from prefold.trees.packing import PackedTrees

ATTENTION = "prefold_generation"
HALF = (torch.float16, torch.bfloat16)


def attend(query: Tensor, key: Tensor, value: Tensor, cached: Any, shape: Shape) -> Tensor:
    """Attention of a `Prefill` or a `Decode`, which the model's layers are called with as `trees`."""
    device = value.device.type
    if not attends_in(value.dtype, device):
        query, key, value = query.float(), key.float(), value.float()
    # Autocast would take the products back to half precision.
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        attended: Tensor = cached.attend(query, key, value, shape)
    return attended


def attends_in(dtype: torch.dtype, device: str) -> bool:
    """Whether states stay in a dtype: CUDA alone has half-precision products that leave scores in float32, and a CPU is
    as fast in float32, which is more exact."""
    return dtype not in HALF or device == "cuda"


register(ATTENTION, attend)


@dataclass
class PromptCache:
    """Keys and values of one prompt by layer, `[key heads, P, width]` each, and how many sequences go on from it."""

    sequences: int
    states: list[tuple[Tensor, Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class Prefill:
    """Prompts side by side in one row (`packed`, trees without completions), whose states go to `caches`."""

    packed: PackedTrees
    caches: Sequence[PromptCache]

    @property
    def scratch(self) -> dict[str, Any]:
        return self.packed.scratch

    @property
    def longest(self) -> int:
        return self.packed.longest

    def attend(self, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
        for cache, prompt in zip(self.caches, self.packed.prompts, strict=True):
            own = (states[0, :, slice(*prompt)] for states in (key, value))
            # Copies: views would keep the whole row.
            keys, values = (states.clone(memory_format=torch.contiguous_format) for states in own)
            cache.states.append((keys, values))
        return segments(query, key, value, self.packed, shape)


@dataclass
class SequenceBatch:
    """Sequences with `filled` tokens of their own, of at most `capacity`, ordered as the `prompts` they go on from.

    `own` are their keys and values by layer, `[sequences, key heads, capacity, width]` each, of which the first ones
    are in use.
    """

    prompts: list[PromptCache]
    capacity: int
    filled: int = 0
    own: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def sequences(self) -> int:
        return sum(prompt.sequences for prompt in self.prompts)

    @property
    def reserved(self) -> int:
        """Tokens that there is memory for, the prompts included."""
        prompts = sum(prompt.states[0][0].shape[1] for prompt in self.prompts)
        return prompts + (self.own[0][0].shape[0] if self.own else self.sequences) * self.capacity

    def keep(self, kept: Sequence[int]) -> None:
        """Let go of all sequences but these, ascending: the others move up. Prompts without any are let go of too."""
        self.own = [(self._compact(keys, kept), self._compact(values, kept)) for keys, values in self.own]
        start = 0
        for prompt in self.prompts:
            stop = start + prompt.sequences
            prompt.sequences = len(set(kept).intersection(range(start, stop)))
            start = stop
        self.prompts = [prompt for prompt in self.prompts if prompt.sequences]

    def _compact(self, states: Tensor, kept: Sequence[int]) -> Tensor:
        """In place, until half of the memory is free."""
        if 2 * len(kept) <= len(states):
            smaller = states.new_empty(len(kept), *states.shape[1:])
            smaller[:, :, : self.filled] = states[list(kept), :, : self.filled]
            return smaller
        first = next((new for new, old in enumerate(kept) if new != old), len(kept))
        states[first : len(kept), :, : self.filled] = states[list(kept[first:]), :, : self.filled]
        return states

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
        """`[sequences, heads, width]`, given the newest tokens' query `[heads, sequences, width]`, key and value."""
        # Query heads that share a key head are rows of one matrix product.
        query = (query * shape.scale).transpose(0, 1).unflatten(1, (key.shape[0], -1))
        keys, values = self._with_own(layer, key, value, shape.window)
        own, own_normaliser = attention_part(query.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1), shape)
        own, own_normaliser = (states.unflatten(0, query.shape[:2]) for states in (own, own_normaliser))
        visible = None if shape.window is None else shape.window - self.filled - 1
        if visible is None or visible > 0:
            by_prompts, normaliser = self._by_prompts(layer, query, visible, shape)
            own.lerp_(by_prompts, torch.sigmoid(normaliser - own_normaliser).to(own.dtype))
        attended: Tensor = own.flatten(1, 2)
        return attended

    def _with_own(self, layer: int, key: Tensor, value: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """The sequences' own keys and values that they see, the newest included: `[sequences, key heads, seen,
        width]`."""
        sequences = key.shape[1]
        if layer == len(self.own):
            keys, values = (new.new_empty(sequences, new.shape[0], self.capacity, new.shape[2]) for new in (key, value))
            self.own.append((keys, values))
        stop = self.filled + 1
        start = 0 if window is None else max(0, stop - window)
        for states, new in zip(self.own[layer], (key, value), strict=True):
            states[:sequences, :, self.filled] = new.transpose(0, 1)
        keys, values = self.own[layer]
        return keys[:sequences, :, start:stop], values[:sequences, :, start:stop]

    def _by_prompts(self, layer: int, query: Tensor, visible: int | None, shape: Shape) -> tuple[Tensor, Tensor]:
        """Attention `[sequences, key heads, queries, width]` to each one's prompt (its last `visible` positions) alone,
        and the normalisers."""
        attended: list[tuple[Tensor, Tensor]] = []
        start = 0
        for prompt in self.prompts:
            keys, values = (states if visible is None else states[:, -visible:] for states in prompt.states[layer])
            own = query[start : start + prompt.sequences].transpose(0, 1)
            parts = attention_part(own.flatten(1, 2), keys, values, shape)
            out, normaliser = (part.unflatten(1, own.shape[1:3]).transpose(0, 1) for part in parts)
            attended.append((out, normaliser))
            start += prompt.sequences
        outs, normalisers = zip(*attended, strict=True)
        return torch.cat(outs), torch.cat(normalisers)


@dataclass(frozen=True)
class Decode:
    """One step of all sequences, batch after batch; `longest` is the longest prompt with what follows it."""

    batches: Sequence[SequenceBatch]
    longest: int
    scratch: dict[str, Any] = field(default_factory=dict)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
        layer = self.scratch["calls"] - 1
        sizes = [batch.sequences for batch in self.batches]
        parts = zip(self.batches, *(states[0].split(sizes, dim=1) for states in (query, key, value)), strict=True)
        return torch.cat([batch.attend(layer, *states, shape) for batch, *states in parts])[None]


def attention_part(query: Tensor, keys: Tensor, values: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Softmax attention of scaled queries `[B, n, width]` to keys `[B, S, width]`: `[B, n, width]`, and the log of the
    softmax's denominator, `[B, n, 1]`."""
    keys = keys.transpose(1, 2)
    scores = torch.bmm(query, keys, out_dtype=torch.float32) if query.dtype in HALF else torch.bmm(query, keys)
    if shape.softcap is not None:
        scores.div_(shape.softcap).tanh_().mul_(shape.softcap)
    weights = scores.softmax(-1)
    # Of the likeliest key, whose weight cannot underflow: weight = exp(score - normaliser).
    normaliser = scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()
    return torch.bmm(weights.to(values.dtype), values), normaliser
