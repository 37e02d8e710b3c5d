"""Single trained rows and whole trained modules give PEFT's values and gradients, packed and plain."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from dense import outcome
from families import family
from peft import LoraConfig, get_peft_model
from tiny import gradients, random_trees
from torch import nn

from prefold.trees.fused_layers import fuse_trained_rows
from prefold.trees.packing import pack
from prefold.trees.scorer import Scorer, reference_model
from prefold.trees.self_check import packing_fault

IDS = [3, 40, 96]


def with_rows(name: str, dtype: torch.dtype = torch.float64, **settings: Any) -> nn.Module:
    """Random LoRA weights, and trained rows of the embeddings and the head that are not the frozen ones."""
    model = family(name, dtype)
    names = [key for key, module in model.named_modules() if module in (model.get_input_embeddings(), model.lm_head)]
    torch.manual_seed(1)
    config = LoraConfig(
        r=4,
        target_modules="all-linear",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        trainable_token_indices=dict.fromkeys(names, IDS),
        **settings,
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False).to(dtype)
    for key, parameter in adapted.named_parameters():
        if "tokens_delta" in key:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return adapted


def logits_and_gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    ids = torch.tensor([[5, 3, 3, 40, 7, 96, 1], [40, 2, 3, 8, 9, 10, 96]])
    logits = model(input_ids=ids).logits
    (logits * torch.linspace(-1, 2, logits.numel()).view(logits.shape)).sum().backward()
    return logits.detach(), gradients(model)


def same(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-6, atol=1e-6)  # the families' norms are float32
    assert found[1].keys() == wanted[1].keys() and any("tokens_delta" in key for key in wanted[1])
    for key, gradient in wanted[1].items():
        assert (found[1][key] - gradient).norm() <= 1e-6 * gradient.norm(), key


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral", "gemma3_text"])
def test_fused_rows_are_pefts(name: str) -> None:
    model = with_rows(name)
    fused = copy.deepcopy(model)
    assert fuse_trained_rows(fused) == 2
    same(logits_and_gradients(fused), logits_and_gradients(model))
    with model.disable_adapter(), fused.disable_adapter(), torch.no_grad():
        ids = torch.tensor([IDS])
        assert torch.equal(fused(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_head_with_a_bias_keeps_it() -> None:
    """PEFT's own forward pass leaves it out."""
    model = with_rows("phi")
    fuse_trained_rows(model)
    ids = torch.tensor([[5, 3, 40]])
    with torch.no_grad():
        found = model(input_ids=ids).logits
        merged = model.merge_and_unload()  # type: ignore[operator]
        torch.testing.assert_close(found, merged(input_ids=ids).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral", "phi", "gemma3_text", "cohere2", "granite"])
def test_packed_is_plain_with_trained_rows(name: str) -> None:
    model = with_rows(name)
    fuse_trained_rows(model)
    trees = random_trees(6, seed=2)
    wanted = outcome(model, lambda: Scorer(model, 4096, None).score(trees).tokens)
    scorer = Scorer(model, 4096, "prefold_segments")
    with scorer.in_place():
        found = outcome(model, lambda: scorer.score(trees).tokens)
    same(found, wanted)


def failed_self_check(model: nn.Module, backend: str) -> str | None:
    trees, plain = random_trees(3), Scorer(model, 4096, None)
    with reference_model(model):
        return packing_fault(model, pack(trees), backend, lambda: plain.score(trees).tokens)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_self_check_in_half_precision(name: str, dtype: torch.dtype) -> None:
    model = with_rows(name, dtype)
    fuse_trained_rows(model)
    assert failed_self_check(model, "prefold_segments") is None


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("llama-tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        ("mistral", {"use_dora": True}),
        ("llama", {"use_rslora": True}),
    ],
)
def test_packed_is_plain_with_other_kinds(name: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(family(name, torch.float64), config, autocast_adapter_dtype=False).to(torch.float64)
    assert failed_self_check(model, "prefold_joined") is None
    trees = random_trees(6, seed=2)
    wanted = outcome(model, lambda: Scorer(model, 4096, None).score(trees).tokens)
    scorer = Scorer(model, 4096, "prefold_joined")
    with scorer.in_place():
        found = outcome(model, lambda: scorer.score(trees).tokens)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-6, atol=1e-6)
    assert found[1].keys() == wanted[1].keys()
    for key, gradient in wanted[1].items():
        assert (found[1][key] - gradient).norm() <= 1e-6 * gradient.norm(), key
