"""Sampling by variable-length attention, by a stand-in for its kernel: the completions of the CPU's way, the calls that
it takes, and what becomes of a device whose kernel fails."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulated_devices import emulated, put
from emulated_kernels import flash
from families import FAMILIES, VOCABULARY, WINDOW, family
from tiny import tiny_llama
from torch import Tensor
from torch.nn.attention import varlen

from prefold.generation import engine
from prefold.generation.engine import LocalEngine, ModelState, failed_half
from prefold.generation.kv_cache import Products, Prompt, SequenceBatch, VariableLength
from prefold.generation.sampling import Completion, Sampling
from prefold.trees.attention import heads_of

TOKENIZER: Any = SimpleNamespace(eos_token_id=2, decode=lambda ids, **how: " ".join(map(str, ids)))
PROMPTS = [[(7 * i + j) % 80 + 10 for j in range(length)] for i, length in enumerate((1, 30, 5, 12, 3, 20))]
ENDS = tuple(range(10, 18))
GREEDY = Sampling(14, 2, end_tokens=ENDS)
DRAWN = Sampling(
    14,
    3,
    0.9,
    top_p=0.95,
    top_k=60,
    repetition_penalty=1.1,
    end_tokens=ENDS,
    with_model_logprobs=True,
    with_entropies=True,
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of segments of each call of the kernel. Where the fallback is taken, the test fails."""
    made: list[int] = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, *given: Any, **how: Any) -> Any:
        made.append(len(starts) - 1)
        return flash(query, key, value, starts, *given, **how)

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(engine, "generate_plainly", None)
    yield made


def as_on_cuda(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same model, which takes variable-length attention on the CPU too, and is looked at every few steps."""
    ModelState.of(model).variable_length.add(model.dtype)
    monkeypatch.setitem(engine.STEPS_BETWEEN_LOOKS, "cpu", 4)
    return model


def assert_same(found: list[list[Completion]], wanted: list[list[Completion]]) -> None:
    for one, other in zip(chain(*found), chain(*wanted), strict=True):
        assert (one.token_ids, one.text, one.finished) == (other.token_ids, other.text, other.finished)
        for name in ("logprobs", "model_logprobs", "entropies"):
            assert (getattr(one, name) or ()) == pytest.approx(getattr(other, name) or (), abs=1e-4)


OF_FAMILIES = [("llama", GREEDY), ("mistral", GREEDY)]
OF_FAMILIES += [(name, DRAWN) for name in ("llama", "mistral", "qwen2", "gemma3_text", "gpt2", "phi", "cohere2")]


@pytest.mark.parametrize(("name", "how"), OF_FAMILIES, ids=str)
def test_the_completions_are_those_of_a_cpu(
    name: str, how: Sampling, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts shorter and longer than the window; others begin while some are under way, and rows leave."""
    model = family(name)
    wanted = LocalEngine(model, TOKENIZER).sample(PROMPTS, how)
    assert not calls and (how == GREEDY or len({len(one.token_ids) for group in wanted for one in group}) > 3)
    found = LocalEngine(as_on_cuda(model, monkeypatch), TOKENIZER, max_tokens=150).sample(PROMPTS, how)
    assert calls and max(map(len, PROMPTS)) > WINDOW
    assert_same(found, wanted)


def test_most_families_fit() -> None:
    assert [name for name in FAMILIES if not VariableLength.fits(family(name).config)] == ["gemma2"]
    assert not VariableLength.fits(family("llama", head_dim=12).config)
    assert not VariableLength.fits(family("llama", head_dim=264).config)


def test_completions_do_not_depend_on_the_batch(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = as_on_cuda(family("mistral"), monkeypatch)
    how = replace(DRAWN, temperature=1.0)
    together = LocalEngine(model, TOKENIZER).sample(PROMPTS, how)
    for budget in (60, 110, 220):
        assert_same(LocalEngine(model, TOKENIZER, max_tokens=budget).sample(PROMPTS, how), together)
    alone = [
        dict(LocalEngine(model, TOKENIZER).stream([prompt], how, [number]))[0] for number, prompt in enumerate(PROMPTS)
    ]
    assert_same(alone, together)


def test_rows_that_leave_and_join_share_one_call(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a step and layer, whatever is under way. Segments are twice what is seen, less one: gaps lie between."""
    model, seen = as_on_cuda(tiny_llama(), monkeypatch), list[tuple[int, int, set[int]]]()
    decode = engine.decode
    engine.why_not_shared(model, PROMPTS[1], 14)

    def counted(model: Any, batches: Any, tokens: Tensor) -> Tensor:
        [batch] = batches
        calls.clear()
        logits = decode(model, batches, tokens)
        assert calls == [2 * (len(batch.prompts) + batch.sequences) - 1] * 3
        seen.append((len(batch.prompts), batch.sequences, {prompt.filled for prompt in batch.prompts}))
        assert batch.reserved <= 2 * (sum(prompt.tokens for prompt in batch.prompts) + 14 * batch.sequences)
        assert batch.states[0][0].shape == (batch.reserved, 2, 8)
        return logits

    monkeypatch.setattr(engine, "decode", counted)
    how = replace(DRAWN, temperature=1.0, end_tokens=tuple(range(5, 35)))
    LocalEngine(model, TOKENIZER, max_tokens=200).sample(PROMPTS * 3, how)
    assert len({sequences for _, sequences, _ in seen}) > 3
    assert any(len(filled) > 1 for _, _, filled in seen), "none has begun while others were under way"


@pytest.mark.parametrize("of_others", [True, False])
def test_out_of_memory_on_the_move(
    of_others: bool, calls: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """When tokens have been read, and prompts may just have ended: these are begun anew as well."""
    model = as_on_cuda(tiny_llama(), monkeypatch)
    how = replace(DRAWN, temperature=1.0, end_tokens=tuple(range(5, 35)))
    wanted = LocalEngine(model, TOKENIZER).sample(PROMPTS * 3, how)
    take_over, left = VariableLength.take_over, [1]

    def limited(self: VariableLength, others: Any) -> None:
        take_over(self, others)
        if bool(others) == of_others and left[0] and len(self.prompts) > 1:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(VariableLength, "take_over", limited)
    assert_same(LocalEngine(model, TOKENIZER, max_tokens=200).sample(PROMPTS * 3, how), wanted)
    assert left == [0] and "out of memory: the token budget of completions goes from 200" in caplog.text


def test_nothing_is_moved_until_half_is_free() -> None:
    batch = VariableLength([Prompt(7, 3), Prompt(5, 2)], capacity=4)
    row = torch.arange(7.0 + 5 + 5 * 4)[:, None, None].expand(-1, 2, 8)
    batch.states = [(row.clone(), -row)]
    assert batch.starts == [0, 7, 12, 16, 20, 24, 28] and batch.reserved == 32
    batch.advance()
    batch.keep([1, 2, 4])
    assert batch.starts == [0, 7, 16, 20, 28] and batch.reserved == 32
    assert [prompt.sequences for prompt in batch.prompts] == [2, 1] and batch.positions.tolist() == [8, 8, 6]
    assert batch._boundaries(None).tolist() == [0, 7, 7, 12, 16, 18, 20, 22, 28, 30]
    # The next token is the ninth, and sees three: the last of the prompt, the first of its own and itself.
    assert batch._boundaries(3).tolist() == [6, 7, 11, 12, 16, 18, 20, 22, 28, 30]
    assert batch._boundaries(1).tolist() == [7, 7, 12, 12, 17, 18, 21, 22, 29, 30]
    batch.keep([0])
    assert batch.starts == [0, 7] and batch.reserved == 11
    assert batch.states[0][0][:, 1, 3].tolist() == [*range(7), *range(16, 20)]
    assert batch.states[0][1][:, 0, 0].tolist() == [-i for i in [*range(7), *range(16, 20)]]
    other = VariableLength([Prompt(2, 1)], capacity=4)
    other.states = [(torch.full((6, 2, 8), 50.0), torch.full((6, 2, 8), -50.0))]
    batch.take_over([other])
    assert batch.states[0][0][:, 0, 0].tolist() == [*range(7), 50, 50, *range(16, 20), 50, 50, 50, 50]
    assert batch.starts == [0, 7, 9, 13] and batch.positions.tolist() == [8, 2]
    assert batch._boundaries(None).tolist() == [0, 7, 7, 9, 9, 11, 13, 14]


def test_the_next_token_is_looked_at_in_time(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """No step beyond the length of the longest, or beyond a token that somebody reads."""
    model, steps = as_on_cuda(tiny_llama(), monkeypatch), list[int]()
    decode = engine.decode
    engine.why_not_shared(model, PROMPTS[1], 14)

    def counted(model: Any, batches: Any, tokens: Tensor) -> Tensor:
        steps.append(len(tokens))
        return decode(model, batches, tokens)

    monkeypatch.setattr(engine, "decode", counted)
    for longest in (1, 2, 7, 9):
        steps.clear()
        groups = LocalEngine(model, TOKENIZER).sample(PROMPTS[:2], Sampling(longest, 2, end_tokens=()))
        assert [len(one.token_ids) for group in groups for one in group] == [longest] * 4
        assert len(steps) == longest - 1
    heard: list[int] = []
    engine_of = LocalEngine(model, TOKENIZER)

    def listen(prompt: int, number: int, token: int) -> None:
        heard.append(len(steps))

    steps.clear()
    engine_of.sample(PROMPTS[:1], Sampling(6, 1, end_tokens=()), on_token=listen)
    assert heard == [0, 1, 2, 3, 4, 5]


# ---- as the check of sampling finds it ---------------------------------------------------------------------------


ONE = {"": "cuda"}
TWO = {"": "cuda:0", **dict.fromkeys(("model.layers.1", "model.layers.2", "model.norm", "lm_head"), "cuda:1")}
ON_CUDA = [
    ("llama", torch.bfloat16, ONE, GREEDY),
    ("llama", torch.float16, TWO, DRAWN),
    ("mistral", torch.bfloat16, TWO, DRAWN),
    ("mistral", torch.float16, ONE, DRAWN),
    ("gemma2", torch.bfloat16, ONE, DRAWN),
]


@pytest.mark.parametrize(("name", "dtype", "devices", "how"), ON_CUDA, ids=str)
def test_on_cuda(
    name: str,
    dtype: torch.dtype,
    devices: dict[str, str],
    how: Sampling,
    calls: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The check finds by itself what can be taken. Rounding parts completions, as it does with products."""
    wanted = LocalEngine(family(name, dtype), TOKENIZER).sample(PROMPTS, how)
    model = family(name, dtype)
    with emulated():
        found = LocalEngine(put(model, devices), TOKENIZER, max_tokens=150).sample(PROMPTS, how)
    assert ModelState.of(model).variable_length == (set() if name == "gemma2" else {dtype})
    assert bool(calls) == (name != "gemma2") and not caplog.records
    pairs = zip(chain(*found), chain(*wanted), strict=True)
    same = sum(one.token_ids == other.token_ids for one, other in pairs)
    assert same > len(PROMPTS) * how.num_answers // 3


def test_what_was_checked_in_one_dtype_is_not_taken_in_another(calls: list[int]) -> None:
    model = family("llama", torch.bfloat16)
    with emulated():
        put(model, {"": "cuda"})
        kinds = []
        for dtype in (torch.bfloat16, torch.float16):
            if dtype == torch.bfloat16:
                engine.why_not_shared(model, PROMPTS[1], 4)
            batch, _ = engine.prefill(model.to(dtype), PROMPTS[:1], Sampling(2, 1))
            kinds.append(type(batch))
    assert kinds == [VariableLength, Products]


def without_a_kernel(*given: Any, **how: Any) -> Any:
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nmore of it")


def wrong_normaliser(*given: Any, **how: Any) -> Any:
    found = flash(*given, **how)
    return (found[0], -found[1]) if isinstance(found, tuple) else found


def sees_the_gaps(
    query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, *given: Any, **how: Any
) -> Any:
    if how.get("return_aux"):
        keys = keys.clone()
        keys[1::2][:-1] = keys[2::2]
    return flash(query, key, value, queries, keys, *given, **how)


FAULTS = {
    without_a_kernel: "failed (FlashAttention only supports Ampere GPUs or newer.)",
    wrong_normaliser: "of its size, rounding explains 0.01",
    sees_the_gaps: "of its size, rounding explains 0.01",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_kernel_that_fails_is_left_out(
    fault: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With one line, and products in its place."""
    monkeypatch.setattr(varlen, "varlen_attn", fault)
    monkeypatch.setattr(engine, "generate_plainly", None)
    model = family("mistral", torch.bfloat16)
    with emulated():
        LocalEngine(put(model, {"": "cuda"}), TOKENIZER, max_tokens=150).sample(PROMPTS, GREEDY)
    assert not ModelState.of(model).variable_length
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("completions are sampled without variable-length attention: its attention in torch.bfloat16")
    assert line.endswith(FAULTS[fault]) and "\n" not in line


def test_a_layer_of_another_shape_is_seen_before_it_matters(
    calls: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What the configuration does not tell, here the width of a layer's values, the check's own passes come upon."""

    def kernel(query: Tensor, key: Tensor, value: Tensor, *given: Any, **how: Any) -> Any:
        if len(query) not in (33, 2 * 3 * 2):  # those of random states
            raise RuntimeError("value has another width")
        return flash(query, key, value, *given, **how)

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    model = family("llama", torch.bfloat16)
    with emulated():
        assert engine.failed_check(put(model, {"": "cuda"}), PROMPTS[1]) is None
    assert not ModelState.of(model).variable_length and "another width" in caplog.text


def test_out_of_memory_in_the_check_is_no_fault(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(VariableLength, "begin", full)
    with emulated(), pytest.raises(torch.OutOfMemoryError):
        failed_half(put(family("llama"), {"": "cuda"}), torch.bfloat16, VariableLength)


# ---- attention itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 1, 2, 5, 40])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (3, 1)])
def test_both_kinds_attend_alike(heads: int, key_heads: int, window: int | None, calls: list[int]) -> None:
    """From where prompts are out of sight, too."""
    model: Any = family("llama", num_attention_heads=heads, num_key_value_heads=key_heads, head_dim=8, hidden_size=24)
    for layer in model.model.layers:
        layer.self_attn.sliding_window = window
    found = [logits_of(model, kind) for kind in (VariableLength, Products)]
    assert math.prod(found[0].shape) > 1000 and heads_of(model.config)[:2] == (heads, key_heads)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def logits_of(model: Any, kind: type[SequenceBatch]) -> Tensor:
    batch, logits = engine.prefill(model, PROMPTS[:3], Sampling(8, 2), kind)
    steps = [logits.repeat_interleave(2, 0)]
    for step in range(7):
        steps.append(engine.decode(model, [batch], torch.arange(6) * 5 + step))
    assert steps[0].shape == (6, VOCABULARY)
    return torch.cat(steps)
