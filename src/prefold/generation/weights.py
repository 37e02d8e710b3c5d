"""The weights during generation: adapters folded in, 4-bit weights dequantised, and on a CPU in oneDNN's own order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from peft.utils.integrations import get_bnb_param_type
from torch import Tensor, nn
from torch.nn.functional import linear

from prefold.memory import available
from prefold.trees.head import computing_by
from prefold.trees.memory import free_on

ROWS = 32
"""Rows of inputs that oneDNN's order is chosen for; it serves others well."""
SHARE = 0.5
"""Share of the free memory that a second copy of the weights may take."""


@contextmanager
def fold_adapter(model: nn.Module) -> Iterator[None]:
    """While open, the active LoRA adapters are merged into the weights: unmerged, they add two small products to each
    layer at every step. 4-bit weights, which every product would dequantise anew, get a dequantised copy with the
    adapter, if free memory could hold it twice.

    The original weights are kept and restored byte for byte. Layers stay unmerged if that is not possible: over 8-bit
    or tied weights, with another kind of adapter (DoRA), or with disabled adapters. Nothing may train, save or switch
    adapters meanwhile.
    """
    owners = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    with ExitStack() as stack:
        for layer in (module for module in model.modules() if type(module) is Linear):
            weights = layer.get_base_layer().parameters()
            plain = all(type(weight) is nn.Parameter and owners[id(weight)] == 1 for weight in weights)
            if plain and _foldable(layer):
                stack.enter_context(_folded(layer))
        in_4_bits = [module for module in model.modules() if _is_in_4_bits(module)]
        if _fit(in_4_bits):
            above = {id(layer.base_layer): layer for layer in model.modules() if isinstance(layer, LoraLayer)}
            for base in in_4_bits:
                around: Any = above.get(id(base))
                folds = around is not None and _foldable(around) and not any(around.lora_bias.values())
                forward = _unpacked(base, around if folds else None)
                stack.enter_context(computing_by(around if folds else base, forward))
        yield


def _foldable(layer: Any) -> bool:
    return not (layer.lora_variant or layer.disable_adapters or layer.merged)


@contextmanager
def _folded(layer: Linear) -> Iterator[None]:
    base = layer.get_base_layer()
    kept = [(weight, weight.data) for weight in base.parameters()]
    try:
        with torch.no_grad():
            # PEFT's safe merge computes in a copy, which takes the place of the original.
            layer.merge(safe_merge=True)
        # Without PEFT's checks at every call.
        with computing_by(layer, partial(base)):
            yield
    finally:
        for weight, original in kept:
            weight.data = original
        layer.merged_adapters.clear()


def _is_in_4_bits(module: nn.Module) -> bool:
    weight: Any = module._parameters.get("weight")
    state = getattr(weight, "quant_state", None)
    # On a CPU bitsandbytes has an order of its own for inference.
    in_order = state is not None and not getattr(state, "packing_format_for_cpu", False)
    return in_order and get_bnb_param_type(weight) == "4bit" and hasattr(module, "compute_dtype")


def _fit(layers: Iterable[Any]) -> bool:
    """Whether the free memory of each device can hold dequantised copies of these layers."""
    sizes: Counter[torch.device] = Counter()
    for layer in layers:
        sizes[layer.weight.device] += layer.weight.quant_state.shape.numel() * _computes_in(layer).itemsize
    return all(
        size <= SHARE * (free_on(device) if device.type == "cuda" else available()) for device, size in sizes.items()
    )


def _computes_in(layer: Any) -> torch.dtype:
    dtype: torch.dtype = layer.compute_dtype or layer.weight.quant_state.dtype
    return dtype


@torch.no_grad()
def _unpacked(base: Any, layer: Any) -> Callable[[Tensor], Tensor]:
    """The forward pass of a 4-bit layer, with the active adapters of the LoRA layer around it, by a dequantised weight
    that is rounded once, to the dtype that the layer computes in."""
    from bitsandbytes.functional import dequantize_4bit

    state = copy(base.weight.quant_state)
    state.dtype = torch.float32
    whole = dequantize_4bit(base.weight.data, state)
    for name in layer.active_adapters if layer is not None else ():
        if name in layer.lora_A:
            whole += layer.get_delta_weight(name)
    weight = whole.to(_computes_in(base))

    def forward(x: Tensor) -> Tensor:
        device, dtype = x.device.type, _computes_in(base)  # float32 in the self-check
        as_given = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        bias = None if base.bias is None else base.bias.to(dtype)
        return linear(x.to(dtype), weight.to(dtype), bias).to(as_given)

    return forward


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """While open, plain linear layers on the CPU compute with reordered weights, which must not change meanwhile.

    Products with few rows are bound by reordering the weights; if that is done once instead of at every call, steps of
    8 rows take half the time and steps of 64 four fifths. Memory holds the originals as well. Nothing happens if oneDNN
    is missing or memory is short.
    """
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and module.weight.dtype in (torch.float32, torch.bfloat16)
        and module.weight.device.type == "cpu"
        and "forward" not in module.__dict__
        and not module._forward_pre_hooks  # such as those that cast weights for the call
    ]
    size = sum(layer.weight.nbytes for layer in layers)
    fits = torch.backends.mkldnn.is_available() and size <= SHARE * available()
    with ExitStack() as stack:
        for layer in layers if fits else ():
            stack.enter_context(computing_by(layer, _packed_forward(layer)))
        yield


def _packed_forward(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight, bias = layer.weight, layer.bias
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)

    def forward(x: Tensor) -> Tensor:
        if x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
            return linear(x, weight, bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return out

    return forward
