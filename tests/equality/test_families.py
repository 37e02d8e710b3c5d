"""Every family, packed and plain, gives the log-probs and LoRA gradients of dense attention, written out."""

from __future__ import annotations

import pytest
import torch
from dense import assert_same, dense_logprobs, exactly, outcome
from families import FAMILIES, checkpointed, family
from tiny import random_trees, with_lora

from prefold.trees.scorer import Scorer, choose_scorer

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_and_lora_gradients(name: str, dtype: torch.dtype) -> None:
    with exactly(dtype):
        model = with_lora(family(name, dtype))
        trees = random_trees(6)
        wanted = outcome(model, lambda: dense_logprobs(model, trees))
        scorer = choose_scorer(model, trees, 64)
        assert scorer.packed, scorer.reason
        assert_same(outcome(model, lambda: scorer.score(trees).tokens), wanted, TOLERANCE[dtype])
        if name != "gemma2" or dtype == torch.float32:
            plain = Scorer(model, 64, None)
            assert_same(outcome(model, lambda: plain.score(trees).tokens), wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing(name: str) -> None:
    model = with_lora(family(name))
    trees = random_trees(4, seed=2)
    wanted = outcome(model, lambda: dense_logprobs(model, trees))
    scorer = Scorer(checkpointed(model), 64, "prefold_joined")
    with scorer.in_place():
        assert_same(outcome(model, lambda: scorer.score(trees).tokens), wanted, TOLERANCE[torch.float32])
