"""Base weights in 4 or 8 bits, by bitsandbytes, ready for training LoRA over them.

What peft's `prepare_model_for_kbit_training` does beyond freezing is not needed: under autocast the residual stream is
float32, and so are log-probs; non-reentrant checkpointing needs no gradients of the inputs.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from prefold.errors import UserError
from prefold.recipe import Model

PIECE = 2**18
"""Weights that are quantised at a time on a CPU: their temporary tensors fit into the caches of its cores."""
UNPACKED = {True: 0, False: 8}
"""Temporary bytes per weight while a matrix is quantised on a CPU, by whether that is to 4 bits."""
BLOCK = 64
"""Weights that share a scale in 4 bits."""
BLOCK_OF_SCALES = 256
"""Scales that share a scale of their own, with double quantisation."""


def quantisation(section: Model, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """The quantisation of the section as transformers' configuration; None if it has none. `dtype` is what `auto`
    stands for. Raises UserError if bitsandbytes is not installed."""
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


def quantised_bytes(weight: Tensor, section: Model) -> int:
    """Bytes of a quantised matrix with its scales: one for 64 weights in 4 bits, one for each row in 8."""
    if section.load_in_8bit:
        return weight.numel() + 4 * weight.shape[0]
    scales = -(-weight.numel() // BLOCK)
    if section.bnb_4bit_use_double_quant:
        return weight.numel() // 2 + scales + 4 * -(-scales // BLOCK_OF_SCALES)
    return weight.numel() // 2 + 4 * scales


@cache
def quantise_in_pieces() -> None:
    """Have bitsandbytes quantise to 4 bits piece by piece on a CPU. By default it takes 20 temporary bytes per weight
    of a matrix, 1 GB for one of a 7B model, and three times as long, for the same bits."""
    from bitsandbytes.functional import get_4bit_type

    name = "bitsandbytes::quantize_4bit"
    if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"):
        return
    whole, otherwise = torch.ops.bitsandbytes.quantize_4bit.default, torch._C.DispatchKey.CompositeExplicitAutograd

    @torch.library.register_kernel(name, "cpu")  # type: ignore[untyped-decorator]
    def quantise(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
        if A.numel() % blocksize or quant_storage != torch.uint8:
            split: tuple[Tensor, Tensor] = whole.redispatch(
                torch._C.DispatchKeySet(otherwise), A, blocksize, quant_type, quant_storage
            )
            return split
        code = get_4bit_type(quant_type, device="cpu")
        order = torch.argsort(code)
        bounds = ((code[order[:-1]] + code[order[1:]]) / 2).tolist()
        packed, scales = torch.empty(A.numel() // 2, dtype=torch.uint8), torch.empty(A.numel() // blocksize)
        pieces = (A.reshape(-1).split(PIECE), packed.split(PIECE // 2), scales.split(PIECE // blocksize))
        for weights, codes, largest in zip(*pieces, strict=True):
            blocks = weights.float().view(-1, blocksize)
            torch.amax(blocks.abs(), 1, out=largest)
            scaled = (blocks * (1.0 / largest.clamp(min=1e-38)).view(-1, 1)).clamp_(-1, 1)
            ranks = torch.zeros(scaled.shape, dtype=torch.uint8)
            for bound in bounds:
                ranks += scaled > bound
            numbers = order.to(torch.uint8)[ranks.view(-1).int()] if quant_type == "fp4" else ranks.view(-1)
            torch.bitwise_or(numbers[::2] << 4, numbers[1::2], out=codes)
        return packed.unsqueeze(1), scales


def prepare_quantised(model: PreTrainedModel) -> None:
    """Have every quantised layer compute alike in training and evaluation, cast its inputs under autocast as other
    layers do, and give its dequantised weight: `unpacked(dtype)`.

    In evaluation mode on a CPU, bitsandbytes packs 4-bit weights into a form that has no gradient, and never back
    within a run; 8-bit layers round their inputs as well. Both would make the reference, which is computed in
    evaluation mode, differ from the policy.
    """
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    for layer in model.modules():
        if isinstance(layer, Linear4bit | Linear8bitLt):
            layer.train()
            layer.train = _stay  # type: ignore[method-assign, assignment]
            unpack = _from_4_bits if isinstance(layer, Linear4bit) else _from_8_bits
            if isinstance(layer, Linear4bit):
                # Where it stays when sharding replaces the weight.
                layer.quant_state = layer.weight.quant_state  # type: ignore[attr-defined]
            vars(layer)["unpacked"] = MethodType(unpack, layer)
            layer.register_forward_pre_hook(_as_under_autocast)


def _stay(mode: bool = True) -> None:
    """Replaces the `train` of a layer that stays in training mode."""


def _from_4_bits(layer: Any, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight, layer.quant_state).to(dtype)


def _from_8_bits(layer: Any, dtype: torch.dtype) -> Tensor:
    """As in bitsandbytes' own backward pass; `state` exists once the layer has computed."""
    scales: Tensor = layer.state.SCB.unsqueeze(1)
    return layer.state.CB.to(dtype, copy=True).mul_(scales.mul(1.0 / 127.0))  # type: ignore[no-any-return]


def _as_under_autocast(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Autocast does not know bitsandbytes' products: without this their outputs would be float32, like the inputs."""
    device = inputs[0].device.type
    if not torch.is_autocast_enabled(device):
        return None
    return (inputs[0].to(torch.get_autocast_dtype(device)), *inputs[1:])
