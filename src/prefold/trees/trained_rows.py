"""Single rows of the embeddings and of the head that are trained, in place of the frozen ones.

PEFT copies the whole matrix in every pass, and its gradient is as large. Here the frozen matrix is left alone and the
few rows are put where they belong: in the states of their tokens, in the columns of the logits.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from torch.nn.functional import embedding, linear


def fuse_trained_rows(model: nn.Module) -> int:
    """Give every layer with trained rows this forward pass; returns how many there are."""
    layers = [module for module in model.modules() if type(module) is TrainableTokensWrapper]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]
    return len(layers)


def trained_rows(layer: Any) -> tuple[Tensor, Tensor] | None:
    """Ids `[K]` and rows `[K, D]` of the active adapter; None while it is switched off or merged."""
    tokens = layer.token_adapter
    if layer.disable_adapters or tokens.disable_adapters or tokens.merged:
        return None
    [name] = layer.active_adapters
    rows = tokens.trainable_tokens_delta[name]
    return torch.tensor(tokens.token_indices[name], device=rows.device), rows


def _forward(layer: Any, inputs: Tensor) -> Tensor:
    base, trained = layer.token_adapter.get_base_layer(), trained_rows(layer)
    frozen: Tensor = base(inputs)
    if trained is None:
        return frozen
    if isinstance(base, nn.Embedding):
        return _embedded(inputs, frozen, *trained, layer.token_adapter._get_embed_scale())
    ids, rows = trained
    bias = base.bias if base.bias is None else base.bias[ids]
    own = linear(inputs, rows.to(inputs.dtype), bias)
    return frozen.index_copy(-1, ids, own.to(frozen.dtype))


def _embedded(inputs: Tensor, frozen: Tensor, ids: Tensor, rows: Tensor, scale: Tensor | None) -> Tensor:
    matches = inputs[..., None] == ids
    own = embedding(matches.int().argmax(-1), rows).to(frozen.dtype)
    own = own if scale is None else own * scale.to(frozen.dtype)
    return torch.where(matches.any(-1, keepdim=True), own, frozen)
