"""Base weights in 4 or 8 bits, by bitsandbytes, ready for training LoRA over them.

What peft's `prepare_model_for_kbit_training` does beyond freezing is not needed: under autocast the stream between the
layers is float32, and so are log-probs; checkpoints without re-entry need no gradients of the inputs.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from prefold.errors import UserError
from prefold.recipe import Model


def quantisation(section: Model, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """What the section asks for, in transformers' words; None if it asks for nothing. `dtype` is what `auto` stands
    for. Raises UserError if bitsandbytes is not installed."""
    if not (section.load_in_4bit or section.load_in_8bit):
        return None
    if find_spec("bitsandbytes") is None:
        name = "load_in_4bit" if section.load_in_4bit else "load_in_8bit"
        what = "needs the package bitsandbytes, which is not installed"
        advice = "`pip install 'prefold[quantised]'`, or take the setting out"
        raise UserError(what, where=f"`model.{name}`", advice=advice)
    if section.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    named = section.bnb_4bit_compute_dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=section.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=section.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype if named in (None, "auto") else getattr(torch, named),
    )


def prepare_quantised(model: PreTrainedModel) -> None:
    """Let every quantised layer compute alike in training and evaluation, and take its inputs as other layers do.

    In evaluation mode on a CPU, bitsandbytes packs 4-bit weights into a form that has no gradient, and never back
    within a run; 8-bit layers round their inputs as well. Both would put the reference, which is computed in
    evaluation mode, apart from the policy.
    """
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    for layer in model.modules():
        if isinstance(layer, Linear4bit | Linear8bitLt):
            layer.train()
            layer.train = _stay  # type: ignore[method-assign, assignment]
            layer.register_forward_pre_hook(_as_under_autocast)


def _stay(mode: bool = True) -> None:
    """Stands in for the `train` of a layer that stays in training mode."""


def _as_under_autocast(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Autocast does not know bitsandbytes' products: without this their outputs would have the inputs' float32."""
    device = inputs[0].device.type
    if not torch.is_autocast_enabled(device):
        return None
    return (inputs[0].to(torch.get_autocast_dtype(device)), *inputs[1:])
