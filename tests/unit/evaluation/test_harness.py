"""The harness's scores on the tree engine, against those of its own model for transformers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from base_model import base_tokenizer
from families import family
from harness_tasks import KINDS, write_task
from tiny import tiny_llama, with_lora
from tiny_tokenizer import CHATML, LLAMA3, make_tokenizer
from torch import nn

from prefold.errors import UserError
from prefold.evaluation.harness import TreeLM
from prefold.evaluation.tasks import measure, open_tasks
from prefold.models.load import load_model
from prefold.recipe import Evaluate, Model

pytestmark = pytest.mark.usefixtures("own_caches")

EXACT = 1e-4
"""Nats."""


def evaluated(lm: Any, folder: Path, names: list[str], **settings: Any) -> dict[str, Any]:
    """The harness's own front door."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found: dict[str, Any] = simple_evaluate(
        model=lm, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True, **settings
    )
    return found


def hflm(model: nn.Module, tokenizer: Any, batch_size: int = 1) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Every metric, every response, every prompt."""
    for name, samples in theirs["samples"].items():
        for one, other in zip(ours["samples"][name], samples, strict=True):
            assert one["arguments"] == other["arguments"]
            for mine, wanted in zip(one["resps"], other["resps"], strict=True):
                same_response(mine[0], wanted[0])
        numbers = {key: value for key, value in theirs["results"][name].items() if isinstance(value, float)}
        assert numbers
        for key, value in numbers.items():
            assert ours["results"][name][key] == pytest.approx(value, rel=1e-4)


def same_response(mine: Any, wanted: Any) -> None:
    if isinstance(wanted, tuple):
        assert mine[0] == pytest.approx(wanted[0], abs=EXACT)
        assert mine[1] == wanted[1]
    elif isinstance(wanted, float):
        assert mine == pytest.approx(wanted, abs=1e-3)  # of hundreds of tokens
    else:
        assert mine == wanted


def chat_model(**changes: Any) -> tuple[nn.Module, Any]:
    tokenizer = make_tokenizer(CHATML, bos="<|im_start|>")
    model = tiny_llama(
        vocab_size=len(tokenizer), max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id, **changes
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.eval(), tokenizer


def base_model_that_adds_bos() -> tuple[nn.Module, Any]:
    tokenizer = base_tokenizer(adds_bos=True)
    return tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=4096).eval(), tokenizer


@pytest.mark.parametrize("make", [chat_model, base_model_that_adds_bos])
def test_every_kind_of_task(folder: Path, make: Callable[[], tuple[nn.Module, Any]]) -> None:
    model, tokenizer = make()
    theirs = evaluated(hflm(model, tokenizer), folder, list(KINDS))
    same(evaluated(TreeLM(model, tokenizer), folder, list(KINDS)), theirs)


@pytest.mark.parametrize("template", [CHATML, LLAMA3])
def test_with_the_chat_template(folder: Path, template: str) -> None:
    """That of Llama 3 writes the token that its tokenizer would put before a text."""
    model, tokenizer = chat_model()
    if template == LLAMA3:
        tokenizer = make_tokenizer(LLAMA3, eos="<|eot|>", bos="<|begin|>", adds_bos=True)
    names = ["tiny_options", "tiny_sums", "tiny_blanks"]
    theirs = evaluated(hflm(model, tokenizer), folder, names, apply_chat_template=True, fewshot_as_multiturn=True)
    ours = evaluated(TreeLM(model, tokenizer), folder, names, apply_chat_template=True, fewshot_as_multiturn=True)
    assert str(tokenizer.bos_token) in ours["samples"]["tiny_options"][0]["arguments"][0][0]
    same(ours, theirs)


def test_texts_longer_than_the_model_reads(folder: Path) -> None:
    """Cut from the left; a document is read window by window."""
    tokenizer = make_tokenizer(CHATML)
    for make in (lambda: tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=64), learned_positions):
        model = make().eval()
        names = ["tiny_options", "tiny_documents", "tiny_sums"]
        theirs = evaluated(hflm(model, tokenizer), folder, names)
        same(evaluated(TreeLM(model, tokenizer), folder, names), theirs)


def learned_positions() -> nn.Module:
    """No position beyond the last one that the harness's own model reads."""
    return family("gpt2", vocab_size=len(make_tokenizer(CHATML)), n_positions=64, bos_token_id=None, eos_token_id=1)


def test_base_and_adapter(folder: Path) -> None:
    model, tokenizer = chat_model()
    adapted = with_lora(model).eval()
    names = ["tiny_options", "tiny_blanks"]
    theirs = evaluated(hflm(adapted, tokenizer), folder, names)
    ours = TreeLM(adapted, tokenizer)
    same(evaluated(ours, folder, names), theirs)
    with adapted.disable_adapter():  # type: ignore[operator]
        base = evaluated(TreeLM(adapted, tokenizer), folder, names)
    assert base["samples"]["tiny_options"][0]["resps"] != theirs["samples"]["tiny_options"][0]["resps"]


def test_in_four_bits(folder: Path, tmp_path: Path) -> None:
    whole, tokenizer = chat_model()
    whole.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    tokenizer.save_pretrained(tmp_path / "model")
    section = Model(name=str(tmp_path / "model"), dtype="float32", load_in_4bit=True)
    model = load_model(section, quantised=True)
    adapted = with_lora(model).eval()
    assert any(parameter.dtype == torch.uint8 for parameter in adapted.parameters())
    names = ["tiny_options", "tiny_blanks"]
    ours = evaluated(TreeLM(adapted, tokenizer, tmp_path / "responses"), folder, names)
    same(ours, evaluated(hflm(adapted, tokenizer), folder, names))


def test_batches_of_the_other_model_change_nothing(folder: Path) -> None:
    model, tokenizer = chat_model()
    theirs = evaluated(hflm(model, tokenizer, batch_size=4), folder, ["tiny_options", "tiny_letters", "tiny_facts"])
    same(evaluated(TreeLM(model, tokenizer), folder, ["tiny_options", "tiny_letters", "tiny_facts"]), theirs)


def test_the_models_own_repetition_penalty_counts(folder: Path) -> None:
    model, tokenizer = chat_model()
    plain = evaluated(TreeLM(model, tokenizer), folder, ["tiny_sums"])
    model.generation_config.repetition_penalty = 1.4  # type: ignore[union-attr]
    theirs = evaluated(hflm(model, tokenizer), folder, ["tiny_sums"])
    assert theirs["samples"]["tiny_sums"][0]["resps"] != plain["samples"]["tiny_sums"][0]["resps"]
    same(evaluated(TreeLM(model, tokenizer), folder, ["tiny_sums"]), theirs)


def test_a_question_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the examples before all questions too, where they are the same."""
    from prefold.trees import reader

    rows: list[Any] = []
    pack = reader.pack_forest
    monkeypatch.setattr(reader, "pack_forest", lambda *args: rows.append(pack(*args)) or rows[-1])
    model, tokenizer = chat_model()
    found = evaluated(TreeLM(model, tokenizer), folder, ["tiny_letters"])
    arguments = [pair for sample in found["samples"]["tiny_letters"] for pair in sample["arguments"]]
    read, questions = rows[-1].tokens, len(found["samples"]["tiny_letters"])
    several = sum(len(tokenizer.encode(context)) for context, _ in arguments)
    start = len(tokenizer.encode(arguments[0][0].rpartition("Which")[0]))
    assert read < several / 3 - (questions - 3) * start  # first_n leaves the question itself out of its own examples


# ---- settings and mistakes ----


def lm() -> TreeLM:
    model, tokenizer = chat_model()
    return TreeLM(model, tokenizer, label="a task")


def asked(*arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance("generate_until", {}, arguments, 0)


def test_generation_settings_that_are_not_known() -> None:
    with pytest.raises(UserError, match=r"a task: .*not known here: `length_penalty`"):
        lm().generate_until([asked("Hello", {"until": [], "length_penalty": 2.0})])


def test_more_new_tokens_than_the_model_has_room_for() -> None:
    with pytest.raises(UserError, match=r"asks for 5,000 new tokens, and the model has room for 4,096"):
        lm().generate_until([asked("Hello", {"until": [], "max_gen_toks": 5000})])


def test_an_answer_longer_than_the_model_reads() -> None:
    model, tokenizer = chat_model()
    model.config.max_position_embeddings = 8  # type: ignore[union-attr]
    with pytest.raises(UserError, match="an answer of 20 tokens, and the model reads 8"):
        TreeLM(model, tokenizer).loglikelihood([asked("So", "x" * 20)])


def test_an_empty_answer_is_certain() -> None:
    assert lm().loglikelihood([asked("A question", ""), asked("", "")]) == [(0.0, True), (0.0, True)]


def test_sampled_completions_are_drawn_by_the_place_of_their_request() -> None:
    settings = {"until": [], "do_sample": True, "temperature": 1.0, "max_gen_toks": 6}
    one, two = lm().generate_until([asked("Hello", settings), asked("Hello", settings)])
    assert one != two
    assert lm().generate_until([asked("Hello", settings), asked("Hello", settings)]) == [one, two]


def test_a_tokenizer_without_an_end() -> None:
    model, tokenizer = chat_model()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="names no end-of-text token"):
        TreeLM(model, tokenizer)


# ---- memory ----


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many texts were read, call by call."""
    calls: list[int] = []
    read = TreeLM._read

    def reading(self: TreeLM, texts: Any) -> Any:
        calls.append(len(texts))
        return read(self, texts)

    monkeypatch.setattr(TreeLM, "_read", reading)
    yield calls


def test_responses_are_remembered_by_weights_and_requests(folder: Path, counted: list[int]) -> None:
    model, tokenizer = chat_model()
    settings = Evaluate(tasks=["tiny_options", "tiny_sums"], include_path=str(folder), limit=3)
    tasks = open_tasks(settings, tokenizer)
    first = measure(model, tokenizer, tasks, settings)
    assert measure(model, tokenizer, tasks, settings) == first and len(counted) == 1
    measure(model, tokenizer, tasks, settings.model_copy(update={"limit": 4}))
    assert len(counted) == 2
    next(model.parameters()).data[0] += 1
    changed = measure(model, tokenizer, tasks, settings)
    assert len(counted) == 3 and changed[0].questions == first[0].questions


def test_an_adapter_is_another_model(folder: Path, counted: list[int]) -> None:
    model, tokenizer = chat_model()
    settings = Evaluate(tasks=["tiny_blanks"], include_path=str(folder))
    tasks, adapted = open_tasks(settings), with_lora(model)
    measure(adapted, tokenizer, tasks, settings)
    with adapted.disable_adapter():  # type: ignore[operator]
        measure(adapted, tokenizer, tasks, settings)
    measure(adapted, tokenizer, tasks, settings)
    assert len(counted) == 2


def test_the_model_is_left_as_it_was(folder: Path) -> None:
    model, tokenizer = chat_model()
    model.train()
    settings = Evaluate(tasks=["tiny_blanks", "tiny_sums"], include_path=str(folder))
    measure(model, tokenizer, open_tasks(settings), settings)
    assert model.training and model.config._attn_implementation == "sdpa"  # type: ignore[union-attr]
    assert "forward" not in vars(model.lm_head)


def test_a_plain_model_gives_the_same(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer(CHATML)
    model = family("mamba", vocab_size=len(tokenizer)).eval()
    names = ["tiny_options", "tiny_blanks"]
    with caplog.at_level(logging.WARNING):
        ours = evaluated(TreeLM(model, tokenizer), folder, names)
    assert "plain path" in caplog.text
    same(ours, evaluated(hflm(model, tokenizer), folder, names))


def test_low_precision_is_read_in_it(folder: Path) -> None:
    model, tokenizer = chat_model()
    exact = evaluated(TreeLM(model, tokenizer), folder, ["tiny_options"])
    coarse = evaluated(TreeLM(model.to(torch.bfloat16), tokenizer), folder, ["tiny_options"])
    pairs = zip(exact["samples"]["tiny_options"], coarse["samples"]["tiny_options"], strict=True)
    gaps = [abs(a[0][0] - b[0][0]) for one, other in pairs for a, b in zip(one["resps"], other["resps"], strict=True)]
    assert 1e-4 < max(gaps) < 2.0


def test_a_task_of_ones_own_file(tmp_path: Path) -> None:
    model, tokenizer = chat_model()
    rows, settings = KINDS["tiny_options"]
    own = tmp_path / "own"
    own.mkdir()
    write_task(own, "mine", rows, settings)
    chosen = Evaluate(tasks=["mine"], include_path=str(own), num_fewshot=1)
    [scores] = measure(model, tokenizer, open_tasks(chosen), chosen)
    assert (scores.task, scores.metric, scores.num_fewshot, len(scores.values)) == ("mine", "acc_norm", 1, 8)
