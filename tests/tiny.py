"""Tiny random models and trees for tests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from prefold.trees.packing import TokenTree

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
}


def tiny_llama(dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes})).to(dtype)


def with_lora(model: PreTrainedModel, **settings: Any) -> nn.Module:
    """Random LoRA weights on every linear layer, none of them zero."""
    torch.manual_seed(1)
    settings = {"task_type": "CAUSAL_LM", **settings}
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **settings)
    return get_peft_model(model, config, autocast_adapter_dtype=False).to(model.dtype)


def random_trees(count: int, seed: int = 0, completions: Sequence[int] = (1, 2, 4)) -> list[TokenTree]:
    draw = random.Random(seed)

    def ids(longest: int) -> tuple[int, ...]:
        return tuple(draw.randrange(VOCABULARY) for _ in range(draw.randint(1, longest)))

    return [TokenTree(ids(12), tuple(ids(9) for _ in range(draw.choice(completions)))) for _ in range(count)]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
