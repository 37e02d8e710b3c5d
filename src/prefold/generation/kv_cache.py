"""Keys and values during generation: those of a prompt once for all its sequences, and each sequence's own.

The model sees all sequences as one row of tokens, `[1, R]`. In each layer a sequence attends to its prompt's keys,
together with the prompt's other sequences, and to its own; the two parts of the softmax are joined by their
normalisers. Two kinds of batches compute the parts:

- `Products`, by matrix products, one prompt at a time: every device, dtype and soft-cap. Its sequences begin together
  and have the same number of tokens of their own, so no call needs a mask.
- `VariableLength`, by a single call for both parts of all sequences: CUDA, in half precision.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, wraps
from itertools import accumulate, chain, pairwise
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.attention import varlen

from prefold.trees.attention import Shape, heads_of, register, segments, variable_length
from prefold.trees.packing import PackedTrees

ATTENTION = "prefold_generation"
WIDEST, WIDTHS = 256, 8
"""Largest head width that variable-length attention supports, and the number that a width must be a multiple of."""

States = tuple[Tensor, Tensor]
"""Keys and values."""
Attend = TypeVar("Attend", bound=Callable[..., Tensor])


def attend(query: Tensor, key: Tensor, value: Tensor, cached: Any, shape: Shape) -> Tensor:
    """Attention of a `Prefill` or a `Decode`, which the model's layers get as `trees`."""
    attended: Tensor = cached.attend(query, key, value, shape)
    return attended


register(ATTENTION, attend)


@dataclass
class Prompt:
    """A prompt of `tokens` tokens, which `sequences` sequences continue with `filled` tokens of their own each."""

    tokens: int
    sequences: int
    filled: int = 0


class SequenceBatch(ABC):
    """Sequences with up to `capacity` tokens of their own, in the order of the `prompts` that they continue.

    `positions` `[R]` are those of the next tokens.
    """

    def __init__(self, prompts: Sequence[Prompt], capacity: int, device: torch.device | str = "cpu"):
        self.prompts, self.capacity = list(prompts), capacity
        positions = [prompt.tokens for prompt in prompts for _ in range(prompt.sequences)]
        self.positions = torch.tensor(positions, device=device)

    @property
    def sequences(self) -> int:
        return sum(prompt.sequences for prompt in self.prompts)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its sequences, the next tokens included."""
        return max(prompt.tokens + prompt.filled for prompt in self.prompts) + 1

    @property
    @abstractmethod
    def reserved(self) -> int:
        """Tokens that memory is reserved for, the prompts included."""

    @abstractmethod
    def begin(self, prefill: Prefill, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
        """Attention of a row of the batch's prompts, as from a backend; stores their keys and values."""

    @abstractmethod
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
        """`[R, heads, width]`, given the newest tokens' query `[heads, R, width]`, key and value."""

    def advance(self) -> None:
        """To be called when all layers have processed the next tokens."""
        self.positions += 1
        for prompt in self.prompts:
            prompt.filled += 1

    def keep(self, kept: Sequence[int]) -> list[int]:
        """Drop all sequences but these (ascending), and prompts without any; returns the indices of prompts that
        stay."""
        self.positions = self.positions[torch.tensor(kept, device=self.positions.device)]
        counts = [prompt.sequences for prompt in self.prompts]
        for prompt, (start, stop) in zip(self.prompts, pairwise(accumulate(counts, initial=0)), strict=True):
            prompt.sequences = bisect_left(kept, stop) - bisect_left(kept, start)
        left = [i for i, prompt in enumerate(self.prompts) if prompt.sequences]
        self.prompts = [self.prompts[i] for i in left]
        return left


# ---- by matrix products -----------------------------------------------------------------------------------------


def attends_in(dtype: torch.dtype, device: str) -> bool:
    """Whether attention computes in a dtype, and not in float32: CUDA alone has half-precision products with scores in
    float32, and a CPU is as fast in float32, which is more accurate."""
    return dtype.itemsize > 2 or device == "cuda"


def _widened(attend: Attend) -> Attend:
    """Decorates an attention: it is computed in float32 unless it `attends_in` the dtype."""

    @wraps(attend)
    def widened(batch: Any, context: Any, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
        device = value.device.type
        if not attends_in(value.dtype, device):
            query, key, value = query.float(), key.float(), value.float()
        # Autocast would cast the products back to half precision.
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            return attend(batch, context, query, key, value, shape)

    return cast(Attend, widened)


class Products(SequenceBatch):
    """`by_prompts` are the states of each prompt by layer, `[key heads, P, width]`, and `own` those of the sequences by
    layer, `[R, key heads, capacity, width]`, of which the first rows and positions are in use."""

    def __init__(self, prompts: Sequence[Prompt], capacity: int, device: torch.device | str = "cpu"):
        super().__init__(prompts, capacity, device)
        self.by_prompts: list[list[States]] = [[] for _ in prompts]
        self.own: list[States] = []

    @property
    def filled(self) -> int:
        return self.prompts[0].filled

    @property
    def reserved(self) -> int:
        rows = self.own[0][0].shape[0] if self.own else self.sequences
        return sum(prompt.tokens for prompt in self.prompts) + rows * self.capacity

    def keep(self, kept: Sequence[int]) -> list[int]:
        self.own = [(self._compact(keys, kept), self._compact(values, kept)) for keys, values in self.own]
        left = super().keep(kept)
        self.by_prompts = [self.by_prompts[i] for i in left]
        return left

    def _compact(self, states: Tensor, kept: Sequence[int]) -> Tensor:
        """The states of some sequences alone: in place, or copied if half of the memory would be unused."""
        if 2 * len(kept) <= len(states):
            smaller = states.new_empty(len(kept), *states.shape[1:])
            smaller[:, :, : self.filled] = states[list(kept), :, : self.filled]
            return smaller
        first = next((new for new, old in enumerate(kept) if new != old), len(kept))
        states[first : len(kept), :, : self.filled] = states[list(kept[first:]), :, : self.filled]
        return states

    @_widened
    def begin(self, prefill: Prefill, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
        for prompt, span in zip(prefill.prompts, prefill.packed.prompts, strict=True):
            own = (states[0, :, slice(*span)] for states in (key, value))
            # Copies: views would keep the whole row.
            keys, values = (states.clone(memory_format=torch.contiguous_format) for states in own)
            self.by_prompts[prompt].append((keys, values))
        return segments(query, key, value, prefill.packed, shape)

    @_widened
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
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

    def _with_own(self, layer: int, key: Tensor, value: Tensor, window: int | None) -> States:
        """Store the newest keys and values; returns the sequences' own ones that they attend to, `[R, key heads, seen,
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
        """Attention `[R, key heads, queries, width]` of each sequence to its prompt (the last `visible` positions)
        alone, and the normalisers."""
        attended: list[tuple[Tensor, Tensor]] = []
        queries = query.split([prompt.sequences for prompt in self.prompts])
        for own, of_prompt in zip(queries, self.by_prompts, strict=True):
            keys, values = (states if visible is None else states[:, -visible:] for states in of_prompt[layer])
            parts = attention_part(own.transpose(0, 1).flatten(1, 2), keys, values, shape)
            out, normaliser = (part.unflatten(1, (len(own), -1)).transpose(0, 1) for part in parts)
            attended.append((out, normaliser))
        outs, normalisers = zip(*attended, strict=True)
        return torch.cat(outs), torch.cat(normalisers)


def attention_part(query: Tensor, keys: Tensor, values: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Softmax attention of scaled queries `[B, n, width]` to keys `[B, S, width]`: `[B, n, width]`, and the log of the
    softmax's denominator, `[B, n, 1]`."""
    keys = keys.transpose(1, 2)
    scores = torch.bmm(query, keys, out_dtype=torch.float32) if query.dtype.itemsize == 2 else torch.bmm(query, keys)
    if shape.softcap is not None:
        scores.div_(shape.softcap).tanh_().mul_(shape.softcap)
    weights = scores.softmax(-1)
    # Of the likeliest key, whose weight cannot underflow: weight = exp(score - normaliser).
    normaliser = scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()
    return torch.bmm(weights.to(values.dtype), values), normaliser


# ---- by variable-length attention -------------------------------------------------------------------------------


class VariableLength(SequenceBatch):
    """The states of all prompts and then of all sequences in one row, `[T, key heads, width]` by layer. Each has a
    region of the row, which begins at its entry of `starts`; a sequence's is not full yet, and there may be gaps
    between regions.

    The call gets the boundaries of what is attended to, region by region. No query attends to anything between.
    """

    def __init__(self, prompts: Sequence[Prompt], capacity: int, device: torch.device | str = "cpu"):
        super().__init__(prompts, capacity, device)
        self.states: list[States] = []
        self._pack()

    @staticmethod
    def fits(config: Any) -> bool:
        """Whether flash attention supports a model, as far as its configuration tells."""
        width = heads_of(config)[2]
        has_softcap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
        return width <= WIDEST and width % WIDTHS == 0 and not has_softcap

    @property
    def reserved(self) -> int:
        return self._size

    @property
    def _lengths(self) -> list[int]:
        return [*(prompt.tokens for prompt in self.prompts), *[self.capacity] * self.sequences]

    def _pack(self) -> None:
        *self.starts, self._size = accumulate(self._lengths, initial=0)
        self._locate()

    def _locate(self) -> None:
        """Put on the device what a step derives its boundaries from. For each region: a sequence that attends to it,
        the position of its first token, the position after its last, and the offset from positions to indices in the
        row.
        """
        counts = [prompt.sequences for prompt in self.prompts]
        firsts = [0] * len(counts) + [prompt.tokens for prompt in self.prompts for _ in range(prompt.sequences)]
        seen_by = [*list(accumulate(counts, initial=0))[:-1], *range(sum(counts))]
        shifts = [start - first for start, first in zip(self.starts, firsts, strict=True)]
        ends = [first + length for first, length in zip(firsts, self._lengths, strict=True)]
        device = self.positions.device
        located = torch.tensor([seen_by, firsts, ends, shifts], device=device)
        self._seen_by, self._firsts, self._ends, self._shifts = located.unbind()
        queries = pairwise(accumulate([*counts, *[1] * sum(counts)], initial=0))
        self._queries = torch.tensor([*chain(*queries)], dtype=torch.int32, device=device)
        self._of_step: dict[Any, Tensor] = {}

    def advance(self) -> None:
        super().advance()
        self._of_step = {}

    def keep(self, kept: Sequence[int]) -> list[int]:
        prompts = len(self.prompts)
        left = super().keep(kept)
        self.starts = [self.starts[i] for i in (*left, *(prompts + i for i in kept))]
        if kept and 2 * sum(self._lengths) <= self._size:
            self.take_over([])
        else:
            self._locate()
        return left

    def take_over(self, others: Sequence[VariableLength]) -> None:
        """Move the regions of this batch, and of others that follow it, to a row of just that size."""
        batches = [self, *others]
        indices = [batch._indices(range(len(batch.prompts))) for batch in batches]
        indices += [batch._indices(range(len(batch.prompts), len(batch.starts))) for batch in batches]
        gathered: list[States] = []
        while self.states:  # layer by layer, so that memory holds a single one twice
            of_layer = [batch.states.pop(0) for batch in batches] * 2
            keys, values = (
                torch.cat([tensor[index.to(tensor.device)] for tensor, index in zip(states, indices, strict=True)])
                for states in zip(*of_layer, strict=True)
            )
            gathered.append((keys, values))
        self.states = gathered
        self.prompts = [prompt for batch in batches for prompt in batch.prompts]
        self.positions = torch.cat([batch.positions for batch in batches])
        self._pack()

    def _indices(self, regions: Sequence[int]) -> Tensor:
        """Indices in the row of the tokens of some regions."""
        starts, lengths = self.starts, self._lengths
        return torch.cat([torch.arange(starts[i], starts[i] + lengths[i]) for i in regions])

    def begin(self, prefill: Prefill, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
        if prefill.layer == len(self.states):
            keys, values = (new.new_empty(self._size, new.shape[1], new.shape[3]) for new in (key, value))
            self.states.append((keys, values))
        index = prefill.packed.once(f"kept on {key.device}", lambda row: self._indices(prefill.prompts).to(key.device))
        for states, new in zip(self.states[prefill.layer], (key, value), strict=True):
            states.index_copy_(0, index, new[0].transpose(0, 1))
        return variable_length(query, key, value, prefill.packed, shape)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
        group, (keys, values) = query.shape[0] // key.shape[0], self.states[layer]
        newest = self._once("newest", key.device, lambda: self.positions + self._shifts[-len(self.positions) :])
        for states, new in ((keys, key), (values, value)):
            states.index_copy_(0, newest, new.transpose(0, 1))
        # Query heads that share a key head attend to the same keys, so they are several queries of one head.
        query = query.unflatten(0, (-1, group)).permute(2, 1, 0, 3)
        seen = self._once(("seen", shape.window), key.device, lambda: self._boundaries(shape.window))
        out, normalisers = varlen.varlen_attn(
            torch.cat([query, query]).flatten(0, 1),
            keys,
            values,
            self._once(("queries", group), key.device, lambda: self._queries * group),
            seen,
            group * max(prompt.sequences for prompt in self.prompts),
            max(self._lengths),
            return_aux=varlen.AuxRequest(lse=True),
            scale=shape.scale,
        )
        by_prompts, own = out.unflatten(0, (2, -1, group)).transpose(2, 3).unbind()
        normalisers = normalisers.unflatten(1, (2, -1, group)).permute(1, 2, 0, 3)
        prompts_normaliser, own_normaliser = normalisers[..., None].unbind()
        if shape.window is not None:
            # The kernel marks queries that attend to nothing with an infinity of either sign.
            prompts_normaliser = prompts_normaliser.masked_fill(prompts_normaliser.isinf(), float("-inf"))
        share = torch.sigmoid(prompts_normaliser - own_normaliser).to(own.dtype)
        attended = torch.lerp(own, by_prompts, share, out=torch.empty(own.shape, dtype=own.dtype, device=own.device))
        return attended.flatten(1, 2)

    def _boundaries(self, window: int | None) -> Tensor:
        """Start and end in the row of what is attended to in each region, `[2 * regions]`."""
        next_position = self.positions[self._seen_by] + 1
        end = torch.minimum(next_position, self._ends)
        first = self._firsts
        if window is not None:
            first = torch.minimum(torch.maximum(next_position - window, first), end)
        return (torch.stack([first, end]) + self._shifts).T.flatten().int()

    def _once(self, name: Any, device: torch.device, derive: Callable[[], Tensor]) -> Tensor:
        """Derive a tensor once in a step, for all layers of a device."""
        if (name, device) not in self._of_step:
            self._of_step[name, device] = derive().to(device)
        return self._of_step[name, device]


# ---- what the layers get as `trees` -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Prefill:
    """Prompts of a batch side by side in one row (`packed`, trees without completions), `prompts` their indices."""

    packed: PackedTrees
    batch: SequenceBatch
    prompts: Sequence[int]

    @property
    def scratch(self) -> dict[str, Any]:
        return self.packed.scratch

    @property
    def longest(self) -> int:
        return self.packed.longest

    @property
    def layer(self) -> int:
        calls: int = self.scratch["calls"]
        return calls - 1

    def attend(self, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
        return self.batch.begin(self, query, key, value, shape)


@dataclass(frozen=True)
class Decode:
    """One step of all sequences, batch after batch."""

    batches: Sequence[SequenceBatch]
    scratch: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def longest(self) -> int:
        return max(batch.longest for batch in self.batches)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
        layer = self.scratch["calls"] - 1
        sizes = [batch.sequences for batch in self.batches]
        parts = zip(self.batches, *(states[0].split(sizes, dim=1) for states in (query, key, value)), strict=True)
        attended = [batch.attend(layer, *states, shape) for batch, *states in parts]
        return (torch.cat(attended) if len(attended) > 1 else attended[0])[None]
