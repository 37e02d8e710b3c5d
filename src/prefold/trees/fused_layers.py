"""Layers of PEFT with forward passes of their own, for training.

LoRA in one piece: y = x W' + b + s (x A') B', with the backward pass that frozen weights allow. PEFT computes the
update beside the base layer and adds it, in six passes over memory and a gradient of the base product by autograd. Here
the update is accumulated into the product itself, and nothing is saved but the input and `x A'`.

Single rows of the embeddings and of the head that are trained, in place of the frozen ones. PEFT copies the whole
matrix in every pass, and its gradient is as large. Here the frozen matrix is left alone and the few rows are put where
they belong: in the states of their tokens, in the columns of the logits.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from torch.nn.functional import embedding, linear


def fuse_lora(model: nn.Module) -> int:
    """Give every plain LoRA layer of a model the fused forward pass; returns how many took it.

    Layers on quantised or trained weights, with DoRA, a bias of their own, several adapters or dropout keep PEFT's.
    """
    layers = [module for module in model.modules() if type(module) is Linear and _is_plain(module)]
    for layer in layers:
        layer.forward = MethodType(_lora_forward, layer)  # type: ignore[method-assign]
    return len(layers)


def _is_plain(layer: Any) -> bool:
    base = layer.base_layer
    name, *others = layer.lora_A
    return (
        type(base) is nn.Linear
        and not any(parameter.requires_grad for parameter in base.parameters())
        and not others
        and name not in layer.lora_variant
        and not layer.lora_bias[name]
        and isinstance(layer.lora_dropout[name], nn.Identity)
    )


def _lora_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    name, *others = layer.lora_A
    if args or kwargs or others or layer.disable_adapters or layer.merged or layer.active_adapters != [name]:
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    base, a, b = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name].weight
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            bias = base.bias if base.bias is None else base.bias.to(dtype)
            casts = (x.to(dtype), base.weight.to(dtype), bias, a.to(dtype), b.to(dtype))
            return _FusedLora.apply(*casts, layer.scaling[name])  # type: ignore[no-any-return]
    dtype = base.weight.dtype
    return _FusedLora.apply(x.to(dtype), base.weight, base.bias, a.to(dtype), b.to(dtype), layer.scaling[name])  # type: ignore[no-any-return]


class _FusedLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = linear(rows, weight, bias)
        inner = rows @ a.T
        out.addmm_(inner, b.T, alpha=scaling)
        ctx.save_for_backward(rows, weight, a, b, inner)
        ctx.scaling, ctx.shape = scaling, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, inner = ctx.saved_tensors
        grad = grad_outputs[0].reshape(-1, weight.shape[0])
        grad_inner = (grad @ b).mul_(ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_inner, a).view(ctx.shape)
        return grad_x, None, None, grad_inner.T @ rows, (grad.T @ inner).mul_(ctx.scaling), None


# ---- single trained rows ----------------------------------------------------------------------------------------


def fuse_trained_rows(model: nn.Module) -> int:
    """Give every layer with trained rows this forward pass; returns how many there are."""
    layers = [module for module in model.modules() if type(module) is TrainableTokensWrapper]
    for layer in layers:
        layer.forward = MethodType(_rows_forward, layer)  # type: ignore[method-assign]
    return len(layers)


def trained_rows(layer: Any) -> tuple[Tensor, Tensor] | None:
    """Ids `[K]` and rows `[K, D]` of the active adapter; None while it is switched off or merged."""
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
    inputs = inputs.to(rows.device)  # of several, as accelerate does for the layer inside
    if isinstance(base, nn.Embedding):
        matches = inputs[..., None] == ids
        own = embedding(matches.int().argmax(-1), rows).to(frozen.dtype)
        scale = layer.token_adapter._get_embed_scale()
        own = own if scale is None else own * scale.to(frozen.dtype)
        return torch.where(matches.any(-1, keepdim=True), own, frozen)
    bias = base.bias if base.bias is None else base.bias[ids]
    own = linear(inputs, rows.to(inputs.dtype), bias)
    return frozen.index_copy(-1, ids, own.to(frozen.dtype))
