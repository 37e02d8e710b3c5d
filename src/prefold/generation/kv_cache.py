"""Keys and values while completions are written: those of a prompt once for all its rows, those of the rows in place.

Rows that begin together are a wave: they have the same number of tokens of their own at every step, so no call needs a
mask. The model sees all live rows as one row of tokens, `[1, R]`. In each layer a row attends to its prompt's keys,
together with the prompt's other rows, and to its own; the two halves of the softmax are joined by their normalisers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from prefold.trees.attention import Backend, Shape, register, segments
from prefold.trees.packing import PackedTrees

ATTENTION = "prefold_rollouts"
HALF = (torch.float16, torch.bfloat16)


class Layout(Protocol):
    """What the model's layers are called with as `trees`."""

    scratch: dict[str, Any]

    @property
    def longest(self) -> int: ...

    def attend(self, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor: ...


def _attend(query: Tensor, key: Tensor, value: Tensor, layout: Layout, shape: Shape) -> Tensor:
    # As fast as half precision on a CPU, and more exact.
    if query.device.type == "cpu" and value.dtype in HALF:
        query, key, value = query.float(), key.float(), value.float()
    return layout.attend(query, key, value, shape)


register(ATTENTION, cast(Backend, _attend))


@dataclass
class Group:
    """The rows of one prompt: `states` are its keys and values by layer, `[key heads, P, width]` each."""

    rows: int
    states: list[tuple[Tensor, Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class Prefill:
    """Prompts side by side in one row (`packed`, trees without completions), whose states go to `groups`."""

    packed: PackedTrees
    groups: Sequence[Group]

    @property
    def scratch(self) -> dict[str, Any]:
        return self.packed.scratch

    @property
    def longest(self) -> int:
        return self.packed.longest

    def attend(self, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
        for group, block in zip(self.groups, self.packed.blocks, strict=True):
            prompt = slice(*block.prompt)
            # Copies: views would keep the whole row.
            group.states.append(
                (key[0, :, prompt].clone(memory_format=_PACKED), value[0, :, prompt].clone(memory_format=_PACKED))
            )
        return segments(query, key, value, self.packed, shape)


@dataclass
class Wave:
    """Groups whose rows have `filled` tokens of their own, of at most `capacity`.

    `own` are their keys and values by layer, `[rows, key heads, capacity, width]` each, of which the first `rows` are
    in use, ordered as the groups.
    """

    groups: list[Group]
    capacity: int
    filled: int = 0
    own: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.groups)

    @property
    def reserved(self) -> int:
        """Tokens that there is memory for, the prompts included."""
        prompts = sum(group.states[0][0].shape[1] for group in self.groups)
        return prompts + (self.own[0][0].shape[0] if self.own else self.rows) * self.capacity

    def keep(self, rows: Sequence[int]) -> None:
        """Let go of all rows but these, ascending: the others move up. Prompts without rows are let go of too."""
        self.own = [(self._compact(keys, rows), self._compact(values, rows)) for keys, values in self.own]
        kept, start = set(rows), 0
        for group in self.groups:
            stop = start + group.rows
            group.rows = len(kept.intersection(range(start, stop)))
            start = stop
        self.groups = [group for group in self.groups if group.rows]

    def _compact(self, states: Tensor, rows: Sequence[int]) -> Tensor:
        """In place, until half of the memory is free."""
        if 2 * len(rows) <= len(states):
            smaller = states.new_empty(len(rows), *states.shape[1:])
            smaller[:, :, : self.filled] = states[list(rows), :, : self.filled]
            return smaller
        first = next((place for place, row in enumerate(rows) if place != row), len(rows))
        states[first : len(rows), :, : self.filled] = states[list(rows[first:]), :, : self.filled]
        return states

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
        """`[rows, heads, width]`, given the newest tokens' query `[heads, rows, width]`, key and value."""
        # Query heads that share a key head are rows of one matrix product.
        query = (query * shape.scale).transpose(0, 1).unflatten(1, (key.shape[0], -1))
        keys, values = self._with_own(layer, key, value, shape.window)
        own, own_normaliser = attention_part(query.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1), shape)
        own, own_normaliser = (states.unflatten(0, query.shape[:2]) for states in (own, own_normaliser))
        visible = None if shape.window is None else shape.window - self.filled - 1
        if visible is None or visible > 0:
            prompts, normaliser = self._by_prompts(layer, query, visible, shape)
            own.lerp_(prompts, torch.sigmoid(normaliser - own_normaliser).to(own.dtype))
        attended: Tensor = own.flatten(1, 2)
        return attended

    def _with_own(self, layer: int, key: Tensor, value: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """The rows' own keys and values that they see, the newest included: `[rows, key heads, seen, width]`."""
        rows = key.shape[1]
        if layer == len(self.own):
            self.own.append(
                tuple(new.new_empty(rows, new.shape[0], self.capacity, new.shape[2]) for new in (key, value))  # type: ignore[arg-type]
            )
        stop = self.filled + 1
        start = 0 if window is None else max(0, stop - window)
        for states, new in zip(self.own[layer], (key, value), strict=True):
            states[:rows, :, self.filled] = new.transpose(0, 1)
        keys, values = self.own[layer]
        return keys[:rows, :, start:stop], values[:rows, :, start:stop]

    def _by_prompts(self, layer: int, query: Tensor, visible: int | None, shape: Shape) -> tuple[Tensor, Tensor]:
        """Attention `[rows, key heads, queries, width]` to each row's prompt (its last `visible` positions) alone, and
        the normalisers."""
        found: list[tuple[Tensor, Tensor]] = []
        start = 0
        for group in self.groups:
            keys, values = (states if visible is None else states[:, -visible:] for states in group.states[layer])
            own = query[start : start + group.rows].transpose(0, 1)
            parts = attention_part(own.flatten(1, 2), keys, values, shape)
            out, normaliser = (part.unflatten(1, own.shape[1:3]).transpose(0, 1) for part in parts)
            found.append((out, normaliser))
            start += group.rows
        outs, normalisers = zip(*found, strict=True)
        return torch.cat(outs), torch.cat(normalisers)


@dataclass(frozen=True)
class Decode:
    """One step of all live rows, wave after wave; `longest` is the longest prompt with what follows it."""

    waves: Sequence[Wave]
    longest: int
    scratch: dict[str, Any] = field(default_factory=dict)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
        layer = self.scratch["calls"] - 1
        sizes = [wave.rows for wave in self.waves]
        parts = zip(self.waves, *(states[0].split(sizes, dim=1) for states in (query, key, value)), strict=True)
        return torch.cat([wave.attend(layer, *states, shape) for wave, *states in parts])[None]


_PACKED = torch.contiguous_format


def attention_part(query: Tensor, keys: Tensor, values: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Softmax attention of scaled queries `[B, n, width]` to keys `[B, S, width]`: `[B, n, width]`, and the log of the
    softmax's denominator, `[B, n, 1]`."""
    scores = _scores(query, keys)
    if shape.softcap is not None:
        scores.div_(shape.softcap).tanh_().mul_(shape.softcap)
    weights = scores.softmax(-1)
    # Of the likeliest key, whose weight cannot underflow: weight = exp(score - normaliser).
    normaliser = scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()
    return torch.bmm(weights.to(values.dtype), values), normaliser


def _scores(query: Tensor, keys: Tensor) -> Tensor:
    if query.dtype in HALF:
        return torch.bmm(query, keys.transpose(1, 2), out_dtype=torch.float32)
    return torch.bmm(query, keys.transpose(1, 2))
