"""A tiny random model of each family that people align, and the dense attention that they are held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prefold.models.load import without_dropout
from prefold.trees.attention import CHECKPOINTING, unwrapped

VOCABULARY = 97
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 6
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {
        "head_dim": 8,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 8,
        "layer_types": ALTERNATING,
        "final_logit_softcapping": 3.0,
    },
    "phi": {},
    "phi3": {"sliding_window": WINDOW},
    "gpt_neox": {},
    "gpt2": {"n_positions": 256, "n_embd": 32, "n_layer": 3, "n_head": 4},
    "smollm3": {"no_rope_layers": [1, 1, 0]},
    "olmo2": {},
    "granite": {
        "logits_scaling": 1.7,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.6,
        "embedding_multiplier": 2.0,
    },
    "cohere2": {"logit_scale": 0.4, "sliding_window": WINDOW, "layer_types": ALTERNATING},
    "glm4": {"head_dim": 8},
    "starcoder2": {"sliding_window": WINDOW},
}
"""By name, which is the family's `model_type` unless the settings say otherwise: what differs from `SHAPE`."""


def family(
    name: str, dtype: torch.dtype = torch.float32, kind: Any = AutoModelForCausalLM, **changes: Any
) -> PreTrainedModel:
    settings = {"model_type": name, **FAMILIES.get(name, {}), **changes}
    shape = {
        k: v for k, v in SHAPE.items() if settings["model_type"] != "gpt2" or k.endswith(("_id", "_size", "_range"))
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(settings.pop("model_type"), **{**shape, **settings})
    config._attn_implementation = "eager" if name in ("gemma2", "mamba") else "sdpa"
    model = kind.from_config(config)
    for parameter in model.parameters():  # biases and norms start at 0 and 1, which hides mistakes
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    without_dropout(model)
    return model.to(dtype).eval()


def checkpointed(model: Any) -> Any:
    """The model in training mode, under whichever name its transformers has for checkpointing."""
    getattr(unwrapped(model), f"{CHECKPOINTING}_enable")({"use_reentrant": False})
    return model.train()


class StayDouble(TorchFunctionMode):
    """Keeps float64 where a model would drop to float32 for its norms, softmaxes and rotary angles."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        double = bool(args) and isinstance(args[0], Tensor) and args[0].dtype == torch.float64
        if double and func is Tensor.float:
            return args[0]
        if double and func is Tensor.to:
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        if double and kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        if double and func.__name__ in ("matmul", "__matmul__"):  # transformers 5.18: with positions in float32
            args = (args[0], args[1].double())
        return func(*args, **kwargs)


def dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Softmax over every position up to oneself, written out."""
    assert attention_mask is None
    group = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(group, dim=1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    place = torch.arange(query.shape[2])
    distance = place[:, None] - place[None]
    hidden = (distance < 0) if sliding_window is None else (distance < 0) | (distance >= sliding_window)
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register("dense_for_tests", dense_attention)

MakeModel = Callable[..., PreTrainedModel]
