"""Faster forward passes for PEFT's layers in training.

Fused LoRA: y = x W' + b + s (x A') B', with the backward pass that frozen weights allow. PEFT computes the update
separately and adds it, in six passes over memory, and autograd computes the gradient of the base product. Here the
update is accumulated into the base product, and only the input of A and `x A'` are saved. 4-bit and 8-bit weights are
dequantised for each product, in the backward pass again, and not kept.

Trained rows of the embeddings and of the head, in place of frozen ones. PEFT copies the whole matrix in every pass, and
its gradient is as large. Here the frozen matrix is left alone, and the trained rows replace the embeddings of their
tokens and their columns of the logits.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

LINEAR = ("Linear", "Linear4bit", "Linear8bitLt")
"""Names of PEFT's LoRA classes; those for bitsandbytes exist only where it is installed."""


def fuse_lora(model: nn.Module) -> int:
    """Give every plain LoRA layer of a model the fused forward pass; returns how many got it.

    Layers over trained weights, with DoRA, with a LoRA bias or with several adapters keep PEFT's forward pass, and so
    do those over quantised weights that have no `unpacked(dtype)`.
    """
    adapted = (module for module in model.modules() if isinstance(module, LoraLayer))
    layers = [layer for layer in adapted if type(layer).__name__ in LINEAR and _is_plain(layer)]
    for layer in layers:
        layer.forward = MethodType(_lora_forward, layer)
    return len(layers)


def _is_plain(layer: Any) -> bool:
    base = layer.base_layer
    name, *others = layer.lora_A
    return (
        (type(base) is nn.Linear or hasattr(base, "unpacked"))
        and not any(parameter.requires_grad for parameter in base.parameters())
        and not others
        and name not in layer.lora_variant
        and not layer.lora_bias[name]
        and isinstance(layer.lora_dropout[name], nn.Identity | nn.Dropout)
    )


def _lora_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    name, *others = layer.lora_A
    base, device = layer.base_layer, x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    is_off = layer.disable_adapters or layer.merged or layer.active_adapters != [name]
    if args or kwargs or others or is_off or getattr(base, "compute_dtype", None) not in (None, dtype):
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    a, b = (factor[name].weight.to(dtype) for factor in (layer.lora_A, layer.lora_B))
    dropout = layer.lora_dropout[name]
    kept = 1 - dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 1.0
    return _FusedLora.apply(x, _cast(x, dtype), a, b, base, kept, layer.scaling[name])  # type: ignore[no-any-return]


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast `x`, once for all layers that take the same states (query, key and value; gate and up), so that they save
    the same tensor for their backward passes. It is stored as an attribute of `x` and freed with it, together with
    autograd's version of `x`, which tells whether `x` has been written to since."""
    if x.dtype == dtype or x.is_inference():
        return x.to(dtype)
    cast: Tensor
    version, cast = vars(x).get("cast", (None, x))
    if version != x._version or cast.dtype != dtype:
        cast = x.detach().to(dtype)
        vars(x)["cast"] = x._version, cast
    return cast


class _FusedLora(torch.autograd.Function):
    """`states` is x in the compute dtype; the gradient goes to x, so that autograd adds in the dtype of x. `kept` is
    the fraction of x that dropout keeps; its factor 1 / kept is part of the scaling, where it adds no rounding."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, states: Tensor, a: Tensor, b: Tensor, base: nn.Module, kept: float, scaling: float
    ) -> Tensor:
        out = base(states)
        rows, mask = states.reshape(-1, x.shape[-1]), None
        if kept < 1:
            mask = torch.empty_like(rows, dtype=torch.bool).bernoulli_(kept)
            rows = rows * mask
        inner = rows @ a.T
        out.view(-1, out.shape[-1]).addmm_(inner, b.T, alpha=scaling / kept)
        ctx.save_for_backward(rows, a, b, inner, mask)
        ctx.base, ctx.scaling, ctx.shape = base, scaling / kept, x.shape
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, a, b, inner, mask = ctx.saved_tensors
        grad = grad_outputs[0].reshape(-1, b.shape[0])
        grad_inner = (grad @ b).mul_(ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_inner @ a
            if mask is not None:
                grad_x.mul_(mask)
            # The larger product comes last, so that it is rounded once, together with the sum.
            base = ctx.base
            weight = base.weight.to(grad.dtype) if type(base) is nn.Linear else base.unpacked(grad.dtype)
            grad_x = grad_x.addmm_(grad, weight).view(ctx.shape)
        return grad_x, None, grad_inner.T @ rows, (grad.T @ inner).mul_(ctx.scaling), None, None, None


# ---- trained rows of embeddings and head ------------------------------------------------------------------------


def fuse_trained_rows(model: nn.Module) -> int:
    """Give every layer with trained rows the forward pass below; returns how many there are."""
    layers = [module for module in model.modules() if type(module) is TrainableTokensWrapper]
    for layer in layers:
        layer.forward = MethodType(_rows_forward, layer)  # type: ignore[method-assign]
    return len(layers)


def trained_rows(layer: Any) -> tuple[Tensor, Tensor] | None:
    """Token ids `[K]` and rows `[K, D]` of the active adapter; None while it is disabled or merged."""
    tokens = layer.token_adapter
    if layer.disable_adapters or tokens.disable_adapters or tokens.merged:
        return None
    [name] = layer.active_adapters
    rows = tokens.trainable_tokens_delta[name]
    return torch.tensor(tokens.token_indices[name], device=rows.device), rows


def _rows_forward(layer: Any, inputs: Tensor) -> Tensor:
    base, trained = layer.token_adapter.get_base_layer(), trained_rows(layer)
    frozen: Tensor = base(inputs)
    if trained is None:
        return frozen
    ids, rows = trained
    inputs = inputs.to(rows.device)  # on several devices, as accelerate does for the wrapped layer
    if isinstance(base, nn.Embedding):
        matches = inputs[..., None] == ids
        own = embedding(matches.int().argmax(-1), rows).to(frozen.dtype)
        scale = layer.token_adapter._get_embed_scale()
        own = own if scale is None else own * scale.to(frozen.dtype)
        return torch.where(matches.any(-1, keepdim=True), own, frozen)
    bias = base.bias if base.bias is None else base.bias[ids]
    own = linear(inputs, rows.to(inputs.dtype), bias)
    return frozen.index_copy(-1, ids, own.to(frozen.dtype))
