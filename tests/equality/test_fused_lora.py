"""The fused LoRA layer gives PEFT's values and gradients, and leaves alone what it cannot do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import family
from peft import LoraConfig, get_peft_model
from tiny import gradients, with_lora
from torch import nn

from prefold.trees.fused_layers import fuse_lora


def outcome(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logits = model(input_ids=torch.arange(3, 24).view(3, 7)).logits
    (logits * torch.linspace(-1, 2, logits.numel()).view(logits.shape)).sum().backward()
    return logits.detach(), gradients(model)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt_neox", "gemma3_text"])  # without and with biases
def test_equal_to_peft(name: str) -> None:
    model = with_lora(family(name, torch.float64), lora_alpha=7)
    fused = copy.deepcopy(model)
    assert fuse_lora(fused) == sum(key.endswith("lora_A.default.weight") for key in model.state_dict()) > 0
    wanted, found = outcome(model), outcome(fused)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-6, atol=1e-6)  # the family's norms are float32
    assert found[1].keys() == wanted[1].keys()
    for key, gradient in wanted[1].items():
        assert (found[1][key] - gradient).norm() <= 1e-6 * gradient.norm(), key
    with model.disable_adapter(), fused.disable_adapter():
        torch.testing.assert_close(outcome_without(fused), outcome_without(model), rtol=0, atol=0)


def outcome_without(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.arange(3, 24).view(3, 7)).logits
    return logits


def test_autocast() -> None:
    """In bfloat16 over float32 weights, the distance to float32 is no larger than PEFT's, over several draws."""
    theirs = ours = 0.0
    for seed in range(8):
        model = with_lora(family("llama"))
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        fused = copy.deepcopy(model)
        fuse_lora(fused)
        exact = outcome_without(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            theirs += float((outcome_without(model) - exact).norm())
            ours += float((outcome_without(fused) - exact).norm())
    assert ours <= 1.05 * theirs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {gradient.dtype for gradient in outcome(fused)[1].values()} == {torch.float32}


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}])
def test_others_keep_pefts(settings: dict[str, Any]) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    assert fuse_lora(get_peft_model(family("llama"), config)) == 0


def test_second_adapter_takes_pefts_path() -> None:
    model = get_peft_model(family("llama"), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    fuse_lora(model)
    with_first = outcome_without(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.set_adapter("second")
    assert not torch.allclose(outcome_without(model), with_first)
    model.set_adapter("default")
    torch.testing.assert_close(outcome_without(model), with_first)
