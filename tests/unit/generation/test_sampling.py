"""Drawing tokens: the truncations of transformers, the right frequencies, one stream for each completion."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from prefold.generation import sequences
from prefold.generation.sampling import Sampling
from prefold.generation.sequences import choose, draw, penalised, stream_of, truncated


def random_logits(rows: int = 16, size: int = 5000, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(rows, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spread", [0.1, 3.0, 10.0], ids=["flat", "middling", "peaked"])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_is_transformers(top_p: float, spread: float) -> None:
    scores = random_logits(spread=spread).double()  # in float32 the tokens at the edge are decided by rounding
    wanted = TopPLogitsWarper(top_p)(torch.empty(0), scores)
    assert torch.equal(truncated(scores, 0, top_p, 0.0), wanted)


@pytest.mark.parametrize("min_p", [0.001, 0.05, 0.5])
def test_min_p_is_transformers(min_p: float) -> None:
    scores = random_logits()
    assert torch.equal(truncated(scores, 0, 1.0, min_p), MinPLogitsWarper(min_p)(torch.empty(0), scores))


def test_all_truncations_together_are_transformers() -> None:
    scores = random_logits()
    wanted = scores
    for warp in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(50), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)):
        wanted = warp(torch.empty(0), wanted)
    assert torch.equal(truncated(scores / 0.7, 50, 0.9, 0.02), wanted)
    assert torch.equal(truncated(scores, 9999, 1.0, 0.0), scores)


def test_the_repetition_penalty_is_transformers() -> None:
    scores, ids = random_logits(), torch.randint(0, 5000, (16, 300), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, ids, True)
    assert torch.equal(penalised(scores, seen, 1.3), RepetitionPenaltyLogitsProcessor(1.3)(ids, scores))


@pytest.mark.parametrize("size", [5, sequences.BLOCK, 3 * sequences.BLOCK + 7])
def test_tokens_are_drawn_as_often_as_they_should_be(size: int) -> None:
    logits = random_logits(1, size, 2.0)
    count = 40_000
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens, logprobs = draw(logits.expand(count, -1), grid)
    wanted = logits[0].double().softmax(-1)
    found = torch.bincount(tokens, minlength=size) / count
    # Evenly spread numbers meet each token's share to one in `count`.
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2 / count)
    torch.testing.assert_close(logprobs, wanted.log().float()[tokens], rtol=0, atol=1e-5)


def test_what_is_cut_off_is_never_drawn() -> None:
    logits = torch.full((4, 600), float("-inf"))
    logits[:, [3, 300]] = 0.0
    edges = torch.tensor([0.0, 0.4999999, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, edges)[0].tolist() == [3, 3, 300, 300]


def test_a_greedy_choice_is_the_likeliest() -> None:
    logits = random_logits().bfloat16()
    chosen = choose(logits, Sampling(temperature=0.0, with_model_logprobs=True), torch.rand(16).double())
    assert torch.equal(chosen.tokens, logits.argmax(-1))
    assert chosen.logprobs.tolist() == [0.0] * 16
    assert chosen.model_logprobs is not None
    torch.testing.assert_close(chosen.model_logprobs, logits.float().log_softmax(-1).amax(-1))


def test_each_completion_has_its_own_numbers() -> None:
    streams = {tuple(stream_of(*of, 5)) for of in ((1, 2, 3), (1, 3, 2), (2, 1, 3), (0, 0, 0))}
    assert len(streams) == 4
    assert stream_of(1, 2, 3, 9)[:5] == stream_of(1, 2, 3, 5)


def test_entropies_are_those_before_the_truncations() -> None:
    logits, drawn = random_logits(), torch.full((16,), 0.5, dtype=torch.float64)
    found = choose(logits, Sampling(temperature=0.7, top_k=5, top_p=0.5, min_p=0.1, with_entropies=True), drawn)
    wanted = torch.distributions.Categorical(logits=logits.double() / 0.7).entropy()
    torch.testing.assert_close(found.entropies, wanted.float(), rtol=1e-5, atol=1e-5)
    greedy = choose(logits, Sampling(with_entropies=True), drawn).entropies
    assert greedy is not None and greedy.tolist() == [0.0] * 16
    assert choose(logits, Sampling(temperature=1.0), drawn).entropies is None
