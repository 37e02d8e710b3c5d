"""Packed trees give the plain method's log-probs and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import gradients, random_trees, tiny_llama, tiny_mistral, with_lora
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefold.trees.attention import NAME, Scorer, choose_scorer, unwrapped
from prefold.trees.packing import TokenTree, pack

MODELS = {"llama": tiny_llama, "mistral-sliding-window": tiny_mistral}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def dense_logprobs(model: nn.Module, trees: list[TokenTree]) -> Tensor:
    """One completion at a time, unpadded, full logits: the definition."""
    scored = []
    for tree in trees:
        for ids in tree.completions:
            row = torch.tensor([tree.prompt + ids])
            logits = model(input_ids=row, use_cache=False).logits[0, -len(ids) - 1 : -1]
            scored.append(logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).squeeze(-1))
    return torch.cat(scored)


def outcome(model: nn.Module, logprobs: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs, and the gradients of a sum that weights every token differently."""
    model.zero_grad()
    tokens = logprobs()
    (tokens * torch.linspace(-1, 2, len(tokens), dtype=tokens.dtype)).sum().backward()
    return tokens.detach(), gradients(model)


def assert_same(
    found: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]], tolerance: float
) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=tolerance, atol=tolerance)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert (found[1][name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient-checkpointing"])
def test_lora_gradients(family: str, dtype: torch.dtype, checkpointing: bool) -> None:
    model = with_lora(MODELS[family](dtype))
    trees = random_trees(6)
    wanted = outcome(model, lambda: dense_logprobs(model, trees))
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    for packed in (True, False):
        scorer = Scorer(model, max_tokens=64, packed=packed)
        with scorer.attention():
            assert_same(outcome(model, lambda scorer=scorer: scorer.score(trees).tokens), wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("tied", [True, False])
def test_full_gradients_with_the_head(tied: bool) -> None:
    model = tiny_llama(torch.float64, tie_word_embeddings=tied)
    trees = random_trees(6)
    wanted = outcome(model, lambda: dense_logprobs(model, trees))
    assert_same(outcome(model, lambda: Scorer(model, 64, packed=True).score(trees).tokens), wanted, 1e-10)


def test_head_with_bias() -> None:
    model = tiny_llama(torch.float64)
    head = nn.Linear(32, 97, dtype=torch.float64)
    model.set_output_embeddings(head)
    trees = random_trees(6)
    wanted = outcome(model, lambda: dense_logprobs(model, trees))
    assert_same(outcome(model, lambda: Scorer(model, 64, packed=True).score(trees).tokens), wanted, 1e-10)


def test_more_tokens_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefold.trees.logprobs.CHUNK", 7)
    model = tiny_llama(torch.float64)
    trees = random_trees(6)
    wanted = outcome(model, lambda: dense_logprobs(model, trees))
    assert_same(outcome(model, lambda: Scorer(model, 64, packed=True).score(trees).tokens), wanted, 1e-10)


def test_attention_is_put_back() -> None:
    model = with_lora(tiny_llama())
    Scorer(model, 64, packed=True).score(random_trees(2))
    assert unwrapped(model).config._attn_implementation == "sdpa"
    assert type(unwrapped(model).lm_head).__call__ is nn.Linear.__call__
    assert "forward" not in vars(unwrapped(model).lm_head)


# ---- the self-check turns red ----


def broken_position(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(trees: list[TokenTree], device: object = "cpu") -> object:
        row = pack(trees)
        row.positions[row.positions > 3] += 1
        return row

    monkeypatch.setattr("prefold.trees.attention.pack", shifted)


def leaking_sibling(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefold.trees import attention

    def everything(rows: int, columns: int, window: int | None, device: torch.device) -> Tensor:
        return torch.ones(rows, columns, dtype=torch.bool)

    monkeypatch.setattr(attention, "_lower_right", everything)


def wrong_predictor(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(trees: list[TokenTree], device: object = "cpu") -> object:
        row = pack(trees)
        row.predictors[0] -= 1
        return row

    monkeypatch.setattr("prefold.trees.attention.pack", late)


def capped_head(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model.config.final_logit_softcapping = 5.0


@pytest.mark.parametrize("fault", [broken_position, leaking_sibling, wrong_predictor, capped_head])
def test_self_check_falls_back(
    fault: Callable[[PreTrainedModel, pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny_llama()
    trees = [TokenTree((5, 6, 7, 8), ((1, 2, 3), (4, 5, 6))), *random_trees(2, seed=3)]
    assert choose_scorer(model, trees, 64).packed
    fault(model, monkeypatch)
    with caplog.at_level("WARNING", logger="prefold"):
        scorer = choose_scorer(model, trees, 64)
    assert not scorer.packed
    assert scorer.reason in caplog.text
    assert len(caplog.records) == 1


def test_attention_refuses_what_it_cannot_honour() -> None:
    model = tiny_llama()
    model.set_attn_implementation(NAME)
    with pytest.raises(NotImplementedError, match="layout"):
        model(input_ids=torch.tensor([[1, 2, 3]]))
