"""An adapter folded into the weights for a while: unmerged, it adds two small products to each layer at every step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from peft.tuners.lora import Linear
from torch import nn


@contextmanager
def fold_adapter(model: nn.Module) -> Iterator[None]:
    """While open, the active LoRA adapters are part of the weights that they stand beside.

    The original weights are kept aside and put back as they were, byte for byte. Layers stay unmerged where that cannot
    be: on quantised or tied weights, with another kind of adapter (DoRA), or switched off. Nothing may train, save or
    switch adapters meanwhile.
    """
    owners = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    with ExitStack() as stack:
        for layer in model.modules():
            if type(layer) is Linear and _can_be_folded(layer, owners):
                stack.enter_context(_folded(layer))
        yield


def _can_be_folded(layer: Linear, owners: Counter[int]) -> bool:
    weights = list(layer.get_base_layer().parameters())
    plain = all(type(weight) is nn.Parameter and owners[id(weight)] == 1 for weight in weights)
    return plain and not layer.lora_variant and not layer.disable_adapters and not layer.merged


@contextmanager
def _folded(layer: Linear) -> Iterator[None]:
    base = layer.get_base_layer()
    kept = [(weight, weight.data) for weight in base.parameters()]
    fused = layer.__dict__.get("forward")
    try:
        with torch.no_grad():
            # PEFT's safe merge computes in a copy, which takes the place of the original.
            layer.merge(safe_merge=True)
        # Without PEFT's checks at every call.
        layer.forward = partial(base)  # type: ignore[method-assign]
        yield
    finally:
        for weight, original in kept:
            weight.data = original
        layer.merged_adapters.clear()
        layer.__dict__.pop("forward", None)
        if fused is not None:
            layer.forward = fused  # type: ignore[method-assign]
