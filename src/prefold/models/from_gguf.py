"""A GGUF file -> the model in it, dequantised.

transformers 5.23 reads the sizes in a GGUF file and leaves out other settings that change the numbers: the scaling of
the rotary embedding, the width of heads, biases, the splitting of digits. Each addition here can go when transformers
reads it.
"""

from __future__ import annotations

import struct
import sys
from contextlib import nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.gguf.reader import read_gguf_metadata
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from prefold.errors import UserError, first_line
from prefold.files import without_home
from prefold.models.messages import quiet
from prefold.terminal import say

FREQUENCIES = "rope_freqs.weight"
"""Tensor of the divisors of the rotary embedding's frequencies in llama.cpp, one for each."""

LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_CONTEXT = 8192
"""Positions before scaling. This and the two factors are the same in every Llama 3.1, 3.2 and 3.3."""

FAMILIES = ("llama", "qwen2", "qwen3")
"""Architectures whose configurations are completed here; the others are as transformers reads them."""

DIGITS_APART = frozenset({"codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder"})
"""GGUF names of the pre-tokenizers that split off every digit before the byte-level split; transformers'
`GGUF_PRE_TOKENIZER_SPLITS` lacks them."""

DAMAGED = (ValueError, LookupError, OSError, EOFError, RuntimeError, struct.error)
"""What transformers raises for a GGUF file that is truncated or invalid."""


def convert_gguf(file: Path, folder: Path, name: str) -> None:
    """GGUF -> safetensors in float32: fewer bits would round the dequantised values."""
    say(f"converting {file.name} to safetensors, once")
    # transformers' progress bar for this cannot be switched off; it is shown in a terminal only.
    bar = nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO())
    with quiet(), bar:
        try:
            model, tokenizer = open_gguf(file, torch.float32)
        except DAMAGED as error:
            what = f"cannot be converted: {without_home(first_line(error))}"
            raise UserError(what, where=name, expected="an intact GGUF file of a causal language model") from None
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def open_gguf(file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in a GGUF file, dequantised, and its tokenizer.

    Raises:
        UserError: the file scales positions in a way that is not read here.
        One of `DAMAGED`: it is truncated or invalid.
    """
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    metadata, tensors = read_gguf_metadata(str(file))
    if metadata["general.architecture"] in FAMILIES:
        _complete(config, metadata, set(tensors), file)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        config=config,
        quantization_config=GgufConfig(dequantize=True),
        dtype=dtype,
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if metadata.get("tokenizer.ggml.pre") in DIGITS_APART:  # else two spaces before a digit get other ids
        digits = pre_tokenizers.Digits(individual_digits=True)
        level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    return model, tokenizer


def _complete(config: Any, metadata: dict[str, Any], tensors: set[str], file: Path) -> None:
    """Add what transformers leaves out to a configuration."""
    family = metadata["general.architecture"]
    own_width = metadata.get(f"{family}.attention.key_length")
    config.head_dim = own_width or config.hidden_size // config.num_attention_heads
    if family != "qwen2":  # whose configuration does not choose biases
        config.attention_bias = "blk.0.attn_q.bias" in tensors
    if family == "llama":
        config.mlp_bias = "blk.0.ffn_up.bias" in tensors
    scaling = metadata.get(f"{family}.rope.scaling.type")
    if scaling not in (None, "none", "linear"):
        what = f"scales positions by `{scaling}`, which is not read from GGUF here"
        raise UserError(what, where=file.name, expected="the model as safetensors")
    theta = config.rope_parameters["rope_theta"]
    if scaling == "linear":
        factor = metadata[f"{family}.rope.scaling.factor"]
        config.rope_parameters = {"rope_type": "linear", "factor": factor, "rope_theta": theta}
    if FREQUENCIES in tensors:
        [stored] = [tensor for tensor in GGUFReader(file).tensors if tensor.name == FREQUENCIES]
        divisors = torch.from_numpy(stored.data.copy())
        context = {"factor": float(divisors.max()), "original_max_position_embeddings": LLAMA3_CONTEXT}
        config.rope_parameters = {**LLAMA3, **context, "rope_theta": theta}
        if not torch.allclose(rope_divisors(config), divisors, rtol=1e-4):
            what = "scales positions in a way that is not Llama 3's"
            raise UserError(what, where=file.name, expected="the model as safetensors")


def rope_divisors(config: Any) -> Tensor:
    """`[head_dim / 2]`: the frequencies of the default rotary embedding divided by those of Llama 3's."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    indices = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float()
    return config.rope_parameters["rope_theta"] ** -(indices / config.head_dim) / scaled  # type: ignore[no-any-return]
