"""The output head, applied in chunks to the scored positions alone.

`[S, V]` logits never exist as a whole. Depending on the model family, a head has a bias, a scale or a soft-cap. PEFT
may have wrapped it, to train a copy of it or a few of its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from prefold.trees.attention import widened
from prefold.trees.fused_layers import trained_rows

T = TypeVar("T")

CHUNK = 256
"""Hidden states multiplied with the vocabulary matrix at once: 256 x 49,152 float32 logits are 50 MB."""
SCORE = "score"
"""transformers' name for the head of a sequence classifier, which it has in place of the vocabulary matrix."""


@dataclass(frozen=True)
class Head:
    """logits = cap(scale * (hidden @ weight.T + bias)) / temperature, where cap(x) = softcap * tanh(x / softcap).

    `layer` is the module that the model calls, `linear` the module whose weights are used, `rows` the token ids `[K]`
    and values `[K, D]` of trained rows, which replace frozen ones.
    """

    layer: nn.Module
    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None
    rows: tuple[Tensor, Tensor] | None = None
    temperature: float = 1.0


class Statistics(NamedTuple):
    """Statistics of the distribution at every scored position, `[S]` each, without gradients: `entropy` in nats,
    `squares`, the sum of squared probabilities, and `top1`, whether the target is the most likely token."""

    entropy: Tensor
    squares: Tensor
    top1: Tensor


def score_layer(model: nn.Module) -> nn.Module | None:
    """The head of a model that scores conversations; None for one that writes tokens."""
    layer = getattr(model, SCORE, None)
    return layer if isinstance(layer, nn.Module) else None


def head_of(model: Any, temperature: float = 1.0) -> Head:
    """What a model computes between its last hidden states and its logits, from its modules and its configuration."""
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    linear = weights_of(layer)
    assert isinstance(linear, nn.Linear)
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    rows = trained_rows(layer) if isinstance(layer, TrainableTokensWrapper) else None
    return Head(layer, linear, scale / divisor, getattr(config, "final_logit_softcapping", None), rows, temperature)


def head_obstacle(model: Any) -> str | None:
    """Why the head of this model cannot be applied in chunks, or None if it can."""
    layer = weights_of(model.get_output_embeddings())
    if type(layer) is not nn.Linear and not (isinstance(layer, FSDPModule) and isinstance(layer, nn.Linear)):
        return f"its output head is a {type(layer).__name__}, not a plain linear layer"
    return None


def weights_of(layer: Any) -> nn.Module:
    """The module inside PEFT's wrappers whose weights are used."""
    if isinstance(layer, TrainableTokensWrapper):
        layer = layer.token_adapter.get_base_layer()
    elif isinstance(layer, ModulesToSaveWrapper) and layer.active_adapters and not layer.disable_adapters:
        layer = layer.modules_to_save[layer.active_adapters[0]]
    elif isinstance(layer, ModulesToSaveWrapper):
        layer = layer.original_module
    assert isinstance(layer, nn.Module)
    return layer


@contextmanager
def head_computes(layer: nn.Module, score: Callable[[Tensor], T]) -> Iterator[list[T]]:
    """While open, a model's head appends `score` of its hidden states to the yielded list; its hooks still run.

    The model's `forward` gets a placeholder of the logits, without their vocabulary.
    """
    results: list[T] = []

    def forward(hidden: Tensor) -> Tensor:
        results.append(score(hidden))
        return hidden[..., :1].detach()

    with computing_by(layer, forward):
        yield results


@contextmanager
def computing_by(layer: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """While open, a layer computes `forward`; its hooks still run."""
    before = vars(layer).get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if before is not None:
            layer.forward = before


def head_logprobs(
    hidden: Tensor, head: Head, targets: Tensor, statistics: bool = False
) -> tuple[Tensor, Statistics | None]:
    """Log-probs of `targets` `[S]` given hidden states `[S, D]`: `[S]`, float32 (float64 for float64 inputs), on the
    device of the targets; hidden states and weights may be on others."""
    weight, rows = head.linear.weight, head.rows or (None, None)
    hidden, wanted = hidden.to(weight.device, weight.dtype), targets.to(weight.device)
    with torch.autocast(hidden.device.type, enabled=False):
        computed = _HeadLogprobs.apply(hidden, weight, head.linear.bias, wanted, head, statistics, *rows)
    logprobs, *values = (tensor.to(targets.device) for tensor in computed)
    return logprobs, Statistics(*values) if statistics else None


class _HeadLogprobs(torch.autograd.Function):
    """Chunked log-probs with their own backward.

    A token's log-prob is a scalar, so its gradient with respect to the hidden state is a single row, `W[target] -
    softmax @ W` for a plain head. It is computed from the chunk's softmax in the forward pass and only scaled in the
    backward pass: frozen heads (LoRA) need no second product with the vocabulary matrix. The same holds for trained
    rows, with a gradient `[S, K]` with respect to their logits. Fully trained heads recompute the softmax by chunks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: Head,
        statistics: bool,
        ids: Tensor | None,
        rows: Tensor | None,
    ) -> tuple[Tensor, ...]:
        accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logprobs = torch.empty(len(targets), dtype=accumulate, device=hidden.device)
        dtypes = (accumulate, accumulate, torch.bool) if statistics else ()
        gathered = [torch.empty_like(targets, dtype=dtype) for dtype in dtypes]
        jacobian = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        by_rows = None
        if ids is not None and rows is not None:
            weight = weight.index_copy(0, ids, rows.to(weight.dtype))
            by_rows = logprobs.new_empty(len(targets), len(ids)) if jacobian is not None else None
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            wanted = targets[part, None]
            logits = widened(nn.functional.linear(hidden[part], weight, bias))
            slope = _bend(logits, head, with_slope=jacobian is not None)
            if statistics:
                for values, value in zip(gathered, distribution_statistics(logits, wanted), strict=True):
                    values[part] = value
            own = logits.gather(-1, wanted)
            top = logits.amax(-1, keepdim=True)
            exponentials = logits.sub_(top).exp_()
            total = exponentials.sum(-1, keepdim=True)
            logprobs[part] = (own - top - total.log()).squeeze(-1)
            if jacobian is not None:
                target_rows = weight[targets[part]]
                if isinstance(slope, Tensor):
                    target_rows = target_rows * slope.gather(-1, wanted)
                    exponentials.mul_(slope)
                if by_rows is not None and ids is not None:
                    hits = wanted.eq(ids).to(by_rows.dtype)
                    hits = hits * slope[:, ids] if isinstance(slope, Tensor) else hits
                    by_rows[part] = head.scale / head.temperature * (hits - exponentials[:, ids] / total)
                expected = exponentials.to(weight.dtype) @ weight
                torch.addcdiv(target_rows, expected, total.to(target_rows.dtype), value=-1, out=jacobian[part])
        if jacobian is not None and head.scale != head.temperature:
            jacobian.mul_(head.scale / head.temperature)
        head_is_trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        kept_hidden = hidden if head_is_trained or by_rows is not None else None
        ctx.save_for_backward(jacobian, by_rows, kept_hidden, *((weight, bias, targets) if head_is_trained else ()))
        ctx.head = head
        ctx.mark_non_differentiable(*gathered)
        return logprobs, *gathered

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad_outputs[0]
        jacobian, by_rows, hidden, *saved = ctx.saved_tensors
        grad_hidden = jacobian * grad[:, None].to(jacobian.dtype) if jacobian is not None else None
        grad_weight, grad_bias = _head_gradients(grad, hidden, *saved, head=ctx.head) if saved else (None, None)
        grad_rows = (grad[:, None] * by_rows).T @ hidden.to(by_rows.dtype) if by_rows is not None else None
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, grad_rows


def _bend(logits: Tensor, head: Head, with_slope: bool) -> Tensor | None:
    """Apply scale, soft-cap and temperature to the logits in place. Returns the soft-cap's derivative; None without
    `with_slope` or a soft-cap."""
    if head.scale != 1.0:
        logits.mul_(head.scale)
    slope = None
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_()
        slope = logits.square().neg_().add_(1) if with_slope else None
        logits.mul_(head.softcap)
    if head.temperature != 1.0:
        logits.div_(head.temperature)
    return slope


def distribution_statistics(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`Statistics` of logits `[S, V]` for targets `[S, 1]`."""
    logprobs = logits.log_softmax(-1)
    probabilities = logprobs.exp()
    top1 = logits.argmax(-1) == targets.squeeze(-1)
    return -(probabilities * logprobs).sum(-1), probabilities.square().sum(-1), top1


def _head_gradients(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    head: Head,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the head's weight and bias. For the weight: the sum over tokens of grad * slope * (onehot(target) -
    softmax) times the hidden state."""
    scale = head.scale / head.temperature
    grad_weight = torch.zeros_like(weight, dtype=grad.dtype)
    grad_bias = torch.zeros_like(bias, dtype=grad.dtype) if bias is not None else None
    for start in range(0, len(targets), CHUNK):
        part = slice(start, start + CHUNK)
        logits = widened(nn.functional.linear(hidden[part], weight, bias))
        slope = _bend(logits, head, with_slope=True)
        by_logits = logits.softmax(-1).mul_(-grad[part, None])
        by_logits.scatter_add_(-1, targets[part, None], grad[part, None].to(by_logits.dtype))
        by_logits.mul_(scale if slope is None else slope.mul_(scale))
        grad_weight.addmm_(by_logits.T.to(grad_weight.dtype), hidden[part].to(grad_weight.dtype))
        if grad_bias is not None:
            grad_bias += by_logits.sum(0)
    return grad_weight.to(weight.dtype), grad_bias.to(weight.dtype) if grad_bias is not None else None
