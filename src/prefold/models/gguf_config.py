"""The configuration in a GGUF file, whole: transformers 5.23 reads the sizes and leaves out what changes the numbers
beside them, such as the scaling of the rotary embedding. Each entry can go when transformers reads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.integrations.gguf.reader import read_gguf_metadata
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from prefold.errors import UserError

FREQUENCIES = "rope_freqs.weight"
"""Tensor by which llama.cpp divides the frequencies of the rotary embedding, one number for each."""

LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_CONTEXT = 8192
"""Positions before scaling. These three are the same in every Llama 3.1, 3.2 and 3.3."""

FAMILIES = ("llama", "qwen2", "qwen3")
"""Those whose configurations are completed here; the others are as transformers reads them."""


def config_of(file: Path) -> PreTrainedConfig:
    """Raises UserError if the file scales positions in a way that transformers cannot be told of."""
    config: Any = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    metadata, tensors = read_gguf_metadata(str(file))
    family = metadata["general.architecture"]
    if family not in FAMILIES:
        return config  # type: ignore[no-any-return]  # AutoConfig is untyped
    own_width = metadata.get(f"{family}.attention.key_length")
    config.head_dim = own_width or config.hidden_size // config.num_attention_heads
    if family != "qwen2":  # its biases are not for the configuration to choose
        config.attention_bias = "blk.0.attn_q.bias" in tensors
    if family == "llama":
        config.mlp_bias = "blk.0.ffn_up.bias" in tensors
    if scaling := _scaling(metadata, family, file):
        config.rope_parameters = {**scaling, "rope_theta": config.rope_parameters["rope_theta"]}
    if FREQUENCIES in tensors:
        config.rope_parameters = _llama3(config, _tensor(file, FREQUENCIES), file)
    return config  # type: ignore[no-any-return]


def _scaling(metadata: dict[str, Any], family: str, file: Path) -> dict[str, Any] | None:
    kind = metadata.get(f"{family}.rope.scaling.type")
    if kind in (None, "none"):
        return None
    if kind != "linear":
        what = f"scales positions by `{kind}`, which is not read from GGUF here"
        raise UserError(what, where=file.name, expected="the model as safetensors")
    return {"rope_type": "linear", "factor": metadata[f"{family}.rope.scaling.factor"]}


def _tensor(file: Path, name: str) -> Tensor:
    [found] = [tensor for tensor in GGUFReader(file).tensors if tensor.name == name]
    return torch.from_numpy(found.data.copy())


def _llama3(config: Any, divisors: Tensor, file: Path) -> dict[str, Any]:
    """Rope parameters whose frequencies are the default ones over `divisors`; all of Llama 3's follow from a factor."""
    before = config.rope_parameters
    wanted = {
        **LLAMA3,
        "factor": float(divisors.max()),
        "original_max_position_embeddings": LLAMA3_CONTEXT,
        "rope_theta": before["rope_theta"],
    }
    config.rope_parameters = wanted
    if not torch.allclose(rope_divisors(config), divisors, rtol=1e-4):
        what = "scales positions in a way that is not Llama 3's"
        raise UserError(what, where=file.name, expected="the model as safetensors")
    return wanted


def rope_divisors(config: Any) -> Tensor:
    """`[head_dim / 2]`: by what the frequencies of the default rotary embedding are divided in Llama 3's."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    places = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float()
    return config.rope_parameters["rope_theta"] ** -(places / config.head_dim) / scaled  # type: ignore[no-any-return]
