"""A model whose layers are on several devices trains packed, with the numbers of one device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dense import assert_same, outcome
from emulated_devices import emulated, put
from families import family
from tiny import random_trees, with_lora
from torch import nn
from transformers import AutoModelForSequenceClassification

from prefold.generation import engine
from prefold.generation.engine import LocalEngine, cache_tokens
from prefold.generation.sampling import Sampling
from prefold.trees.attention import unwrapped
from prefold.trees.fused_layers import fuse_lora, fuse_trained_rows
from prefold.trees.scorer import Scorer, choose_scorer

TOKENIZER: Any = SimpleNamespace(eos_token_id=2, decode=lambda ids, **how: " ".join(map(str, ids)))
TREES = random_trees(3)
LATER = dict.fromkeys(("model.layers.1", "model.layers.2", "model.norm"), "cuda:1")


def policy(name: str, **settings: Any) -> nn.Module:
    model = with_lora(family(name), **settings)
    assert fuse_lora(model)
    fuse_trained_rows(model)
    for weight in model.parameters():  # of rows, which start as those that they stand for
        weight.data += 0.01 * weight.requires_grad
    return model


ROWS = {"trainable_token_indices": {"embed_tokens": [5, 40], "lm_head": [5, 40]}}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "cuda:1", {}),
    ("llama", "cuda:0", ROWS),
    ("llama-tied", "cuda:0", {}),
    ("mistral", "cuda:1", {}),
    ("gemma2", "cuda:0", {}),
]


@pytest.mark.parametrize(("name", "head", "lora"), CASES)
@pytest.mark.parametrize("attention", ["prefold_segments", None])
def test_log_probs_and_gradients(name: str, head: str, lora: dict[str, Any], attention: str | None) -> None:
    whole, parts = policy(name, **lora), policy(name, **lora)
    wanted = outcome(whole, lambda: Scorer(whole, 4096, "prefold_segments").score(TREES).tokens)
    with emulated():
        put(unwrapped(parts), {"": "cuda:0", **LATER, "lm_head": head})
        scorer = Scorer(parts, 4096, attention)
        with scorer.in_place():
            found = outcome(parts, lambda: on_the_first(scorer))
    assert_same(found, wanted, 1e-5)


def on_the_first(scorer: Scorer) -> torch.Tensor:
    scored = scorer.score(TREES, statistics=True)
    assert scored.statistics is not None
    for tensor in (scored.tokens, scored.statistics.entropy, scored.completion, scored.sums()):
        assert tensor.device == torch.device("cuda:0")
    return scored.tokens.cpu()


def test_the_self_check_passes() -> None:
    """On devices that have one kind of attention; packing is what it decides on, not which."""
    model, later = family("llama"), dict.fromkeys(LATER, "mps:1")
    with emulated():
        put(model, {"": "mps:0", **later, "lm_head": "mps:1"})
        assert choose_scorer(model, TREES, 4096).packed


def test_completions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the shared prompts, without falling back, and with the free memory of the fullest device counted twice."""
    whole, parts, free = family("llama"), family("llama"), {"cuda:0": 10**6, "cuda:1": 10**5}
    prompts, how = [[5, 6, 7, 8], [9, 10, 11]], Sampling(6, 2, temperature=1.0, end_tokens=())
    wanted = texts(LocalEngine(whole, TOKENIZER).sample(prompts, how))
    monkeypatch.setattr(engine, "generate_plainly", None)
    monkeypatch.setattr(engine, "free_on", lambda device: free[str(device)])
    with emulated():
        put(parts, {"": "cuda:0", **LATER, "lm_head": "cuda:1"})
        assert texts(LocalEngine(parts, TOKENIZER).sample(prompts, how)) == wanted
        assert cache_tokens(parts) == 2 * 10**5 // 2 // (3 * 2 * 2 * 8 * 4)


def texts(groups: Any) -> list[str]:
    return [completion.text for group in groups for completion in group]


def test_a_reward_model() -> None:
    whole, parts = (family("llama", kind=AutoModelForSequenceClassification, num_labels=1) for _ in range(2))
    wanted = Scorer(whole, 4096, "prefold_segments").score(TREES).tokens
    with emulated():
        put(parts, {"": "cuda:0", **LATER, "score": "cuda:1"})
        for attention in ("prefold_segments", None):
            scores = Scorer(parts, 4096, attention).score(TREES)
            torch.testing.assert_close(torch.Tensor(scores.tokens.cpu()), wanted, rtol=1e-5, atol=1e-5)
            scores.sums()
