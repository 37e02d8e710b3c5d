"""Weights of linear layers in oneDNN's own order while completions are written on a CPU.

Products with few rows are bound by putting the weights in order; done once instead of at every call, steps of 8 rows
take half the time and steps of 64 four fifths. The originals stay where they are: memory holds both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

ROWS = 32
"""Rows that the order is chosen for; it serves others well."""
SHARE = 0.5
"""Of the free memory that the second copy may take."""


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """While open, plain linear layers on the CPU compute with reordered weights, which must not change meanwhile.

    Nothing happens where oneDNN is missing or memory is short.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear and _can_be_packed(module)]
    size = sum(layer.weight.nbytes for layer in layers)
    layers = layers if size <= SHARE * _free_memory() else []
    try:
        for layer in layers:
            _pack(layer)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _can_be_packed(layer: nn.Linear) -> bool:
    weight = layer.weight
    known = weight.dtype in (torch.float32, torch.bfloat16) and weight.device.type == "cpu"
    return known and torch.backends.mkldnn.is_available() and "forward" not in layer.__dict__


@torch.no_grad()
def _pack(layer: nn.Linear) -> None:
    weight, bias = layer.weight, layer.bias
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)

    def forward(x: Tensor) -> Tensor:
        if x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
            return linear(x, weight, bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return out

    layer.forward = forward  # type: ignore[method-assign, assignment]


def _free_memory() -> int:
    """Bytes; 0 where the system does not say."""
    if "SC_AVPHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return 0
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
