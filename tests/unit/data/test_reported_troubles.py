"""Troubles with preference data that users of other tools reported, by project and issue number; none is one here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from data_samples import assistant, system, text_rows, user
from tiny_tokenizer import CHATML, DEFAULT_SYSTEM, LLAMA3, STRICT, THINKING, make_tokenizer
from transformers import PreTrainedTokenizerFast

from prefold.data.chat import Tokenized, fit
from prefold.data.mixture import Prepared, load_split
from prefold.data.preference import Message, Preference, Problem, Prompt, RowId
from prefold.errors import UserError
from prefold.recipe import Benchmark, Data, Source
from prefold.trees.packing import TokenTree, pack

Write = Callable[..., str]
ROW = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
ORIGIN = RowId("pairs.jsonl", 1)
# Writes the answer without its thought, and asks for one.
FORGETFUL = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content.split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
ALTERNATING = (
    "{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "[{{ message.role }}] {{ message.content }}<|im_end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def load(write: Write, chatml: PreTrainedTokenizerFast) -> Callable[..., Prepared]:
    """Rows in a file, as they come to be trained on."""

    def load_rows(
        rows: Sequence[dict[str, Any]],
        tokenizer: PreTrainedTokenizerFast = chatml,
        kind: Any = "pairs",
        columns: dict[str, str] | None = None,
        **settings: Any,
    ) -> Prepared:
        source = Source(path=write("pairs.jsonl", list(rows)), columns=columns)
        return load_split(Data(train=[source], **settings), tokenizer, seed=1, kind=kind)

    return load_rows


def found(prepared: Prepared) -> dict[str, list[int]]:
    return {finding.kind: [row.row for row in finding.rows] for finding in prepared.report.findings}


def texts(prepared: Prepared, tokenizer: PreTrainedTokenizerFast, place: int = 0) -> list[str]:
    """Prompt and completions of an example as they are trained on."""
    tree = prepared.train[place].tree
    return [tokenizer.decode(ids) for ids in (tree.prompt, *tree.completions)]


def whole(prepared: Prepared) -> Iterator[tuple[int, ...]]:
    """Prompt and completion of every example, as the model reads them."""
    for tree in prepared.train.trees:
        yield from (tree.prompt + completion for completion in tree.completions)


# ---- the token boundary -----------------------------------------------------------------------------------------


def test_trl_1930_default_system_prompt_once(load: Callable[..., Prepared], chatml: PreTrainedTokenizerFast) -> None:
    prepared = load([ROW, ROW | {"system": "Be brief."}, ROW | {"prompt": [user("Why?")]}])
    decoded = [chatml.decode(ids) for ids in whole(prepared)]
    assert [text.count(DEFAULT_SYSTEM) for text in decoded] == [1, 1, 0, 0, 1, 1]
    assert [text.count("<|im_start|>system") for text in decoded] == [1] * 6


def test_trl_1640_the_template_is_applied_to_bare_text(
    load: Callable[..., Prepared], chatml: PreTrainedTokenizerFast
) -> None:
    conversation: list[Message] = [user("Why?"), assistant("So.")]
    assert next(whole(load([ROW]))) == tuple(chatml.apply_chat_template(conversation, return_dict=False))


def test_trl_2385_the_template_is_not_applied_twice(
    load: Callable[..., Prepared], chatml: PreTrainedTokenizerFast
) -> None:
    written = ROW | {"prompt": "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", "chosen": "So.<|im_end|>\n"}
    assert list(whole(load([written]))) == list(whole(load([ROW])))


def test_axolotl_1616_one_bos(load: Callable[..., Prepared]) -> None:
    tokenizer = make_tokenizer(LLAMA3, eos="<|eot|>", bos="<|begin|>", adds_bos=True)
    for ids in whole(load([ROW, ROW | {"system": "Be brief."}], tokenizer)):
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_axolotl_1616_one_bos_without_a_template(load: Callable[..., Prepared]) -> None:
    tokenizer = make_tokenizer(None, eos="<|eot|>", bos="<|begin|>", adds_bos=True)
    for ids in whole(load([ROW], tokenizer, template="none")):
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_axolotl_1616_two_bos_of_the_data_are_found(load: Callable[..., Prepared]) -> None:
    tokenizer = make_tokenizer("{{ bos_token }}" + LLAMA3, eos="<|eot|>", bos="<|begin|>")
    assert found(load([ROW], tokenizer))["double_bos"] == [1]


def test_trl_1885_no_none_token(load: Callable[..., Prepared]) -> None:
    tokenizer = make_tokenizer(CHATML, bos=None)
    assert tokenizer.bos_token_id is None
    for ids in whole(load([ROW], tokenizer)):
        assert all(type(token) is int for token in ids)
    assert "None" not in "".join(texts(load([ROW], tokenizer), tokenizer))


def test_trl_6105_the_prompt_is_its_ids_and_not_a_dictionary(load: Callable[..., Prepared]) -> None:
    tokenizer = make_tokenizer(CHATML)
    as_dict = tokenizer.apply_chat_template([user("Why?")], add_generation_prompt=True, return_dict=True)
    assert list(load([ROW], tokenizer).train[0].tree.prompt) == as_dict["input_ids"]


def test_unsloth_3228_one_end_token(load: Callable[..., Prepared], chatml: PreTrainedTokenizerFast) -> None:
    prepared = load([ROW])
    assert [ids.count(chatml.eos_token_id) for ids in prepared.train[0].tree.completions] == [1, 1]
    assert "double_end_token" not in found(prepared)


def test_unsloth_3228_an_end_token_in_the_data_is_found(load: Callable[..., Prepared]) -> None:
    prepared = load([ROW, ROW | {"chosen": "So.<|im_end|>"}, ROW | {"rejected": "No.<|im_end|>\n"}])
    assert found(prepared)["double_end_token"] == found(prepared)["template_residue"] == [2, 3]


def test_trl_1239_end_token_is_trained_on_though_pad_is_eos(load: Callable[..., Prepared]) -> None:
    tokenizer = make_tokenizer(CHATML)
    tokenizer.pad_token = tokenizer.eos_token
    row = pack(load([ROW, ROW | {"prompt": "How?"}], tokenizer).train.trees)
    assert row.targets.tolist().count(tokenizer.eos_token_id) == 4


def test_trl_1025_end_token_is_trained_on_without_a_template(load: Callable[..., Prepared]) -> None:
    tokenizer = make_tokenizer(None)
    tokenizer.pad_token = tokenizer.eos_token
    completions = load([ROW], tokenizer, template="none").train[0].tree.completions
    assert [ids[-1] for ids in completions] == [tokenizer.eos_token_id] * 2


def test_trl_5213_thinking_template(load: Callable[..., Prepared]) -> None:
    tokenizer = make_tokenizer(THINKING)
    prepared = load([ROW, ROW], tokenizer)
    assert found(prepared)["prompt_not_prefix"] == [1, 2]
    prompt, *completions = texts(prepared, tokenizer)
    assert prompt.endswith("<|im_start|>assistant\n") and completions == ["So.<|im_end|>\n", "No.<|im_end|>\n"]


def test_trl_3522_a_template_that_forgets_thoughts(load: Callable[..., Prepared]) -> None:
    tokenizer = make_tokenizer(FORGETFUL)
    thought = {"chosen": "<think>\nHm.</think>So.", "rejected": "<think>\nHm.</think>No."}
    prepared = load([ROW | thought], tokenizer)
    assert texts(prepared, tokenizer)[1:] == ["So.<|im_end|>\n", "No.<|im_end|>\n"]
    assert found(prepared)["prompt_not_prefix"] == [1]


def test_trl_3490_answers_that_differ_in_forgotten_thoughts_alone(load: Callable[..., Prepared]) -> None:
    forgotten = {"chosen": "<think>Hm.</think>So.", "rejected": "<think>Oh.</think>So."}
    prepared = load([ROW, ROW | forgotten], make_tokenizer(FORGETFUL))
    assert found(prepared)["identical"] == [2] and len(prepared.train) == 1


# ---- length -----------------------------------------------------------------------------------------------------


def sized(prompt: int, chosen: int, rejected: int) -> Tokenized:
    tree = TokenTree(tuple(range(prompt)), (tuple(range(chosen)), tuple(range(rejected))))
    return Tokenized(tree, (), ORIGIN)


@pytest.mark.parametrize(
    "sizes, max_length, prompt",
    [((200, 900, 300), 1024, 124), ((600, 500, 400), 1024, 524), ((100, 900, 24), 1024, 100), ((20, 2047, 1), 2048, 1)],
)
def test_trl_6548_truncation_keeps_completions_whole(sizes: tuple[int, int, int], max_length: int, prompt: int) -> None:
    given = sized(*sizes)
    data = Data(train=[Source(path="unused")], max_length=max_length, overlong="truncate_prompt")
    tree = fit(given, data)
    assert isinstance(tree, TokenTree) and tree.longest <= max_length
    assert tree.completions == given.tree.completions
    assert tree.prompt == given.tree.prompt[-prompt:]


@pytest.mark.parametrize("policy", ["drop", "truncate_prompt"])
def test_trl_6548_no_completion_is_cut_to_nothing(policy: str) -> None:
    data = Data(train=[Source(path="unused")], max_length=2048, overlong=policy)
    problem = fit(sized(20, 5000, 600), data)
    assert isinstance(problem, Problem) and problem.kind == "overlong"


@pytest.mark.parametrize("policy", ["drop", "truncate_prompt"])
def test_trl_5697_long_completions_are_left_out_and_counted_and_never_cut(
    load: Callable[..., Prepared], chatml: PreTrainedTokenizerFast, policy: str
) -> None:
    long = [ROW | {"prompt": f"Why {place}?", "chosen": "So. " * 300} for place in range(30)]
    prepared = load([ROW, *long], overlong=policy)
    (finding,) = (finding for finding in prepared.report.findings if finding.kind == "overlong")
    assert (finding.severity, finding.count) == ("warning", 30) and "`data.max_length`" in finding.advice
    assert [ids[-2] for ids in whole(prepared)] == [chatml.eos_token_id] * 2


# ---- messages and columns ---------------------------------------------------------------------------------------


def test_alignment_handbook_93_roles_that_must_alternate_are_a_finding(load: Callable[..., Prepared]) -> None:
    twice = ROW | {"prompt": [user("Why?"), user("Well?")]}
    prepared = load([ROW, twice, ROW | {"system": "Be brief."}], make_tokenizer(ALTERNATING))
    assert found(prepared)["template_refused"] == [2, 3] and len(prepared.train) == 1


def test_alignment_handbook_93_a_template_without_system_messages(load: Callable[..., Prepared]) -> None:
    with pytest.raises(UserError, match="no system message, please"):
        load([ROW | {"system": "Be brief."}], make_tokenizer(STRICT))


def test_axolotl_3217_tool_role(load: Callable[..., Prepared]) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    tools = ROW | {"prompt": [user("Why?"), call, {"role": "tool", "content": "7"}, user("So?")]}
    prepared = load([ROW, tools])
    # The template of these tests writes no calls.
    assert found(prepared)["template_refused"] == [2] and len(prepared.train) == 1
    assert "does not write a tool call whole" in next(
        each.message for each in prepared.report.findings if each.kind == "template_refused"
    )


def test_axolotl_2415_extra_columns(load: Callable[..., Prepared]) -> None:
    extra = {"id": 7, "source": None, "tags": ["a"], "meta": {"messages": []}, "tools": [{}], "images": [], "label": 1}
    assert list(whole(load([ROW | extra]))) == list(whole(load([ROW])))
    talk = {"chosen": [user("Why?"), assistant("So.")], "rejected": [user("Why?"), assistant("No.")]}
    assert list(whole(load([talk | extra]))) == list(whole(load([ROW])))


def test_axolotl_1417_columns_of_other_names(load: Callable[..., Prepared]) -> None:
    mine = {"ask": "Why?", "good": "So.", "bad": "No."}
    prepared = load([mine], columns={"prompt": "ask", "chosen": "good", "rejected": "bad"})
    assert list(whole(prepared)) == list(whole(load([ROW])))


def test_axolotl_2645_a_column_that_is_not_there_is_not_ignored(load: Callable[..., Prepared]) -> None:
    with pytest.raises(UserError, match="there is no such column") as caught:
        load([ROW], columns={"prompt": "promt"})
    assert "did you mean `prompt`?" in str(caught.value)


def test_axolotl_2986_prompts_need_no_chosen_column(load: Callable[..., Prepared]) -> None:
    prepared = load([{"question": "Why?", "answer": "42"}], kind="prompts")
    record = prepared.train[0].record
    assert isinstance(record, Prompt) and record.columns == {"answer": "42"}
    assert prepared.train[0].tree.completions == ()


def test_axolotl_3269_prompts_of_pairs_and_prompts_as_pairs(load: Callable[..., Prepared]) -> None:
    assert isinstance(load([ROW], kind="prompts").train[0].record, Prompt)
    with pytest.raises(UserError, match="no known shape of pairs"):
        load([{"question": "Why?", "answer": "42"}], kind="pairs")


def test_course_1167_a_model_without_a_template(load: Callable[..., Prepared]) -> None:
    with pytest.raises(UserError, match="no chat template"):
        load([ROW], make_tokenizer(None))
    assert len(load([ROW], make_tokenizer(None), template="none").train) == 1


def test_llm_course_51_control_tokens_of_another_template_are_found(load: Callable[..., Prepared]) -> None:
    leaks = ["[INST] Why? [/INST]", "<<SYS>>\nBe brief.\n<</SYS>> Why?", "Why?</s>", "Why?<|eot_id|>", "Why?<|end|>"]
    prepared = load([ROW, *(ROW | {"prompt": leak} for leak in leaks)])
    assert found(prepared)["template_residue"] == [2, 3, 4, 5, 6] and len(prepared.train) == 6


def test_llm_course_51_system_messages_stay_one_turn(
    load: Callable[..., Prepared], chatml: PreTrainedTokenizerFast
) -> None:
    prompt = [system("Be brief."), user("Why?"), assistant("Hm."), user("Well?")]
    (text, *_) = texts(load([ROW | {"prompt": prompt}]), chatml)
    assert text.count("Be brief.") == 1 and text.count("<|im_start|>") == 5


# ---- what is learned --------------------------------------------------------------------------------------------


def test_notus_10_contamination(load: Callable[..., Prepared], write: Write) -> None:
    question = "What happens to you if you eat watermelon seeds while standing on your head at midnight?"
    benchmark = Benchmark(path=write("test.jsonl", [{"question": question}]), column="question")
    rows = [ROW, ROW | {"prompt": f"Tell me: {question.upper()}"}, ROW | {"rejected": question}]
    prepared = load(rows, decontaminate=[benchmark])
    assert found(prepared)["contaminated"] == [2, 3] and len(prepared.train) == 1
    assert [match.benchmark.row for match in prepared.report.contamination] == [1, 1]


def test_gradients_1344_pairs_told_apart_by_their_first_words(load: Callable[..., Prepared]) -> None:
    rows = [row | {"rejected": "Sorry, " + row["rejected"]} for row in text_rows(60)]
    (finding,) = (one for one in load(rows).report.findings if one.kind == "telling_opening")
    assert finding.severity == "warning" and finding.count >= 60


def test_gradients_1151_pairs_that_contradict_each_other(load: Callable[..., Prepared]) -> None:
    rows = text_rows(3)
    turned = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    assert found(load(rows + turned))["contradiction"] == [1, 2, 3, 4, 5, 6]


def test_trl_4023_pairs_without_a_difference_are_left_out(load: Callable[..., Prepared]) -> None:
    prepared = load([ROW, ROW | {"rejected": "So."}, ROW | {"rejected": "So. "}])
    assert found(prepared)["identical"] == [2, 3] and len(prepared.train) == 1


def test_every_pair_keeps_both_sides(load: Callable[..., Prepared]) -> None:
    for record in load(text_rows(20)).train.records:
        assert isinstance(record, Preference)
        assert record.chosen[0]["content"].replace("Good", "Bad") == record.rejected[0]["content"]
