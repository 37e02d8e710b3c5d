"""Completions: what transformers' own `generate` writes, with shared prompts, in batches of any make-up."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCABULARY, WINDOW, family
from tiny import tiny_llama
from tiny_tokenizer import CHATML, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from prefold.data.preference import Message
from prefold.errors import StageError
from prefold.generation import engine as generate
from prefold.generation.engine import LocalEngine, answer, failed_check, prefill, why_not_shared
from prefold.generation.kv_cache import Decode, Products, Prompt
from prefold.generation.sampling import Completion, Sampling

ENDS = (5, 6, 7, 8)
LENGTHS = (1, 30, 5, 12, 3)
Tokens = list[list[int]]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer(CHATML)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_llama(vocab_size=264).eval()


def prompts_of(lengths: Sequence[int] = LENGTHS, vocabulary: int = VOCABULARY) -> Tokens:
    draw = random.Random(0)
    return [[draw.randrange(10, vocabulary) for _ in range(length)] for length in lengths]


def by_transformers(model: Any, prompt: list[int], new: int, ends: Sequence[int] = ENDS, **settings: Any) -> list[int]:
    config = GenerationConfig(
        max_new_tokens=new, do_sample=False, eos_token_id=list(ends), pad_token_id=0, use_cache=True, **settings
    )
    ids = torch.tensor([prompt])
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return [int(token) for token in found[0, len(prompt) :]]


def ids_of(found: list[list[Completion]]) -> list[Tokens]:
    return [[list(one.token_ids) for one in of_prompt] for of_prompt in found]


@pytest.fixture
def no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Iterator[Any]:
        raise AssertionError("the plain path was taken")

    monkeypatch.setattr(generate, "generate_plainly", refuse)


# ---- greedy, as transformers ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_is_transformers_token_for_token(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = family(name)
    prompts = prompts_of()
    assert max(map(len, prompts)) > WINDOW
    # Room for two prompts at a time: others begin while some are under way.
    found = LocalEngine(model, tokenizer, max_tokens=80).sample(prompts, Sampling(14, 2, end_tokens=ENDS))
    for prompt, completions in zip(prompts, ids_of(found), strict=True):
        assert completions == [by_transformers(model, prompt, 14)] * 2


@pytest.mark.slow
@pytest.mark.real_model
def test_greedy_on_a_real_model(smollm2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    texts = ("Write a haiku.", "Name three rivers and say where each of them rises.", "What is 12 + 30?")
    conversations = [[{"role": "user", "content": text}] for text in texts]
    prompts = [tokenizer.apply_chat_template(one, add_generation_prompt=True)["input_ids"] for one in conversations]
    found = LocalEngine(model, tokenizer).sample(prompts, Sampling(40, 2))
    for prompt, completions in zip(prompts, ids_of(found), strict=True):
        assert completions == [by_transformers(model, prompt, 40, [tokenizer.eos_token_id])] * 2


def test_the_repetition_penalty_is_transformers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = prompts_of()
    settings = Sampling(14, repetition_penalty=1.4, end_tokens=ENDS)
    [*found] = ids_of(LocalEngine(model, tokenizer).sample(prompts, settings))
    wanted = [by_transformers(model, prompt, 14, repetition_penalty=1.4) for prompt in prompts]
    assert found == [[tokens] for tokens in wanted]
    assert wanted != [by_transformers(model, prompt, 14) for prompt in prompts]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.usefixtures("no_fallback")
def test_other_precisions(dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase) -> None:
    model = family("llama", dtype)
    [[found]] = LocalEngine(model, tokenizer).sample(
        prompts_of([20]), Sampling(10, temperature=1.0, with_model_logprobs=True, end_tokens=())
    )
    ids = torch.tensor([[*prompts_of([20])[0], *found.token_ids]])
    with torch.no_grad():
        logprobs = model(ids).logits[0, 19:-1].double().log_softmax(-1)
    own = logprobs.gather(-1, ids[0, 20:, None]).squeeze(-1)
    # The model's norms are in float32 either way.
    tolerance = 1e-1 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(torch.tensor(found.model_logprobs).double(), own, rtol=0, atol=tolerance)


# ---- log-probs --------------------------------------------------------------------------------------------------


def test_log_probs_are_those_of_the_distribution_drawn_from_and_of_the_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    [prompt] = prompts_of([9])
    settings = Sampling(8, 3, temperature=0.7, top_k=5, end_tokens=(), with_model_logprobs=True)
    [completions] = LocalEngine(model, tokenizer).sample([prompt], settings)
    for one in completions:
        ids = torch.tensor([[*prompt, *one.token_ids]])
        with torch.no_grad():
            logits = model(ids).logits[0, 8:-1]
        own = ids[0, 9:, None]
        assert one.model_logprobs is not None
        wanted = logits.log_softmax(-1).gather(-1, own).squeeze(-1)
        torch.testing.assert_close(torch.tensor(one.model_logprobs), wanted, rtol=0, atol=1e-4)
        kept = logits.masked_fill(logits < logits.topk(5).values[:, -1:], float("-inf")) / 0.7
        wanted = kept.log_softmax(-1).gather(-1, own).squeeze(-1)
        torch.testing.assert_close(torch.tensor(one.logprobs), wanted, rtol=0, atol=1e-4)


def test_greedy_log_probs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    [[one]] = LocalEngine(model, tokenizer).sample(prompts_of([4]), Sampling(3, end_tokens=()))
    assert one.logprobs == (0.0, 0.0, 0.0) and one.model_logprobs is None


# ---- batching ---------------------------------------------------------------------------------------------------


def test_completions_do_not_depend_on_the_batch(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = prompts_of([*LENGTHS, 40, 2], 264)
    settings = Sampling(12, 3, temperature=1.0, end_tokens=tuple(range(10, 40)))
    together = LocalEngine(model, tokenizer).sample(prompts, settings)
    tight = LocalEngine(model, tokenizer, max_tokens=70).sample(prompts, settings)
    assert ids_of(tight) == ids_of(together)
    alone = [
        dict(LocalEngine(model, tokenizer).stream([prompt], settings, numbers=[number]))[0]
        for number, prompt in enumerate(prompts)
    ]
    assert ids_of(alone) == ids_of(together)
    fewer = LocalEngine(model, tokenizer).sample(prompts, replace(settings, num_answers=2))
    assert ids_of(fewer) == [of_prompt[:2] for of_prompt in ids_of(together)]
    assert len({tuple(ids) for of_prompt in ids_of(together) for ids in of_prompt}) > 15
    other = LocalEngine(model, tokenizer).sample(prompts, replace(settings, seed=1))
    assert ids_of(other) != ids_of(together)


def test_rows_share_the_keys_of_their_prompt(model: PreTrainedModel) -> None:
    prompts = prompts_of([20, 7])
    batch, logits = prefill(model, prompts, Sampling(6, 8))
    assert logits.shape == (2, 264)
    assert isinstance(batch, Products) and [prompt.sequences for prompt in batch.prompts] == [8, 8]
    for layers, prompt in zip(batch.by_prompts, prompts, strict=True):
        assert len(layers) == 3
        for states in layers:
            for tensor in states:
                assert tensor.shape == (2, len(prompt), 8)
                assert tensor.untyped_storage().nbytes() == tensor.nbytes
    before = [states.data_ptr() for layers in batch.by_prompts for pair in layers for states in pair]
    for step in range(2):
        assert batch.positions.tolist() == [20 + step] * 8 + [7 + step] * 8
        generate.decode(model, [batch], torch.full((16,), 3))
    assert before == [states.data_ptr() for layers in batch.by_prompts for pair in layers for states in pair]
    assert {states.shape for pair in batch.own for states in pair} == {(16, 2, 6, 8)}


def test_finished_rows_leave(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    step = generate.decode

    def counted(model: Any, batches: Any, tokens: Any) -> Any:
        sizes.append(len(tokens))
        assert len(tokens) == sum(batch.sequences for batch in batches)
        return step(model, batches, tokens)

    settings = Sampling(20, 4, temperature=1.0, end_tokens=tuple(range(10, 30)))
    prompts = prompts_of([6, 9, 4], 264)
    why_not_shared(model, prompts[1], 20)
    monkeypatch.setattr(generate, "decode", counted)
    found = LocalEngine(model, tokenizer).sample(prompts, settings)
    lengths = [len(one.token_ids) for of_prompt in found for one in of_prompt]
    assert len(set(lengths)) > 4
    assert sizes == [sum(length > step for length in lengths) for step in range(1, max(lengths))]


def test_new_prompts_begin_while_others_are_under_way(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    together: list[int] = []
    step = generate.decode
    prompts = prompts_of([6] * 8, 264)
    why_not_shared(model, prompts[0], 20)

    def counted(model: Any, batches: Any, tokens: Any) -> Any:
        together.append(len(batches))
        assert sum(batch.reserved for batch in batches) <= 100
        return step(model, batches, tokens)

    monkeypatch.setattr(generate, "decode", counted)
    settings = Sampling(20, 2, temperature=1.0, end_tokens=tuple(range(10, 30)))
    LocalEngine(model, tokenizer, max_tokens=100).sample(prompts, settings)
    assert max(together) > 1


def test_rows_that_leave_make_room() -> None:
    batch = Products([Prompt(7, 3, filled=2), Prompt(7, 2, filled=2)], capacity=4)
    keys = torch.arange(5.0)[:, None, None, None].repeat(1, 2, 4, 3)
    batch.own = [(keys, -keys)]
    assert batch.reserved == 2 * 7 + 5 * 4
    batch.keep([1, 2, 4])
    assert [prompt.sequences for prompt in batch.prompts] == [2, 1] and batch.reserved == 2 * 7 + 5 * 4
    # In place, while more than half of the rows are left.
    assert batch.own[0][0] is keys
    assert keys[:3, 0, :2, 0].tolist() == [[1, 1], [2, 2], [4, 4]]
    assert batch.own[0][1][:3, 1, 1, 2].tolist() == [-1, -2, -4]
    batch.keep([0, 1])
    assert [prompt.sequences for prompt in batch.prompts] == [2] and batch.reserved == 7 + 2 * 4
    assert batch.own[0][0].shape == (2, 2, 4, 3)
    assert batch.own[0][0][:, 1, 1, 2].tolist() == [1, 2]
    assert Decode([batch]).longest == 10 and batch.sequences == len(batch.by_prompts[0]) + 2 == len(batch.positions)


def test_no_prompts_and_single_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    engine = LocalEngine(model, tokenizer)
    assert engine.sample([], Sampling(4)) == []
    [[one]] = engine.sample([[3]], Sampling(1, end_tokens=()))
    assert len(one.token_ids) == 1 and not one.finished


def test_the_model_is_left_as_it_was(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    model.train()
    attention = model.config._attn_implementation
    LocalEngine(model, tokenizer).sample(prompts_of(), Sampling(4))
    assert model.training and model.config._attn_implementation == attention
    assert not any("forward" in module.__dict__ for module in model.modules())
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    model.zero_grad()
    model.eval()


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_what_is_cached_meanwhile_serves_training(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    from tiny import random_trees

    from prefold.trees.scorer import choose_scorer

    model = family(name)
    trees = random_trees(3)
    lengths = sorted({len(tree.prompt) for tree in trees})
    LocalEngine(model, tokenizer).sample(prompts_of([*lengths, *range(1, 30)]), Sampling(4))
    scorer = choose_scorer(model, trees, 256)
    with scorer.in_place():
        scorer.score(trees).tokens.sum().backward()


# ---- endings ----------------------------------------------------------------------------------------------------


def test_end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = prompts_of([5], 264)
    engine = LocalEngine(model, tokenizer)
    [[endless]] = engine.sample(prompts, Sampling(8, end_tokens=()))
    assert len(endless.token_ids) == 8 and not endless.finished
    end = endless.token_ids[3]
    first = endless.token_ids.index(end) + 1
    [[ended]] = engine.sample(prompts, Sampling(8, end_tokens=(end,)))
    assert ended.token_ids == endless.token_ids[:first] and ended.finished
    [[last]] = engine.sample(prompts, Sampling(first, end_tokens=(end,)))
    assert last.finished
    model.generation_config.eos_token_id = [300, end]
    assert engine.sample(prompts, Sampling(8))[0][0].token_ids == ended.token_ids
    model.generation_config.eos_token_id = end
    assert engine.sample(prompts, Sampling(8))[0][0].token_ids == ended.token_ids
    model.generation_config.eos_token_id = None
    assert engine.sample(prompts, Sampling(8))[0][0].token_ids == endless.token_ids


class Spelling:
    """A tokenizer of three characters a token: stop strings begin and end within tokens."""

    eos_token_id = 0

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return "".join(f"{token:03d}" for token in ids)


def test_stop_strings(model: PreTrainedModel) -> None:
    prompts = prompts_of([5], 264)
    engine = LocalEngine(model, Spelling())  # type: ignore[arg-type]
    [[endless]] = engine.sample(prompts, Sampling(9, temperature=1.0, end_tokens=()))
    stop = endless.text[10:15]  # from the second character of the fourth token to the end of the fifth
    assert endless.text.index(stop) == 10
    [[stopped]] = engine.sample(prompts, Sampling(9, temperature=1.0, end_tokens=(), stop=("no", stop)))
    assert stopped.text == endless.text[:10] and stopped.finished
    assert stopped.token_ids == endless.token_ids[:5]


# ---- models that cannot share -----------------------------------------------------------------------------------


def state_space() -> PreTrainedModel:
    return family("mamba", num_hidden_layers=2, state_size=4, num_attention_heads=1, num_key_value_heads=1)


def test_a_state_space_model_is_answered_by_transformers(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    model = state_space()
    prompts = prompts_of()
    found = ids_of(LocalEngine(model, tokenizer).sample(prompts, Sampling(6, 2, end_tokens=ENDS)))
    assert found == [[by_transformers(model, prompt, 6)] * 2 for prompt in prompts]
    [line] = [record.message for record in caplog.records if record.name == "prefold"]
    assert line.startswith("completions are written by transformers' own generate: ")


def test_the_plain_path_writes_the_same(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of([5, 9, 5, 2], 264)
    settings = Sampling(
        10, 3, 0.8, top_p=0.9, top_k=50, min_p=0.01, repetition_penalty=1.2, end_tokens=ENDS, with_model_logprobs=True
    )
    engine = LocalEngine(model, tokenizer)
    shared = engine.sample(prompts, settings)
    monkeypatch.setattr(generate, "why_not_shared", lambda *arguments: "a test")
    # The model's own settings must not slip in.
    model.generation_config.repetition_penalty = 5.0
    plainly = engine.sample(prompts, settings)
    assert model.generation_config.repetition_penalty == 5.0
    model.generation_config.repetition_penalty = None
    assert ids_of(plainly) == ids_of(shared)
    for one, other in zip(chain(*plainly), chain(*shared), strict=True):
        assert (one.text, one.finished) == (other.text, other.finished)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert one.model_logprobs == pytest.approx(other.model_logprobs, abs=1e-4)


def test_the_check_sees_a_wrong_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("llama")
    prompt = prompts_of([40])[0]
    assert failed_check(model, prompt) is None

    def blind(self: Products, layer: int, query: Any, visible: Any, shape: Any) -> Any:
        parts = by_prompts(self, layer, query, visible, shape)
        return tuple(part.roll(1, 0) for part in parts)

    by_prompts = Products._by_prompts
    monkeypatch.setattr(Products, "_by_prompts", blind)
    reason = failed_check(model, prompt)
    assert reason is not None and "packed log-probs differ from plain ones by" in reason


def test_positions_that_stretch_are_not_shared() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = family("llama", rope_parameters=rope, max_position_embeddings=32)
    assert why_not_shared(model, prompts_of([20])[0], 8) is None
    assert "positions change" in str(why_not_shared(model, prompts_of([20])[0], 20))


# ---- text -------------------------------------------------------------------------------------------------------


class Listener:
    def __init__(self) -> None:
        self.heard: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.heard.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("shared", [True, False])
def test_tokens_are_streamed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    shared: bool,
) -> None:
    if not shared:
        monkeypatch.setattr(generate, "why_not_shared", lambda *arguments: "a test")
    prompt = [Message(role="user", content="Hello")]
    listener = Listener()
    [[completion]] = answer(model, tokenizer, [prompt], Sampling(5), streamer=listener)  # type: ignore[arg-type]
    assert "answers" not in capfd.readouterr().err
    rendered, *tokens = listener.heard
    assert len(rendered) > 5 and len(tokens) <= 5 and listener.ended
    assert tokenizer.decode([token for [token] in tokens], skip_special_tokens=True).strip() == completion.text


def test_answers_come_in_the_order_of_the_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts = [[Message(role="user", content=text)] for text in ("A long question, longer than the other", "Hi")]
    found = answer(model, tokenizer, prompts, Sampling(5, 2))
    assert found[0][0] == found[0][1] != found[1][0]
    assert "answers" in capfd.readouterr().err


# ---- out of memory ----------------------------------------------------------------------------------------------

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def room_for(rows: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A device on which a step of more rows fails; the rows of the steps that were tried."""
    step, tried = generate.decode, []

    def limited(model: Any, batches: Any, tokens: Any) -> Any:
        tried.append(len(tokens))
        found = step(model, batches, tokens)
        # Late, so that what is to be done again has left traces.
        if len(tokens) > rows and batches[0].filled > 3:
            raise OUT_OF_MEMORY
        return found

    monkeypatch.setattr(generate, "decode", limited)
    return tried


def test_out_of_memory_lowers_the_budget_and_changes_no_completion(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama(vocab_size=264)
    prompts = prompts_of([*LENGTHS, 40, 2], 264)
    settings = Sampling(12, 3, temperature=1.0, end_tokens=tuple(range(10, 24)))
    wanted = ids_of(LocalEngine(model, tokenizer).sample(prompts, settings))
    with monkeypatch.context() as patch:
        tried = room_for(7, patch)
        assert ids_of(LocalEngine(model, tokenizer).sample(prompts, settings)) == wanted
        # All 345 tokens, of which half are tried, and so on.
        assert max(tried) > 7 and "out of memory: the token budget of completions goes from" in caplog.text
        assert "to 172" in caplog.text
        tried.clear()
        caplog.clear()
        # The model's next completions begin with what was found to fit.
        assert ids_of(LocalEngine(model, tokenizer).sample(prompts, settings)) == wanted
        assert max(tried) <= 7 and not caplog.text


def test_out_of_memory_with_a_single_prompt(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    room_for(3, monkeypatch)
    settings = Sampling(12, 4, temperature=1.0, end_tokens=())
    with pytest.raises(StageError, match=r"with a single prompt and its completions \(50 tokens\); ask for fewer"):
        LocalEngine(tiny_llama(vocab_size=264), tokenizer).sample(prompts_of([2, 2, 2], 264), settings)


def test_other_errors_are_not_taken_for_it(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("shapes do not match")

    why_not_shared(model, [1, 2], 4)
    monkeypatch.setattr(generate, "decode", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        LocalEngine(model, tokenizer).sample(prompts_of([2], 264), Sampling(4))


def test_out_of_memory_in_transformers_own_generate(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama(vocab_size=264)
    monkeypatch.setattr(generate, "why_not_shared", lambda *args: "it is told to")
    settings = Sampling(6, 2, temperature=1.0, end_tokens=tuple(range(10, 24)))
    prompts = prompts_of([4, 4, 4, 4, 6], 264)
    wanted = ids_of(LocalEngine(model, tokenizer).sample(prompts, settings))
    own = model.generate

    def limited(**settings: Any) -> Any:
        found = own(**settings)
        if len(settings["input_ids"]) > rows:
            raise OUT_OF_MEMORY
        return found

    rows = 2
    monkeypatch.setattr(model, "generate", limited)
    assert ids_of(LocalEngine(model, tokenizer).sample(prompts, settings)) == wanted
    assert "the prompts that are answered at a time go from 4 to 2" in caplog.text
    assert "the prompts that are answered at a time go from 2 to 1" in caplog.text
    rows = 1
    with pytest.raises(StageError, match="out of memory with a single prompt"):
        LocalEngine(model, tokenizer).sample(prompts, settings)
