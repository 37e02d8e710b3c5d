"""The self-check: whether packed passes of a model give the plain method's numbers, and by which backends.

A few real tokens are scored both ways before a run relies on packing. If the numbers differ by more than rounding, or
the model is known to rule packing out, the plain path is taken, and the reason is logged.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prefold.device import is_half
from prefold.errors import first_line
from prefold.trees.attention import BACKENDS, BLOCK_MASK, Shape, heads_of, unwrapped, using_attention
from prefold.trees.head import head_obstacle, score_layer
from prefold.trees.logprobs import packed_logprobs, router_coefficient
from prefold.trees.memory import free_memory, is_out_of_memory
from prefold.trees.packing import PackedTrees, Span, TokenTree

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest difference of a token's log-prob, in nats, that rounding in a dtype explains."""
COARSE = 1.0
"""The same with 8-bit layers, which round their inputs differently in each row of tokens: half a nat is common, a leak
makes several."""
TF32 = 2.0**-10
"""Relative precision to which a GPU may round products in float32."""
PROMPT, COMPLETION, SIBLINGS = 160, 32, 4
"""The most that is checked: tokens of a prompt, tokens of a completion, completions of a tree. A prompt of more than
128 tokens has more than one block of FlexAttention's mask."""
LEAST = 3
"""Fewest tokens of a checked completion: what its last one attends to shows in no log-prob."""
BEYOND = 32
"""Tokens by which a checked tree exceeds a window."""

NONE_IS_RIGHT = "no attention backend of the device gives its numbers"

logger = logging.getLogger("prefold")


# ---- what rules packing out -------------------------------------------------------------------------------------


def obstacle(model: nn.Module) -> str | None:
    """Why a model is known to rule packing out, or None."""
    base = unwrapped(model)
    if not base._can_set_attn_implementation():
        return "its attention cannot be replaced"
    layers = getattr(base.config.get_text_config(), "layer_types", None) or ()
    if odd := sorted({*layers} - {"full_attention", "sliding_attention"}):
        return f"it has layers that carry a state or a mask of their own ({', '.join(odd)})"
    if router_coefficient(base):
        return "the auxiliary loss of its router counts the tokens of padded batches"
    return None if score_layer(base) is not None else head_obstacle(base)


def stretched_positions(model: nn.Module, longest: int) -> str | None:
    """Why rows of `longest` tokens cannot share a batch, or None: rotary frequencies may depend on the longest row."""
    config = unwrapped(model).config.get_text_config()
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    for rope in [parameters, *(value for value in parameters.values() if isinstance(value, dict))]:
        kind = rope.get("rope_type", "default")
        limit = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if (kind == "longrope" or "dynamic" in kind) and longest > limit:
            return f"its {kind} positions change beyond {limit:,} tokens, and the longest row has {longest:,}"
    return None


# ---- what is checked --------------------------------------------------------------------------------------------


def revealing(trees: Sequence[TokenTree], window: int | None) -> list[list[TokenTree]]:
    """Rows of parts of real trees that reveal a fault as the whole trees would, at the cost of a few hundred tokens.

    What a token attends to depends on where it is: in a prompt or a completion, beside siblings, beside another tree,
    within the window or beyond it. So one row has trees of several completions, of different lengths; and if a tree is
    longer than the model's window, a second row has one that just exceeds it.
    """
    by_length = sorted(trees, key=lambda tree: tree.longest)
    deepest, within = by_length[-1], min(window or PROMPT + COMPLETION, PROMPT + COMPLETION)
    completion = min(COMPLETION, max(LEAST, within // 4))
    several = [_cut(tree, (within - completion) >> depth, completion) for depth, tree in enumerate(by_length[:-4:-1])]
    if window is None or deepest.longest <= window:
        return [several]
    beyond = window + BEYOND
    return [several, [_cut(deepest, beyond - COMPLETION, COMPLETION, beyond, 2), several[-1]]]


def _cut(tree: TokenTree, prompt: int, completion: int, longest: int = 0, number: int = SIBLINGS) -> TokenTree:
    """The end of a prompt with the beginnings of some of its completions, each shorter than the one before.
    If the prompt is too short for a tree of `longest` tokens, the longest completion makes up for it."""
    ending = tree.prompt[-max(1, prompt) :]
    completions = sorted(tree.completions[:number], key=len, reverse=True) if longest else tree.completions[:number]
    lengths = [max(LEAST, completion - i * completion // 4) for i in range(len(completions))]
    lengths[0] = max(lengths[0], longest - len(ending))
    spans = dict(zip(tree.completions, tree.context, strict=False))
    cut = tuple(ids[:length] for ids, length in zip(completions, lengths, strict=True))
    context = (_within(spans.get(ids, ()), part) for ids, part in zip(completions, cut, strict=True))
    return TokenTree(ending, cut, tuple(context))


def _within(spans: Sequence[Span], part: Sequence[int]) -> tuple[Span, ...]:
    """The spans of context in the beginning of a completion; none if they would leave no token to score."""
    inside = tuple((start, min(stop, len(part))) for start, stop in spans if start < len(part))
    return inside if sum(stop - start for start, stop in inside) < len(part) else ()


def window_of(config: PreTrainedConfig) -> int | None:
    """The positions that a token sees in the layers with a sliding window; None where no layer has one."""
    layers = getattr(config, "layer_types", None)
    slides = layers is None or "sliding_attention" in layers
    return getattr(config, "sliding_window", None) if slides else None


# ---- packed against plain ---------------------------------------------------------------------------------------


def packing_fault(model: nn.Module, row: PackedTrees, attention: str, plain: Callable[[], Tensor]) -> str | None:
    """How a row's log-probs with a backend differ from the `[S]` plain ones of the model as it comes, or None if they
    do not. Errors of running out of memory are raised."""

    def packed() -> tuple[Tensor, int]:
        with using_attention(model, attention):
            return packed_logprobs(model, row).tokens, row.scratch.get("calls", 0)

    return difference(model, packed, plain)


@torch.no_grad()
def difference(
    model: nn.Module,
    packed: Callable[[], tuple[Tensor, int]],
    plain: Callable[[], Tensor],
    rounding: float | None = None,
) -> str | None:
    """How the log-probs `[S]` of a packed pass differ from those of a plain one, or None if they do not.

    Both are computed in float32 whatever the dtype of the weights, so that a small mistake cannot hide in rounding.
    Errors of running out of memory are raised.

    Args:
        packed: returns the log-probs and the number of layers that called the engine's attention.
        rounding: nats that rounding explains; by default `TOLERANCE` of the dtype, or `COARSE` with 8-bit layers.
    """
    with in_float32(model):
        try:
            logprobs, calls = packed()
        except (NotImplementedError, TypeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            return f"its packed forward pass failed ({first_line(error)})"
        wanted = plain()
    base = unwrapped(model)
    layers = base.config.get_text_config().num_hidden_layers
    if calls != layers:
        return f"{calls} of its {layers} layers call the attention that packing replaces"
    largest = float((logprobs - wanted).abs().max())
    if rounding is None:
        in_8_bit = any(parameter.dtype == torch.int8 for parameter in model.parameters())
        rounding = COARSE if in_8_bit else TOLERANCE[torch.promote_types(base.dtype, torch.float32)]
    if not largest <= rounding:
        what, unit = ("log-probs", " nats") if score_layer(model) is None else ("scores", "")
        return f"packed {what} differ from plain ones by {largest:.2g}{unit}, rounding explains {rounding:.2g}{unit}"
    return None


# ---- which backend ----------------------------------------------------------------------------------------------


def choose_attention(
    model: nn.Module, names: Sequence[str], rows: Sequence[PackedTrees], dtype: torch.dtype
) -> str | None:
    """The first of these backends whose output and gradients are those of the last one in float32; FlexAttention only
    if it is faster than the next, on the last row. None if none is right; the log names each that fails.

    Args:
        rows: the layouts to compare on, with random states of the model's shape in `dtype`, that of training.
    """
    if len(names) == 1:
        return names[0]
    trials = [trial for row in rows for trial in _trials(unwrapped(model), row, dtype)]
    wanted = [_in_float32(names[-1], trial) for trial in trials]
    seconds: dict[str, float] = {}
    for name in names:
        try:
            reason = _deviation(name, trials, wanted)
            elapsed = _seconds(name, trials[-1])
        except Exception as error:  # a kernel, compiler or driver may fail in any way, or run out of memory
            reason = f"{type(error).__name__}: {first_line(error)}"
        if reason is not None:
            logger.warning("the attention %s is not used: %s", name, reason)
            free_memory()
            continue
        seconds[name] = elapsed
        if name != BLOCK_MASK:
            break
    return min(seconds, key=seconds.__getitem__, default=None)


class Trial(NamedTuple):
    """`states`, `[1, heads, T, D]` each: random queries, keys, values, and a gradient of the output."""

    row: PackedTrees
    shape: Shape
    states: tuple[Tensor, ...]


def _trials(base: PreTrainedModel, row: PackedTrees, dtype: torch.dtype) -> Iterator[Trial]:
    """One without a window, and one with the model's if that is shorter than the row's longest tree."""
    config = base.config.get_text_config()
    heads, key_heads, width = heads_of(config)
    generator = torch.Generator(base.device).manual_seed(0)
    states = tuple(
        torch.randn(1, number, row.tokens, width, generator=generator, device=base.device).to(dtype)
        for number in (heads, key_heads, key_heads, heads)
    )
    window, softcap = window_of(config), getattr(config, "attn_logit_softcapping", None)
    for limit in (None, window) if window and row.longest > window else (None,):
        yield Trial(row, Shape(width**-0.5, limit, softcap), states)


def _attended(name: str, trial: Trial) -> list[Tensor]:
    """A backend's output, and the gradients of queries, keys and values: `[1, heads, T, D]` each."""
    query, key, value, gradient = (states.detach().requires_grad_() for states in trial.states)
    with torch.enable_grad():
        out = BACKENDS[name](query, key, value, trial.row, trial.shape).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, (query, key, value), gradient)]


def _in_float32(name: str, trial: Trial) -> list[Tensor]:
    """The same in float32, one key head at a time: with a soft-cap, the scores of all heads would take gigabytes."""
    groups = zip(*(states.float().chunk(trial.states[1].shape[1], dim=1) for states in trial.states), strict=True)
    parts = [_attended(name, trial._replace(states=group)) for group in groups]
    return [torch.cat(part, dim=1) for part in zip(*parts, strict=True)]


def _deviation(name: str, trials: Sequence[Trial], wanted: Sequence[Sequence[Tensor]]) -> str | None:
    """How a backend's numbers differ from the `wanted` ones by more than rounding explains, or None. Token by token: an
    error in a few of them is small in the norm of all."""
    tolerance = 4 * max(torch.finfo(trials[0].states[0].dtype).eps, TF32)
    for trial, exact in zip(trials, wanted, strict=True):
        for what, given, right in zip(("output", "dq", "dk", "dv"), _attended(name, trial), exact, strict=True):
            error, size = (torch.linalg.vector_norm(values, dim=(0, 1, 3)) for values in (given.float() - right, right))
            # The first token of a tree attends to itself alone, so its dq is 0.
            floor = 0.1 * size.mean() + 0.001 * right[:, :, 0].numel() ** 0.5
            largest = float((error / (size + floor)).max())
            if not largest <= tolerance:
                of = f"{what}, window {trial.shape.window},"
                return f"its {of} is off by {largest:.2g}, rounding explains {tolerance:.2g}"
    return None


def _seconds(name: str, trial: Trial) -> float:
    started = time.perf_counter()
    _attended(name, trial)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


# ---- float32 ----------------------------------------------------------------------------------------------------


@contextmanager
def in_float32(model: nn.Module, rounded: torch.dtype | None = None) -> Iterator[None]:
    """While open, every module with half-precision weights computes in float32, its weights cast for the call alone;
    4-bit layers dequantise theirs to float32. With `rounded`, as if the weights had that dtype."""
    dtypes: dict[Any, Any] = {
        module: module.compute_dtype for module in model.modules() if hasattr(module, "compute_dtype")
    }
    handles = compute_in_float32(model, rounded)
    for module in dtypes:
        module.compute_dtype = torch.float32
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, dtype in dtypes.items():
            module.compute_dtype = dtype


def compute_in_float32(model: nn.Module, rounded: torch.dtype | None = None) -> list[RemovableHandle]:
    """Have every module with half-precision weights compute in float32 until the returned hooks are removed. On a CPU,
    memory of the cast weights is reused, since fresh pages cost more than the cast; not if gradients are enabled, since
    a backward pass needs the weights as they were."""
    kept: list[tuple[nn.Module, nn.Parameter, Tensor, Tensor | None]] = []
    spare: list[Tensor] = []

    def widen(module: nn.Module, *arguments: Any) -> None:
        # A module that PEFT wraps is not always called, but its weights are used.
        for parameter in module.parameters(recurse=isinstance(module, AuxiliaryTrainingWrapper)):
            if is_half(parameter.dtype) or (rounded and parameter.is_floating_point()):
                data = parameter.data.to(rounded or parameter.dtype)
                buffer = _taken(spare, data.numel()) if data.is_cpu and not torch.is_grad_enabled() else None
                kept.append((module, parameter, parameter.data, buffer))
                wide = data.float() if buffer is None else buffer[: data.numel()].view(data.shape).copy_(data)
                parameter.data = wide

    def narrow(module: nn.Module, arguments: Any, output: Any) -> None:
        # Found by module: sharded weights have been replaced by their shards when this is called.
        while kept and kept[-1][0] is module:
            _, parameter, data, buffer = kept.pop()
            parameter.data = data
            if buffer is not None and not _shares_memory(output, buffer):
                spare.append(buffer)

    handles = [module.register_forward_pre_hook(widen) for module in model.modules()]
    return handles + [module.register_forward_hook(narrow, always_call=True) for module in model.modules()]


def _taken(spare: list[Tensor], size: int) -> Tensor:
    """The smallest buffer of at least `size` numbers, or a new one in place of the largest."""
    fitting = [buffer for buffer in spare if len(buffer) >= size]
    taken = min(fitting, key=len) if fitting else torch.empty(size, dtype=torch.float32)
    gone = taken if fitting else max(spare, key=len, default=None)
    spare[:] = [buffer for buffer in spare if buffer is not gone]
    return taken


def _shares_memory(output: Any, buffer: Tensor) -> bool:
    return isinstance(output, Tensor) and output.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
