"""Loading whole models for inference: the memory that each takes, and the dtype of its weights.

On a CPU a model is measured in float32. If that does not fit, its weights stay in the 16 bits of its files, mapped from
them, and each module is cast for its call: it computes the same, but takes longer. Weights stored in float32 are
rounded to bfloat16.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from prefold import memory
from prefold.device import choose_device, choose_dtype, is_half
from prefold.files import without_home
from prefold.generation.engine import CACHE_BYTES, PREFILL_TOKENS
from prefold.launch import launched_here
from prefold.memory import gigabytes
from prefold.models.adapters import load_start
from prefold.models.fetch import fetch, weight_files
from prefold.models.gate import stored_tensors
from prefold.models.load import read_config
from prefold.plan.machine import Machine
from prefold.recipe import Model
from prefold.terminal import say
from prefold.trees.attention import heads_of
from prefold.trees.memory import token_bytes
from prefold.trees.self_check import compute_in_float32

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""By the names in safetensors files."""
WORKING = 400 * 10**6
"""Bytes for libraries and the head, roughly."""
ADVICE = "take a machine with more memory or a smaller model, or end other programs"


class Stored(NamedTuple):
    """Weights as stored in files: how many numbers, how many in the largest tensor, and the dtype of most."""

    numbers: int
    largest: int
    dtype: torch.dtype


def stored_weights(folder: Path) -> Stored:
    """From the headers of the files, without reading a weight."""
    sizes: Counter[str] = Counter()
    largest = 0
    for file in weight_files(folder):
        for facts in stored_tensors(file, str(folder)).values():
            count = math.prod(facts["shape"])
            sizes[facts["dtype"]] += count
            largest = max(largest, count)
    most = sizes.most_common(1)[0][0] if sizes else "F32"
    return Stored(sum(sizes.values()), largest, DTYPES.get(most, torch.float32))


class Kept(NamedTuple):
    """How a model is kept in memory: the dtype, whether each module is cast to float32 for its call, and the bytes that
    it takes in all; `reason` says why its modules are cast."""

    dtype: torch.dtype
    widened: bool
    needed: int
    reason: str = ""


def how_to_keep(
    section: Model, machine: Machine, *, measured: bool = False, tokens: int = 0, in_16_bits: bool | None = None
) -> Kept:
    """The first way of keeping a model that fits into memory; else the smallest.

    Args:
        measured: to be compared, so in float32 on a CPU; else as the section says.
        tokens: of prompts and answers that are kept at a time.
        in_16_bits: what was decided for another model that this one is compared with.

    Raises:
        UserError: the model cannot be fetched.
    """
    folder = fetch(section.name, section.revision)
    stored, config = stored_weights(folder), read_config(section, folder).get_text_config()
    wanted = torch.float32 if measured and machine.device == "cpu" else choose_dtype(section.dtype, choose_device())
    working = WORKING + _working(config, machine.device, tokens)

    def kept(dtype: torch.dtype, widened: bool) -> Kept:
        wide = 4 * stored.largest if widened else 0
        return Kept(dtype, widened, machine.process + stored.numbers * dtype.itemsize + wide + working)

    whole = kept(wanted, False)
    narrow = kept(stored.dtype if is_half(stored.dtype) else torch.bfloat16, True)
    fits = whole.needed <= machine.memory or narrow.needed >= whole.needed
    if machine.device != "cpu" or wanted != torch.float32 or not (in_16_bits or (in_16_bits is None and not fits)):
        return whole
    if fits:
        return narrow._replace(reason="as what it is compared with")
    return narrow._replace(reason=f"float32 needs {gigabytes(whole.needed)}, {gigabytes(machine.memory)} are at hand")


def _working(config: Any, device: str, tokens: int) -> int:
    """Bytes of a layer's activations for a row of tokens, and of the keys and values that are kept."""
    layers, (_, keys, width) = config.num_hidden_layers, heads_of(config)
    cache = min(2 * 4 * layers * keys * width * tokens, CACHE_BYTES)
    return int(2 * token_bytes(config, False) // layers * PREFILL_TOKENS.get(device, 1024) + cache)


def open_model(
    section: Model,
    where: str,
    *,
    measured: bool = False,
    tokens: int = 0,
    in_16_bits: bool | None = None,
    load: Callable[..., PreTrainedModel] = load_start,
) -> PreTrainedModel:
    """Load a model for inference. Several are to be loaded one after the other.

    Args:
        where: the command or stage that loads it, for the message.
        measured, tokens, in_16_bits: see `how_to_keep`.
        load: loads a section in a dtype.

    Raises:
        UserError: it needs more memory than is available.
    """
    machine = Machine.here(choose_device().type)
    kept = how_to_keep(section, machine, measured=measured, tokens=tokens, in_16_bits=in_16_bits)
    shown = without_home(section.name)
    # Several processes take from the same memory; their stage has checked it for all of them.
    if section.device_map is None and launched_here() == 1:
        memory.require(f"{where}, {shown}", kept.needed, machine.memory, ADVICE)
    dtype = str(kept.dtype).removeprefix("torch.")
    model = load(section, dtype=dtype)
    if kept.widened:
        say(f"  {shown}: weights in {dtype}, each module widened for its call ({kept.reason})")
        compute_in_float32(model)
    return model


def fits_in_float32(sections: Sequence[Model], tokens: int = 0) -> bool:
    """Whether each of several models to be compared fits in float32; else all are kept in 16 bits."""
    machine = Machine.here(choose_device().type)
    return not any(how_to_keep(section, machine, measured=True, tokens=tokens).widened for section in sections)
