"""What speaks for and against completions of a server, on distributions that are known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import tiny_llama
from tiny_tokenizer import CHATML, make_tokenizer

from prefold.generation.agreement import Positions, difference, positions_of, why_not_as_told
from prefold.generation.engine import LocalEngine
from prefold.generation.sampling import Completion, Sampling
from prefold.trees.packing import TokenTree
from prefold.trees.scorer import Scorer, choose_scorer

PROMPT = (5, 17, 40, 3, 77)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(CHATML)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return tiny_llama(vocab_size=len(tokenizer)).eval()


@pytest.fixture(params=["trees", "plain"])
def scorer(model: Any, request: pytest.FixtureRequest) -> Scorer:
    trees = [TokenTree(PROMPT, ((1, 2), (3, 4, 5)))]
    chosen = choose_scorer(model, trees, 4096)
    assert chosen.packed
    return chosen if request.param == "trees" else replace(chosen, attention=None)


def drawn(model: Any, tokenizer: Any, sampling: Sampling, seed: int = 1) -> list[Completion]:
    with torch.no_grad():
        return LocalEngine(model, tokenizer).sample([PROMPT], replace(sampling, seed=0), [seed])[0]


HOW = [
    Sampling(24, 8, temperature=1.0, end_tokens=()),
    Sampling(24, 8, temperature=0.6, end_tokens=()),
    Sampling(24, 8, temperature=1.3, top_p=0.8, end_tokens=()),
    Sampling(24, 8, temperature=1.0, top_k=10, top_p=0.9, end_tokens=()),
    Sampling(24, 8, temperature=1.0, min_p=0.1, end_tokens=()),
    Sampling(24, 8, temperature=1.0, top_k=1, end_tokens=()),
]


@pytest.mark.parametrize("sampling", HOW, ids=str)
def test_what_the_own_engine_draws_is_in_agreement(scorer: Scorer, model: Any, tokenizer: Any, sampling: Any) -> None:
    group = drawn(model, tokenizer, sampling)
    positions = positions_of(scorer, [(PROMPT, group)], sampling)
    assert len(positions.logprobs) == 8 * 24
    assert difference(positions, sampling) < 1e-5
    assert why_not_as_told(positions, sampling) is None
    assert not positions.outside.any()


@pytest.mark.parametrize("told", HOW, ids=str)
@pytest.mark.parametrize("done", HOW[:5], ids=str)
def test_what_is_drawn_otherwise_is_not(scorer: Scorer, model: Any, tokenizer: Any, told: Any, done: Any) -> None:
    """By the log-probs where they are those of what was drawn from. By the tokens alone, where they are as they should
    be, as far as 192 tokens show it: `min_p: 0.1` makes likely tokens about as likely as a temperature of 0.6."""
    if told is done:
        return
    group = drawn(model, tokenizer, done)
    positions = positions_of(scorer, [(PROMPT, group)], told)
    assert difference(positions, told) > 0.01
    plainly = told.top_k == 1 or (0.6 in (done.temperature, told.temperature) and done.min_p == 0)
    assert not plainly or why_not_as_told(positions, told) is not None


def test_positions_by_hand(scorer: Scorer, model: Any) -> None:
    """Against the whole distribution of a plain pass, cut off at the three likeliest tokens."""
    ids = [*PROMPT, 7]
    logits = model(torch.tensor([ids])).logits[0, len(PROMPT) - 1].double() / 0.5
    likeliest = logits.log_softmax(-1).topk(3)
    token = int(likeliest.indices[1])
    sampling = Sampling(1, 1, temperature=0.5, top_k=3)
    positions = positions_of(scorer, [(PROMPT, [Completion((token,), "", False, (0.0,))])], sampling)
    kept = likeliest.values.exp()
    share = kept / kept.sum()
    assert positions.logprobs.item() == pytest.approx(likeliest.values[1].item(), abs=1e-5)
    assert positions.kept.item() == pytest.approx(math.log(kept.sum()), abs=1e-5)
    assert positions.plain.item() == pytest.approx((logits * 0.5).log_softmax(-1)[token].item(), abs=1e-5)
    mean = (share * share.log()).sum()
    assert positions.luck.item() == pytest.approx((share[1].log() - mean).item(), abs=1e-5)
    assert positions.variance.item() == pytest.approx((share * (share.log() - mean) ** 2).sum().item(), abs=1e-5)
    other = positions_of(scorer, [(PROMPT, [Completion((int(logits.argmin()),), "", False, (0.0,))])], sampling)
    assert other.outside.item() and other.luck.item() == 0.0


def test_a_token_at_the_border_is_no_lie() -> None:
    """Two tokens as likely as the twentieth: an engine keeps 20, the other 21."""
    zeros, given = torch.zeros(100), torch.full((100,), -3.0)
    positions = Positions(given, given.clone(), zeros, zeros.clone(), zeros, zeros, zeros.bool())
    given[7] -= math.log(20 / 21)
    assert difference(positions, Sampling(top_k=20)) == 0.0
    assert difference(positions, Sampling()) == pytest.approx(math.log(21 / 20) / 100, rel=1e-4)
    given[:3] -= 1.0
    assert difference(positions, Sampling(top_k=20)) > 0.01
    assert difference(Positions(*(each[:1] for each in positions)), Sampling(top_k=20)) == 1.0
    given[0] = math.nan
    assert math.isnan(difference(positions, Sampling(top_k=20)))


def test_chance_is_no_lie() -> None:
    """Nearly certain tokens and a rare surprise, and many coins: 2,000 draws of 256 tokens, none of which is a lie."""
    draw = torch.Generator().manual_seed(0)
    zeros = torch.zeros(256)
    for rare in (1e-4, 1e-3, 0.05, 0.5):
        logs = torch.tensor([1 - rare, rare], dtype=torch.float64).log()
        mean = (logs.exp() * logs).sum()
        variance = zeros + float((logs.exp() * (logs - mean) ** 2).sum())
        for _ in range(500):
            luck = (logs - mean)[(torch.rand(256, generator=draw) < rare).long()]
            positions = Positions(zeros, zeros, zeros, zeros, luck, variance, zeros.bool())
            assert why_not_as_told(positions, Sampling(temperature=1.0)) is None
    always = Positions(zeros, zeros, zeros, zeros, (logs - mean)[torch.zeros(256).long()], variance, zeros.bool())
    assert why_not_as_told(always, Sampling(temperature=1.0)) is None  # both sides of a coin are as likely
