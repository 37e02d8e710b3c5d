"""The prefix attention: prompts attend causally to themselves, completions to their prompt and to themselves.

The only place that knows an attention backend. Each backend is a function registered with transformers under a name of
our own that the mask interface does not know, so models build no mask; the layout of the row reaches it as the keyword
`trees`, which a model's `forward(**kwargs)` hands down.

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
"""Whether torch's variable-length attention has a keyword for them; the kernel of 2.11 takes them without."""
CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)
"""What transformers calls it, in arguments and methods: the first since 5.23."""


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
    """Scores bent by softcap * tanh(score / softcap) before the softmax (Gemma 2, arXiv 2408.00118, section 2)."""
    assert shape.softcap is not None
    group = query.shape[1] // keys.shape[1]
    keys, values = (states.repeat_interleave(group, dim=1) for states in (keys, values))
    scores = torch.tanh(query @ keys.transpose(2, 3) * (shape.scale / shape.softcap)) * shape.softcap
    hidden = ~_mask(query, keys, trees, shape)
    accumulate = torch.promote_types(query.dtype, torch.float32)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1, dtype=accumulate)
    return weights.to(values.dtype) @ values


def _mask(query: Tensor, keys: Tensor, trees: PackedTrees, shape: Shape) -> Tensor:
    """Kept with the row, whose layers all ask for it, and no longer: on a GPU a few hundred would take gigabytes."""
    given = (query.shape[2], keys.shape[2], shape.window, query.device)
    mask: Tensor = trees.once(f"mask {given}", lambda row: lower_right(*given))
    return mask


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
    """The indices in the row of the keys that each node sees, those above it and its own; and where the queries and
    the keys of the nodes begin, `[nodes + 1]` each, with the most that a node has of them."""
    seen = [torch.arange(*span) for node in trees.nodes for span in (*node.above, node.own)]
    queries = [stop - start for (start, stop), _, _ in trees.nodes]
    keys = [node.longest for node in trees.nodes]

    def starts(lengths: list[int]) -> Tensor:
        total = torch.tensor([0, *lengths]).cumsum(0)
        return total.to(device, torch.int32)

    return torch.cat(seen).to(device), (starts(queries), starts(keys), max(queries), max(keys))


BLOCK_MASK = "prefold_block_mask"
BLOCK = 128
"""Tokens of a block of FlexAttention's mask."""
COMPILER = "inductor"
"""What compiles FlexAttention; a CPU has no backward pass of it."""


def block_mask(query: Tensor, key: Tensor, value: Tensor, trees: PackedTrees, shape: Shape) -> Tensor:
    """FlexAttention with a mask over blocks of the row, padded to whole ones; honours windows and soft-caps."""
    device, window = query.device, shape.window
    mask = trees.once(f"blocks on {device}, window {window}", lambda row: flex_mask(row, window, device))
    tokens = query.shape[2]
    states = [pad(each, (0, 0, 0, mask.shape[-1] - tokens)) for each in (query, key, value)]
    attend = _compiled(shape.softcap or 0.0, window is None, *(each.requires_grad for each in states))
    with torch.autocast(device.type, enabled=False):
        out: Tensor = attend(*states, mask, shape.scale, query.shape[1] != key.shape[1])
    return out[:, :, :tokens].transpose(1, 2)


def flex_mask(trees: PackedTrees, window: int | None, device: torch.device) -> Any:
    """A block mask of two blocks or more, from the spans of the row: a token is seen from itself on up to the end of
    what continues its node. Padding behind the row sees itself. Takes 8 bytes a token and 16 for each pair of blocks.
    """
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
    (first, last), (least, most) = (each.view(-1, BLOCK).aminmax(dim=1) for each in (end, position))
    seen, whole = last > start, first >= start + BLOCK
    if window is not None:
        seen &= least[:, None] - most < window
        whole &= most[:, None] - least < window
    whole.tril_(-1)
    tables = [_listed(blocks[None, None]) for blocks in (seen.tril() & ~whole, whole)]
    return BlockMask.from_kv_blocks(*tables[0], *tables[1], BLOCK_SIZE=BLOCK, mask_mod=allowed)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row has, and which, those first."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.int()


@cache
def _compiled(softcap: float, *kind: bool) -> Any:
    """FlexAttention, compiled for a kind of call. Only 8 versions of one function are compiled; what would be the ninth
    is computed with the whole matrix of scores, or refused with `fullgraph`."""
    from torch.nn.attention.flex_attention import flex_attention

    def bent(score: Tensor, *index: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float, grouped: bool) -> Any:
        return flex_attention(query, key, value, bent if softcap else None, mask, scale=scale, enable_gqa=grouped)

    attend.__code__ = attend.__code__.replace()  # what versions are counted by
    # Lengths vary by row, and compiling anew costs seconds. A score with a number that varies has no gradient.
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
    """Of the queries and of the keys of a layer, and their width."""
    config = config.get_text_config()
    queries = getattr(config, "num_attention_heads", None) or 1
    keys = getattr(config, "num_key_value_heads", None) or queries
    return queries, keys, getattr(config, "head_dim", None) or config.hidden_size // queries


def candidates(device: torch.device, dtype: torch.dtype, config: Any = None) -> list[str]:
    """Backends of a device that can compute in a dtype with what a model's text configuration asks for, the one to be
    preferred first. The last computes everything: it is held against the plain path, and the others against it."""
    if device.type != "cuda":
        return ["prefold_joined" if device.type == "cpu" else "prefold_segments"]
    has_softcap = getattr(config, "attn_logit_softcapping", None)
    first = [] if dtype.itemsize != 2 or has_softcap else ["prefold_variable_length"]
    return [*first, BLOCK_MASK, "prefold_segments"]
