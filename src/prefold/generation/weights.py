"""The weights while completions are generated: adapters folded into them, and on a CPU in oneDNN's own order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn.functional import linear

from prefold.memory import available
from prefold.trees.head import computing_by

ROWS = 32
"""Rows that oneDNN's order is chosen for; it serves others well."""
SHARE = 0.5
"""Of the free memory that the second copy may take."""


@contextmanager
def fold_adapter(model: nn.Module) -> Iterator[None]:
    """While open, the active LoRA adapters are part of the weights that they stand beside: unmerged, they add two small
    products to each layer at every step.

    The original weights are kept aside and put back as they were, byte for byte. Layers stay unmerged where that cannot
    be: on quantised or tied weights, with another kind of adapter (DoRA), or switched off. Nothing may train, save or
    switch adapters meanwhile.
    """
    owners = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    with ExitStack() as stack:
        for layer in (module for module in model.modules() if type(module) is Linear):
            weights = layer.get_base_layer().parameters()
            plain = all(type(weight) is nn.Parameter and owners[id(weight)] == 1 for weight in weights)
            if plain and not layer.lora_variant and not layer.disable_adapters and not layer.merged:
                stack.enter_context(_folded(layer))
        yield


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


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """While open, plain linear layers on the CPU compute with reordered weights, which must not change meanwhile.

    Products with few rows are bound by putting the weights in order; done once instead of at every call, steps of 8
    rows take half the time and steps of 64 four fifths. The originals stay where they are: memory holds both. Nothing
    happens where oneDNN is missing or memory is short.
    """
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and module.weight.dtype in (torch.float32, torch.bfloat16)
        and module.weight.device.type == "cpu"
        and "forward" not in module.__dict__
        and not module._forward_pre_hooks  # such as cast weights for the call
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
