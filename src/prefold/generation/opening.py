"""Whole models that are asked something: what each takes, in which dtype its weights are kept, and loading it.

On a CPU a model is measured in float32. Where that does not fit, its weights stay in the 16 bits of its files, mapped
from them, and each module is widened for its call: what is computed is the same, it takes longer. Weights that lie in
float32 are rounded to bfloat16.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from prefold import memory
from prefold.files import without_home
from prefold.generation.engine import CACHE_BYTES, PREFILL_TOKENS
from prefold.launch import launched_here
from prefold.memory import gigabytes
from prefold.models.adapters import load_start
from prefold.models.device import choose_device, choose_dtype, is_half
from prefold.models.fetch import fetch, weight_files
from prefold.models.load import read_config
from prefold.plan.machine import Machine
from prefold.recipe import Model
from prefold.terminal import say
from prefold.trees.attention import heads_of
from prefold.trees.memory import token_bytes
from prefold.trees.self_check import compute_in_float32

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""As safetensors files name them."""
WORKING = 400 * 10**6
"""What libraries and the head take on top, roughly."""
ADVICE = "take a machine with more memory or a smaller model, or end other programs"


class Stored(NamedTuple):
    """Weights as they lie in files: how many numbers, those of the largest tensor, and what most are stored in."""

    numbers: int
    largest: int
    dtype: torch.dtype


def stored_weights(folder: Path) -> Stored:
    """By the heads of the files, without reading a weight."""
    sizes: Counter[str] = Counter()
    largest = 0
    for file in weight_files(folder):
        with file.open("rb") as opened:
            head = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        for name, entry in head.items():
            if name != "__metadata__":
                count = math.prod(entry["shape"])
                sizes[entry["dtype"]] += count
                largest = max(largest, count)
    most = sizes.most_common(1)[0][0] if sizes else "F32"
    return Stored(sum(sizes.values()), largest, DTYPES.get(most, torch.float32))


class Kept(NamedTuple):
    """How a model is kept while it is asked: the dtype, whether each module is widened to float32 for its call, and the
    bytes that all of it takes; `reason` says why it is not kept otherwise."""

    dtype: torch.dtype
    widened: bool
    needed: int
    reason: str = ""


def how_to_keep(
    section: Model, machine: Machine, *, measured: bool = False, tokens: int = 0, in_16_bits: bool | None = None
) -> Kept:
    """Of the ways in which a model can be kept the first one that fits; else the smallest.

    Args:
        measured: to be compared, so in float32 on a CPU; else as the section says.
        tokens: of prompts and answers that are kept at a time.
        in_16_bits: what was decided for another model that this one is compared with.

    Raises:
        UserError: the model cannot be had.
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
    """Activations of a layer for a row of tokens, and the keys and values of those that are kept."""
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
    """Load a model that is to be asked, the one after the other where there are several.

    Args:
        where: who asks, for the message: a command or a stage.
        measured, tokens, in_16_bits: see `how_to_keep`.
        load: loads a section in a dtype.

    Raises:
        UserError: it needs more memory than is at hand.
    """
    machine = Machine.here(choose_device().type)
    kept = how_to_keep(section, machine, measured=measured, tokens=tokens, in_16_bits=in_16_bits)
    shown = without_home(section.name)
    # Of several processes each takes from what the others see; their stage has asked for all of them.
    if section.device_map is None and launched_here() == 1:
        memory.require(f"{where}, {shown}", kept.needed, machine.memory, ADVICE)
    dtype = str(kept.dtype).removeprefix("torch.")
    model = load(section, dtype=dtype)
    if kept.widened:
        say(f"  {shown}: weights in {dtype}, each module widened for its call ({kept.reason})")
        compute_in_float32(model)
    return model


def fits_in_float32(sections: Sequence[Model], tokens: int = 0) -> bool:
    """Whether each of several models that are compared does; else all are kept in 16 bits."""
    machine = Machine.here(choose_device().type)
    kept = (how_to_keep(section, machine, measured=True, tokens=tokens) for section in sections)
    return not any(each.widened for each in kept)
