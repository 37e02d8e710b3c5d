"""The prefix attention: prompts attend causally to themselves, completions to their prompt and to themselves.

The only place that knows an attention backend. Each backend is a function registered with transformers under a name of
our own that the mask interface does not know, so models build no mask; the layout of the row reaches it as the keyword
`trees`, which a model's `forward(**kwargs)` hands down.

Backends take `query` `[1, heads, T, D]`, `key` and `value` `[1, key heads, T, D]` and return `[1, T, heads, D]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from prefold.trees.packing import Node, PackedTrees, Span


class Shape(NamedTuple):
    """What a layer asks of its attention beside queries, keys and values."""

    scale: float
    window: int | None
    """A position sees the `window` positions up to and including itself; None if the row needs no such limit."""
    softcap: float | None


Backend = Callable[[Tensor, Tensor, Tensor, PackedTrees, Shape], Tensor]


def register(name: str, backend: Backend) -> None:
    """Make a backend an attention implementation of transformers."""

    def attention(
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
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """What transformers calls in each layer.

        Raises:
            NotImplementedError: for what the engine cannot honour; the self-check turns it into the plain path.
        """
        refused = {"mask": attention_mask, "dropout": dropout or None, "sinks": s_aux, "position bias": position_bias}
        for what, given in refused.items():
            if given is not None:
                raise NotImplementedError(f"the tree attention has no {what}")
        if trees is None:
            raise NotImplementedError("the model does not hand the layout of the row to its attention layers")
        trees.scratch["calls"] = trees.scratch.get("calls", 0) + 1
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        window = sliding_window if sliding_window is not None and trees.longest > sliding_window else None
        # Beside a float32 residual stream, queries and keys come out of the rotation wider than the values.
        on_cpu = query.device.type == "cpu"
        dtype = torch.promote_types(query.dtype, value.dtype) if on_cpu else value.dtype
        states = (query.to(dtype), key.to(dtype), value.to(dtype))
        return backend(*states, trees, Shape(scale, window, softcap)).to(value.dtype), None

    AttentionInterface.register(name, attention)


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, return-value]


@contextmanager
def using_attention(model: nn.Module, name: str) -> Iterator[None]:
    """Switch the attention implementation of a model for a while."""
    base = unwrapped(model)
    before = base.config._attn_implementation
    base.set_attn_implementation(name)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


# ---- segments: one call for each prompt and each completion; every device, dtype, window and soft-cap ------------


def segments(query: Tensor, key: Tensor, value: Tensor, trees: PackedTrees, shape: Shape) -> Tensor:
    """Torch's attention over `[prompt keys, own keys]` of each segment, masked to the bottom-right triangle."""
    attend = _softcapped if shape.softcap else _plain_softmax

    def seen(states: Tensor, node: Node) -> Tensor:
        own = states[:, :, slice(*node.own)]
        return torch.cat([*(states[:, :, slice(*span)] for span in node.above), own], dim=2) if node.above else own

    attended = [
        attend(query[:, :, slice(*node.own)], seen(key, node), seen(value, node), shape) for node in trees.nodes
    ]
    return torch.cat(attended, dim=2).transpose(1, 2)


def _plain_softmax(query: Tensor, keys: Tensor, values: Tensor, shape: Shape) -> Tensor:
    rows, columns = query.shape[2], keys.shape[2]
    masked = rows != columns or (shape.window is not None and columns > shape.window)
    return scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=lower_right(rows, columns, shape.window, query.device) if masked else None,
        is_causal=not masked,
        scale=shape.scale,
        enable_gqa=query.shape[1] != keys.shape[1],
    )


def _softcapped(query: Tensor, keys: Tensor, values: Tensor, shape: Shape) -> Tensor:
    """Scores bent by softcap * tanh(score / softcap) before the softmax (Gemma 2, arXiv 2408.00118, section 2)."""
    assert shape.softcap is not None
    group = query.shape[1] // keys.shape[1]
    keys, values = (states.repeat_interleave(group, dim=1) for states in (keys, values))
    scores = torch.tanh(query @ keys.transpose(2, 3) * (shape.scale / shape.softcap)) * shape.softcap
    mask = lower_right(query.shape[2], keys.shape[2], shape.window, query.device)
    accumulate = torch.promote_types(query.dtype, torch.float32)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=accumulate)
    return weights.to(values.dtype) @ values


@lru_cache(maxsize=256)
def lower_right(rows: int, columns: int, window: int | None, device: torch.device) -> Tensor:
    """`[rows, columns]`, True where the last `rows` positions of `columns` may look: at or before themselves, and less
    than `window` positions back."""
    query = torch.arange(columns - rows, columns, device=device)[:, None]
    distance = query - torch.arange(columns, device=device)[None]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


# ---- CPU: three kinds of unmasked calls, joined by their normalisers ---------------------------------------------

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def joined(query: Tensor, key: Tensor, value: Tensor, trees: PackedTrees, shape: Shape) -> Tensor:
    """Prompts to themselves, completions to themselves, and all completions of a tree to their prompt at once.

    The two halves of a completion's softmax are joined by their log-normalisers, as ring attention does (arXiv
    2310.01889): no mask, no copy of the prompt's keys, no work in the masked half. Low precisions are computed in
    float32, which is as fast here and more exact.
    """
    if shape.window is not None or shape.softcap:
        return segments(query, key, value, trees, shape)
    dtype = query.dtype
    exact = [states.float() if dtype in (torch.bfloat16, torch.float16) else states for states in (query, key, value)]
    attended: Tensor = _Joined.apply(*exact, trees.nodes, shape.scale)
    return attended.to(dtype)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, nodes: tuple[Node, ...], scale: float) -> Tensor:
        _, heads, tokens, width = query.shape
        attended = query.new_empty(1, tokens, heads, width)
        out = attended.transpose(1, 2)
        normaliser = query.new_empty(1, heads, tokens)

        def attend(queries: Span, keys: Span, causal: bool) -> Any:
            own, seen = slice(*queries), slice(*keys)
            return _flash(query[:, :, own], key[:, :, seen], value[:, :, seen], 0.0, causal, scale=scale)

        for node in nodes:
            span = slice(*node.own)
            out[:, :, span], normaliser[:, :, span] = attend(node.own, node.own, True)
        for node in _continued(nodes):
            by_prompt, prompt_normaliser = attend(node.below, node.own, False)
            span = slice(*node.below)
            own, own_normaliser = out[:, :, span], normaliser[:, :, span]
            own.lerp_(by_prompt, torch.sigmoid(prompt_normaliser - own_normaliser)[..., None])
            torch.logaddexp(own_normaliser, prompt_normaliser, out=own_normaliser)
        ctx.save_for_backward(query, key, value, attended, normaliser)
        ctx.nodes, ctx.scale = nodes, scale
        return attended

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, attended, normaliser = ctx.saved_tensors
        out, grad = attended.transpose(1, 2), grad_outputs[0].transpose(1, 2)
        grads = [torch.empty_like(states) for states in (query, key, value)]

        # With the joint normaliser each part's probabilities are the joint softmax's, so the parts just add up.
        def back(queries: Span, keys: Span, causal: bool) -> Any:
            own, seen = slice(*queries), slice(*keys)
            return _flash_backward(
                grad[:, :, own],
                query[:, :, own],
                key[:, :, seen],
                value[:, :, seen],
                out[:, :, own],
                normaliser[:, :, own],
                0.0,
                causal,
                scale=ctx.scale,
            )

        for node in ctx.nodes:
            for total, part in zip(grads, back(node.own, node.own, True), strict=True):
                total[:, :, slice(*node.own)] = part
        for node in _continued(ctx.nodes):
            parts, spans = back(node.below, node.own, False), (node.below, node.own, node.own)
            for total, part, span in zip(grads, parts, spans, strict=True):
                total[:, :, slice(*span)] += part
        return *grads, None, None


def _continued(nodes: tuple[Node, ...]) -> list[Node]:
    return [node for node in nodes if node.below[0] < node.below[1]]


# ---- CUDA: variable-length flash attention, or a block mask ------------------------------------------------------


def variable_length(query: Tensor, key: Tensor, value: Tensor, trees: PackedTrees, shape: Shape) -> Tensor:
    """One call of flash attention for the row; the keys of a prompt are gathered once for each of its completions.

    Raises:
        NotImplementedError: the layer wants a soft-cap.
    """
    if shape.softcap:
        raise NotImplementedError("variable-length attention has no soft-cap")
    from torch.nn.attention.varlen import varlen_attn

    indices, layout = trees.once("variable length", gathered_keys)
    out = varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        key[0].transpose(0, 1).index_select(0, indices),
        value[0].transpose(0, 1).index_select(0, indices),
        *layout,
        scale=shape.scale,
        window_size=(-1 if shape.window is None else shape.window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out[None]


def gathered_keys(trees: PackedTrees) -> tuple[Tensor, tuple[Tensor, Tensor, int, int]]:
    """The indices in the row of the keys that each node sees, those above it and its own; and where the queries and
    the keys of the nodes begin, `[nodes + 1]` each, with the most that a node has of them."""
    seen = [index for node in trees.nodes for span in (*node.above, node.own) for index in range(*span)]
    queries = [stop - start for (start, stop), _, _ in trees.nodes]
    keys = [node.longest for node in trees.nodes]

    def starts(lengths: list[int]) -> Tensor:
        total = torch.tensor([0, *lengths]).cumsum(0)
        return total.to(torch.int32).to(trees.input_ids.device)

    indices = torch.tensor(seen, device=trees.input_ids.device)
    return indices, (starts(queries), starts(keys), max(queries), max(keys))


def block_mask(query: Tensor, key: Tensor, value: Tensor, trees: PackedTrees, shape: Shape) -> Tensor:
    """FlexAttention with a mask over blocks of the row; honours windows and soft-caps."""
    from torch.nn.attention.flex_attention import flex_attention

    mask = trees.once(f"block mask, window {shape.window}", lambda row: flex_mask(row, shape.window))
    score = None if shape.softcap is None else _cap(shape.softcap)
    attend = _compiled(flex_attention) if query.device.type == "cuda" else flex_attention
    out = attend(query, key, value, score, mask, scale=shape.scale, enable_gqa=query.shape[1] != key.shape[1])
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


def flex_mask(trees: PackedTrees, window: int | None) -> Any:
    """A block mask: a token sees those at or before itself in the row that are of its own node or one above it."""
    from torch.nn.attention.flex_attention import create_block_mask

    device, position = trees.input_ids.device, trees.positions[0]
    sizes = torch.tensor([stop - start for (start, stop), _, _ in trees.nodes])
    node = torch.arange(len(sizes)).repeat_interleave(sizes).to(device)
    index = {own: i for i, (own, _, _) in enumerate(trees.nodes)}
    pairs = [(index[own], index[span]) for own, above, _ in trees.nodes for span in (*above, own)]
    sees = torch.zeros(len(sizes), len(sizes), dtype=torch.bool)
    sees[tuple(torch.tensor(pairs).T)] = True
    sees = sees.to(device)

    def allowed(batch: Tensor, head: Tensor, own: Tensor, seen: Tensor) -> Tensor:
        inside = (own >= seen) & sees[node[own], node[seen]]
        return inside if window is None else inside & (position[own] - position[seen] < window)

    return create_block_mask(allowed, None, None, trees.tokens, trees.tokens, device=device)


@lru_cache(maxsize=8)
def _cap(softcap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, *index: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@lru_cache(maxsize=1)
def _compiled(function: Any) -> Any:
    # Dynamic, since every row has its own number of tokens and compiling anew costs seconds.
    return torch.compile(function, dynamic=True)


BACKENDS: dict[str, Backend] = {
    "prefold_segments": segments,
    "prefold_joined": joined,
    "prefold_variable_length": variable_length,
    "prefold_block_mask": block_mask,
}

for _name, _backend in BACKENDS.items():
    register(_name, _backend)


def candidates(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Backends of a device: first the one that computes every dtype and is held against the plain path, then those that
    are held against the first."""
    if device.type == "cpu":
        return ["prefold_joined"]
    if device.type == "cuda":
        half = ["prefold_variable_length"] if dtype in (torch.float16, torch.bfloat16) else []
        return ["prefold_segments", "prefold_block_mask", *half]
    return ["prefold_segments"]
