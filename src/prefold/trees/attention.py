"""Tree attention: prompts attend causally to themselves, completions to their prompt and causally to themselves.

The only module that knows the attention backends. Each is a function registered with transformers under a name that its
mask interface does not know, so models build no mask; the layout of the row reaches the backend as the keyword `trees`,
which a model's `forward(**kwargs)` passes down.

Backends take `query` `[1, heads, T, D]`, `key` and `value` `[1, key heads, T, D]` and return `[1, T, heads, D]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from prefold.trees.packing import Node, PackedTrees, Span

NAMES_GROUPED_HEADS = torch.__version__ >= "2.12"
"""Whether torch's `varlen_attn` has the keyword `enable_gqa`; that of 2.11 takes grouped heads without it."""
CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)
"""Name of checkpointing in transformers' arguments and methods: `activation_checkpointing` since 5.23."""


class Shape(NamedTuple):
    """Parameters of a layer's attention besides queries, keys and values."""

    scale: float
    window: int | None
    """A token attends to the last `window` positions, its own included; None for no limit."""
    softcap: float | None


Backend = Callable[[Tensor, Tensor, Tensor, PackedTrees, Shape], Tensor]


def register(name: str, backend: Backend) -> None:
    """Register a backend with transformers as an attention implementation."""

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
        """Called by transformers in each layer.

        Raises:
            NotImplementedError: the layer needs something that the engine lacks; the self-check then chooses the plain
                path.
        """
        lacking = {"mask": attention_mask, "dropout": dropout or None, "sinks": s_aux, "position bias": position_bias}
        for feature, argument in lacking.items():
            if argument is not None:
                raise NotImplementedError(f"the tree attention has no {feature}")
        if trees is None:
            raise NotImplementedError("the model does not hand the layout of the row to its attention layers")
        trees.scratch["calls"] = trees.scratch.get("calls", 0) + 1
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        window = sliding_window if sliding_window is not None and trees.longest > sliding_window else None
        # With a float32 residual stream, the rotary embedding returns queries and keys wider than the values.
        on_cpu = query.device.type == "cpu"
        dtype = torch.promote_types(query.dtype, value.dtype) if on_cpu else value.dtype
        states = (query.to(dtype), key.to(dtype), value.to(dtype))
        return backend(*states, trees, Shape(scale, window, softcap)).to(value.dtype), None

    AttentionInterface.register(name, attention)


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, return-value]


def widened(values: Tensor) -> Tensor:
    """Half precision in float32; other dtypes as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While open, the model is in eval mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


# ---- segments: one call per prompt and per completion; for every device, dtype, window and soft-cap --------------


def segments(query: Tensor, key: Tensor, value: Tensor, trees: PackedTrees, shape: Shape) -> Tensor:
    """Torch's attention for each segment over `[prompt keys, own keys]`, with a lower-right causal mask."""
    attend = _softcapped if shape.softcap else _plain_softmax

    def seen(states: Tensor, node: Node) -> Tensor:
        own = states[:, :, slice(*node.own)]
        return torch.cat([*(states[:, :, slice(*span)] for span in node.above), own], dim=2) if node.above else own

    attended = [
        attend(query[:, :, slice(*node.own)], seen(key, node), seen(value, node), trees, shape) for node in trees.nodes
    ]
    return torch.cat(attended, dim=2).transpose(1, 2)


def _plain_softmax(query: Tensor, keys: Tensor, values: Tensor, trees: PackedTrees, shape: Shape) -> Tensor:
    rows, columns = query.shape[2], keys.shape[2]
    masked = rows != columns or (shape.window is not None and columns > shape.window)
    return scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=_mask(query, keys, trees, shape) if masked else None,
        is_causal=not masked,
        scale=shape.scale,
        enable_gqa=query.shape[1] != keys.shape[1],
    )


def _softcapped(query: Tensor, keys: Tensor, values: Tensor, trees: PackedTrees, shape: Shape) -> Tensor:
    """Scores capped by softcap * tanh(score / softcap) before the softmax (Gemma 2, arXiv 2408.00118, section 2)."""
    assert shape.softcap is not None
    group = query.shape[1] // keys.shape[1]
    keys, values = (states.repeat_interleave(group, dim=1) for states in (keys, values))
    scores = torch.tanh(query @ keys.transpose(2, 3) * (shape.scale / shape.softcap)) * shape.softcap
    hidden = ~_mask(query, keys, trees, shape)
    accumulate = torch.promote_types(query.dtype, torch.float32)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1, dtype=accumulate)
    return weights.to(values.dtype) @ values


def _mask(query: Tensor, keys: Tensor, trees: PackedTrees, shape: Shape) -> Tensor:
    """Cached in the row, whose layers share it, and freed with it: a few hundred masks take gigabytes on a GPU."""
    arguments = (query.shape[2], keys.shape[2], shape.window, query.device)
    mask: Tensor = trees.once(f"mask {arguments}", lambda row: lower_right(*arguments))
    return mask


def lower_right(rows: int, columns: int, window: int | None, device: torch.device) -> Tensor:
    """`[rows, columns]`, True where the last `rows` of `columns` positions may attend: to themselves and to what
    precedes them, less than `window` positions back."""
    query = torch.arange(columns - rows, columns, device=device)[:, None]
    distance = query - torch.arange(columns, device=device)[None]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


# ---- CPU: three kinds of unmasked calls, joined by their normalisers ---------------------------------------------

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def joined(query: Tensor, key: Tensor, value: Tensor, trees: PackedTrees, shape: Shape) -> Tensor:
    """Attention of prompts to themselves, of completions to themselves, and of a tree's completions to their prompt.

    The two parts of a completion's softmax are joined by their log-normalisers, as ring attention does (arXiv
    2310.01889): no mask, no copy of the prompt's keys, no work on masked scores. Half precision is computed in float32,
    which is as fast on a CPU and more accurate.
    """
    if shape.window is not None or shape.softcap:
        return segments(query, key, value, trees, shape)
    attended: Tensor = _Joined.apply(*map(widened, (query, key, value)), trees.nodes, shape.scale)
    return attended.to(query.dtype)


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

        # Given the joint normaliser, each call recomputes probabilities of the joint softmax, so the gradients add up.
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
    """One call of flash attention for the row; the keys of a prompt are gathered once per completion.

    Raises:
        NotImplementedError: the layer has a soft-cap.
    """
    if shape.softcap:
        raise NotImplementedError("variable-length attention has no soft-cap")
    from torch.nn.attention.varlen import varlen_attn

    grouped: Any = {"enable_gqa": query.shape[1] != key.shape[1]} if NAMES_GROUPED_HEADS else {}
    indices, layout = trees.once(f"keys on {key.device}", lambda row: gathered_keys(row, key.device))
    out = varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        key[0].transpose(0, 1).index_select(0, indices),
        value[0].transpose(0, 1).index_select(0, indices),
        *layout,
        scale=shape.scale,
        window_size=(-1 if shape.window is None else shape.window - 1, 0),
        **grouped,
    )
    assert isinstance(out, Tensor)
    return out[None]


def gathered_keys(trees: PackedTrees, device: torch.device) -> tuple[Tensor, tuple[Tensor, Tensor, int, int]]:
    """Indices into the row of the keys that each node attends to, concatenated; and the layout that `varlen_attn`
    takes: offsets of the nodes' queries and keys, `[nodes + 1]` each, and the largest number of both in a node."""
    seen = [torch.arange(*span) for node in trees.nodes for span in (*node.above, node.own)]
    queries = [stop - start for (start, stop), _, _ in trees.nodes]
    keys = [node.longest for node in trees.nodes]

    def starts(lengths: list[int]) -> Tensor:
        total = torch.tensor([0, *lengths]).cumsum(0)
        return total.to(device, torch.int32)

    return torch.cat(seen).to(device), (starts(queries), starts(keys), max(queries), max(keys))


BLOCK_MASK = "prefold_block_mask"
BLOCK = 128
"""Tokens per block of FlexAttention's mask."""
COMPILER = "inductor"
"""torch.compile's backend for FlexAttention, which has no backward pass on a CPU."""


def block_mask(query: Tensor, key: Tensor, value: Tensor, trees: PackedTrees, shape: Shape) -> Tensor:
    """FlexAttention with a block mask, the row padded to whole blocks; supports windows and soft-caps."""
    device, window = query.device, shape.window
    mask = trees.once(f"blocks on {device}, window {window}", lambda row: flex_mask(row, window, device))
    tokens = query.shape[2]
    states = [pad(tensor, (0, 0, 0, mask.shape[-1] - tokens)) for tensor in (query, key, value)]
    attend = _compiled(shape.softcap or 0.0, window is None, *(tensor.requires_grad for tensor in states))
    with torch.autocast(device.type, enabled=False):
        out: Tensor = attend(*states, mask, shape.scale, query.shape[1] != key.shape[1])
    return out[:, :, :tokens].transpose(1, 2)


def flex_mask(trees: PackedTrees, window: int | None, device: torch.device) -> Any:
    """The row's block mask, of at least two blocks: a token is visible to itself and to what follows it, up to the end
    of its node's descendants. Padding attends to padding. Takes 8 bytes per token and 16 per pair of blocks."""
    from torch.nn.attention.flex_attention import BlockMask

    tokens = trees.tokens
    length = BLOCK * max(2, -(-tokens // BLOCK))
    end = torch.full((length,), length, dtype=torch.int32)
    for node in trees.nodes:
        end[slice(*node.own)] = node.below[1]
    end = end.to(device)
    position = torch.cat([trees.positions[0].to(device), torch.arange(length - tokens, device=device)]).int()

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        inside = (query >= key) & (query < end[key])
        return inside if window is None else inside & (position[query] - position[key] < window)

    start = torch.arange(0, length, BLOCK, device=device)[:, None]
    (first, last), (least, most) = (values.view(-1, BLOCK).aminmax(dim=1) for values in (end, position))
    seen, full = last > start, first >= start + BLOCK
    if window is not None:
        seen &= least[:, None] - most < window
        full &= most[:, None] - least < window
    full.tril_(-1)
    tables = [_listed(blocks[None, None]) for blocks in (seen.tril() & ~full, full)]
    return BlockMask.from_kv_blocks(*tables[0], *tables[1], BLOCK_SIZE=BLOCK, mask_mod=allowed)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of blocks, how many are set, and all indices, those of set blocks first."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.int()


@cache
def _compiled(softcap: float, *kind: bool) -> Any:
    """FlexAttention, compiled for one kind of call. torch compiles at most 8 versions of a function; a ninth would
    compute the full matrix of scores, or fail with `fullgraph`."""
    from torch.nn.attention.flex_attention import flex_attention

    def bent(score: Tensor, *index: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float, grouped: bool) -> Any:
        return flex_attention(query, key, value, bent if softcap else None, mask, scale=scale, enable_gqa=grouped)

    attend.__code__ = attend.__code__.replace()  # torch counts versions by code object
    # Lengths vary by row, and recompiling takes seconds. A score function with a dynamic float has no gradient.
    constants = torch._dynamo.config.patch(specialize_float=True)
    return constants(torch.compile(attend, dynamic=True, fullgraph=True, backend=COMPILER))


BACKENDS: dict[str, Backend] = {
    "prefold_segments": segments,
    "prefold_joined": joined,
    "prefold_variable_length": variable_length,
    BLOCK_MASK: block_mask,
}

for _name, _backend in BACKENDS.items():
    register(_name, _backend)


def heads_of(config: Any) -> tuple[int, int, int]:
    """Number of query heads and of key heads in a layer, and their width."""
    config = config.get_text_config()
    queries = getattr(config, "num_attention_heads", None) or 1
    keys = getattr(config, "num_key_value_heads", None) or queries
    return queries, keys, getattr(config, "head_dim", None) or config.hidden_size // queries


def candidates(device: torch.device, dtype: torch.dtype, config: Any = None) -> list[str]:
    """Backends for a device, a dtype and a model's text configuration, the preferred one first. The last supports
    everything: it is compared with the plain path, and the others with it."""
    if device.type != "cuda":
        return ["prefold_joined" if device.type == "cpu" else "prefold_segments"]
    has_softcap = getattr(config, "attn_logit_softcapping", None)
    first = [] if dtype.itemsize != 2 or has_softcap else ["prefold_variable_length"]
    return [*first, BLOCK_MASK, "prefold_segments"]
