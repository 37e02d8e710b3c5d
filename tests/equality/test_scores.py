"""Scores of conversations, packed and plain, against transformers' own classifier with dense attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense import assert_same, exactly, outcome
from families import FAMILIES, checkpointed, family
from tiny import random_trees, with_lora
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from prefold.trees import logprobs
from prefold.trees.attention import unwrapped, using_attention
from prefold.trees.packing import TokenTree
from prefold.trees.scorer import Scorer, choose_scorer

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
WITHOUT_CLASSIFIER = {"granite", "cohere2"}
SCORED = [name for name in FAMILIES if name not in WITHOUT_CLASSIFIER]


def classifier(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    return family(name, dtype, AutoModelForSequenceClassification, num_labels=1, **changes)


def dense_scores(model: nn.Module, trees: list[TokenTree]) -> Tensor:
    """One conversation at a time: the definition."""
    model.config.pad_token_id = None  # transformers then reads the last token
    with using_attention(unwrapped(model), "dense_for_tests"):
        rows = [torch.tensor([tree.prompt + ids]) for tree in trees for ids in tree.completions]
        return torch.cat([model(input_ids=row, use_cache=False).logits[0] for row in rows])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SCORED)
def test_scores_and_gradients_with_lora(name: str, dtype: torch.dtype) -> None:
    with exactly(dtype):
        model = with_lora(classifier(name, dtype), task_type="SEQ_CLS")
        trees = random_trees(6)
        wanted = outcome(model, lambda: dense_scores(model, trees))
        assert any(".score." in name for name in wanted[1])
        model.config.pad_token_id = 0
        scorer = choose_scorer(model, trees, 64)
        assert scorer.packed, scorer.reason
        found = scorer.score(trees)
        assert found.sums().tolist() == found.means().tolist() == found.tokens.tolist()
        assert_same(outcome(model, lambda: scorer.score(trees).tokens), wanted, TOLERANCE[dtype])
        if name != "gemma2" or dtype == torch.float32:
            plain = Scorer(model, 64, None)
            assert_same(outcome(model, lambda: plain.score(trees).tokens), wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_full_gradients(name: str) -> None:
    with exactly(torch.float64):
        model = classifier(name, torch.float64)
        trees = random_trees(6)
        wanted = outcome(model, lambda: dense_scores(model, trees))
        for backend in ("prefold_joined", "prefold_segments"):
            assert_same(outcome(model, lambda b=backend: Scorer(model, 64, b).score(trees).tokens), wanted, 1e-10)


def test_gradient_checkpointing() -> None:
    model = with_lora(classifier("llama"), task_type="SEQ_CLS")
    trees = random_trees(4, seed=2)
    wanted = outcome(model, lambda: dense_scores(model, trees))
    scorer = Scorer(checkpointed(model), 64, "prefold_joined")
    with scorer.in_place():
        assert_same(outcome(model, lambda: scorer.score(trees).tokens), wanted, TOLERANCE[torch.float32])


def test_only_last_tokens_meet_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model, met = classifier("llama"), []
    linear = torch.nn.functional.linear

    def counted(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        met.append(len(states))
        return linear(states, weight, bias)

    monkeypatch.setattr("prefold.trees.logprobs.linear", counted)
    trees = random_trees(3)
    Scorer(model, 64, "prefold_joined").score(trees)
    assert met == [sum(len(tree.completions) for tree in trees)]
    assert "forward" not in vars(model.score)


def test_scores_under_autocast_are_float32() -> None:
    model = with_lora(classifier("llama", torch.bfloat16), task_type="SEQ_CLS")
    for attention in ("prefold_joined", None):
        with torch.autocast("cpu", torch.bfloat16):
            found = Scorer(model, 64, attention).score(random_trees(3)).tokens
        assert found.dtype == torch.float32


def test_a_difference_is_found_by_the_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = logprobs.packed_scores

    def off(model: nn.Module, row: Any) -> Any:
        found = packed(model, row)
        found.tokens[0] += 0.01
        return found

    monkeypatch.setattr(logprobs, "packed_scores", off)
    scorer = choose_scorer(classifier("llama"), random_trees(3), 64)
    assert not scorer.packed and "packed scores differ from plain ones by 0.01" in scorer.reason
