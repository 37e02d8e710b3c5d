"""Texts that share starts, read as a forest, against each text read by itself."""

from __future__ import annotations

import logging
import random
from typing import Any

import pytest
import torch
from dense import exactly
from families import FAMILIES, VOCABULARY, family
from tiny import tiny_llama, with_lora
from transformers import PreTrainedModel

from prefold.errors import StageError
from prefold.trees import forest, reader
from prefold.trees.forest import Text, pack_forest, split_texts
from prefold.trees.logprobs import packed_logprobs
from prefold.trees.packing import Node
from prefold.trees.reader import Reader, choose_reader

BACKENDS = ("prefold_joined", "prefold_segments")


def nested_texts(questions: int = 3, seed: int = 0, shared: int = 15) -> list[Text]:
    """A start that all share, questions, answers with and without common first tokens, one-token answers, repeats."""
    draw = random.Random(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(VOCABULARY) for _ in range(length))

    start = ids(shared)
    found = []
    for _ in range(questions):
        question = start + ids(draw.randint(1, 9))
        opening = ids(6)
        answers = [ids(1), ids(1), ids(3), opening + ids(2), opening + ids(1), opening]
        found += [Text(question + answer, len(answer)) for answer in answers]
    found.append(found[0])
    found += [Text(ids(7), 3), Text(ids(2), 1), Text(start, 14)]
    draw.shuffle(found)
    return found


def by_themselves(model: PreTrainedModel, texts: list[Text]) -> tuple[list[torch.Tensor], list[bool]]:
    """The straightforward way: a forward pass of all tokens of each."""
    logprobs, greedy = [], []
    with torch.no_grad():
        for text in texts:
            logits = model(torch.tensor([text.tokens]), use_cache=False).logits[0, -text.scored - 1 : -1]
            targets = torch.tensor(text.tokens[-text.scored :])
            logprobs.append(logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1))
            greedy.append(bool((logits.argmax(-1) == targets).all()))
    return logprobs, greedy


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_forest_gives_what_each_text_gives_alone(name: str, backend: str) -> None:
    model, texts = family(name), nested_texts()
    wanted, greedy = by_themselves(model, texts)
    found: dict[int, Any] = {}
    for row, likelihoods in Reader(model, 64, backend).read(texts):
        found.update(zip(row, likelihoods, strict=True))
    assert sorted(found) == list(range(len(texts)))
    for place in range(len(texts)):
        assert found[place].logprob == pytest.approx(float(wanted[place].sum()), abs=1e-4)
        assert found[place].greedy == greedy[place]


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_double_precision(backend: str) -> None:
    with exactly(torch.float64):
        model, texts = family("llama", torch.float64), nested_texts(seed=1)
        row = pack_forest(texts)
        with torch.no_grad(), reader.using_attention(model, backend):
            found = packed_logprobs(model, row)
        torch.testing.assert_close(found.tokens, torch.cat(by_themselves(model, texts)[0]), rtol=1e-10, atol=1e-10)


def test_gradients_of_a_forest() -> None:
    """Nothing needs them yet; the attention has them all the same."""
    with exactly(torch.float64):
        model, texts = family("llama", torch.float64), nested_texts(2, seed=2)
        row = pack_forest(texts)
        with reader.using_attention(model, "prefold_joined"):
            packed_logprobs(model, row).tokens.sum().backward()
        found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        model.zero_grad()
        for text in texts:
            logits = model(torch.tensor([text.tokens]), use_cache=False).logits[0, -text.scored - 1 : -1]
            targets = torch.tensor(text.tokens[-text.scored :])
            logits.log_softmax(-1).gather(1, targets[:, None]).sum().backward()
        for name, weight in model.named_parameters():
            torch.testing.assert_close(found[name], weight.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", [*BACKENDS, None])
def test_a_large_vocabulary_costs_no_digits(backend: str | None) -> None:
    """The normaliser is a sum of 49,152 terms: added one after another in float32, too small by 8e-6 of itself."""
    model = tiny_llama(vocab_size=49_152, initializer_range=0.6)
    texts = [Text(tuple(range(start, start + 40)), 39) for start in range(0, 400, 40)]
    with torch.no_grad():
        found = Reader(model, 4096, backend).tokens(texts)[0]
    with exactly(torch.float64):
        wanted = torch.cat(by_themselves(model.double(), texts)[0])
    assert abs(float((found.double() - wanted).mean())) < 1e-6


# ---- the layout ----


def test_levels_of_a_forest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forest, "WORTH_SHARING", 2)
    start, more = (1, 2, 3), (4, 5)
    texts = [
        Text((*start, *more, 6, 7, 0), 3),
        Text((*start, 9, 0), 2),
        Text((*start, *more, 8, 0), 1),
        Text((5, 0), 1),
    ]
    row = pack_forest(texts)
    assert row.input_ids.tolist() == [[5, 1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert row.positions.tolist() == [[0, 0, 1, 2, 3, 4, 5, 6, 5, 3]]
    assert row.nodes == (
        Node((0, 1), (), (1, 1)),
        Node((1, 4), (), (4, 10)),
        Node((4, 6), ((1, 4),), (6, 9)),
        Node((6, 8), ((1, 4), (4, 6)), (8, 8)),
        Node((8, 9), ((1, 4), (4, 6)), (9, 9)),
        Node((9, 10), ((1, 4),), (10, 10)),
    )
    assert row.predictors.tolist() == [5, 6, 7, 3, 9, 8, 0]
    assert row.targets.tolist() == [6, 7, 0, 9, 0, 0, 0]
    assert row.completion.tolist() == [0, 0, 0, 1, 1, 2, 3]
    assert row.longest == 7


def test_one_token_answers_cost_nothing_but_their_question() -> None:
    texts = [Text((*range(40), answer), 1) for answer in (50, 51, 52, 53)]
    row = pack_forest(texts)
    assert row.tokens == 40 and len(row.nodes) == 1
    assert row.predictors.tolist() == [39] * 4


def test_texts_that_continue_one_another_without_end() -> None:
    """Deeper than Python's recursion allows."""
    texts = [Text(tuple(range(length)), 1) for length in range(6, 6000, 5)]
    row = pack_forest(texts)
    assert row.tokens == len(texts[-1].read) and row.longest == row.tokens


def test_rows_keep_to_the_budget_and_contexts_together() -> None:
    draw = random.Random(0)
    contexts = [tuple(draw.randrange(50) for _ in range(30)) for _ in range(20)]
    texts = [Text((*context, *[answer] * 5), 5) for context in contexts for answer in range(4)]
    draw.shuffle(texts)
    rows = split_texts(texts, 100)
    assert sorted(place for row in rows for place in row) == list(range(len(texts)))
    assert all(pack_forest([texts[place] for place in row]).tokens <= 100 for row in rows)
    homes = [{texts[place].tokens[: -texts[place].scored] for place in row} for row in rows]
    assert all(not one & other for place, one in enumerate(homes) for other in homes[:place])
    assert len(rows) == 10  # two questions of 46 tokens each
    assert [len(row) for row in split_texts(texts, 10)] == [4] * 20


# ---- the choice ----


def test_a_model_that_cannot_share_reads_plainly(caplog: pytest.LogCaptureFixture) -> None:
    model, texts = family("mamba"), nested_texts()
    chosen = choose_reader(model, texts)
    assert chosen.attention is None and "plain path" in caplog.text
    wanted, _ = by_themselves(model, texts)
    for row, found in chosen.read(texts):
        for place, likelihood in zip(row, found, strict=True):
            assert likelihood.logprob == pytest.approx(float(wanted[place].sum()), abs=1e-4)


def test_a_backend_that_leaks_is_not_taken(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from prefold.trees import attention

    monkeypatch.setattr(attention, "_continued", lambda nodes: [node for node in nodes if not node.above])
    with caplog.at_level(logging.WARNING):
        assert choose_reader(tiny_llama(), nested_texts()).attention is None
    assert "differ from plain ones" in caplog.text


def test_an_adapter_is_read_with(caplog: pytest.LogCaptureFixture) -> None:
    model, texts = with_lora(tiny_llama()).eval(), nested_texts()
    chosen = choose_reader(model, texts)
    assert chosen.attention is not None
    wanted, _ = by_themselves(model, texts)  # type: ignore[arg-type]
    for row, found in chosen.read(texts):
        for place, likelihood in zip(row, found, strict=True):
            assert likelihood.logprob == pytest.approx(float(wanted[place].sum()), abs=1e-4)


def test_out_of_memory_halves_the_budget(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model, texts = tiny_llama(), nested_texts()
    chosen = Reader(model, 200, "prefold_joined")
    tokens = Reader.tokens

    def failing(self: Reader, row: list[Text]) -> Any:
        if pack_forest(row).tokens > 60:
            raise MemoryError("out of memory")
        return tokens(self, row)

    monkeypatch.setattr(Reader, "tokens", failing)
    read = [place for row, _ in chosen.read(texts) for place in row]
    assert sorted(read) == list(range(len(texts)))
    assert chosen.max_tokens < 200 and "out of memory" in caplog.text
    monkeypatch.setattr(Reader, "tokens", lambda self, row: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(StageError, match="out of memory with a text of"):
        list(chosen.read(texts))
