"""The token boundary: the ids are the chat template's own, cut where the answer begins."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from data_samples import assistant, pair, system, user
from tiny_tokenizer import CHATML, DEFAULT_SYSTEM, LLAMA3, NO_END, STRICT, THINKING, make_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from prefold.data.chat import Tokenized, fit, require_chat_template, tokenize_all
from prefold.data.preference import Message, Preference, Problem, Prompt, RowId, Unpaired
from prefold.errors import UserError
from prefold.files import cache_folder
from prefold.recipe import Data, Source
from prefold.trees.packing import TokenTree

ORIGIN = RowId("pairs.jsonl", 3)


def tokenize(preference: Preference, tokenizer: PreTrainedTokenizerFast) -> Tokenized | Problem:
    (result,) = tokenize_all([preference], tokenizer)
    return result


def tokenized(preference: Preference, tokenizer: PreTrainedTokenizerFast) -> Tokenized:
    result = tokenize(preference, tokenizer)
    assert isinstance(result, Tokenized), result
    return result


def texts(preference: Preference, tokenizer: PreTrainedTokenizerFast) -> tuple[str, str, str]:
    tree = tokenized(preference, tokenizer).tree
    return tuple(tokenizer.decode(ids) for ids in (tree.prompt, *tree.completions))


def data(max_length: int, overlong: str = "drop", max_prompt_length: int | None = None) -> Data:
    source = Source(path="pairs.jsonl")
    return Data(train=[source], max_length=max_length, overlong=overlong, max_prompt_length=max_prompt_length)


# ---- the boundary -----------------------------------------------------------------------------------------------


def test_chatml_default_system_once_and_newline_after_the_end_token(chatml: PreTrainedTokenizerFast) -> None:
    assert texts(pair(), chatml) == (
        f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "So.<|im_end|>\n",
        "No.<|im_end|>\n",
    )
    result = tokenized(pair(), chatml)
    assert (result.oddities, result.origin) == ((), RowId("pairs.jsonl", 1))


def test_a_system_message_takes_the_place_of_the_default_one(chatml: PreTrainedTokenizerFast) -> None:
    preference = Preference((system("Be brief."), user("Why?")), (assistant("So."),), (assistant("No."),), ORIGIN)
    prompt, _, _ = texts(preference, chatml)
    assert prompt.count("<|im_start|>system") == 1 and DEFAULT_SYSTEM not in prompt


def test_llama3_writes_one_bos_and_ends_with_its_end_token() -> None:
    tokenizer = make_tokenizer(LLAMA3, eos="<|eot|>", bos="<|begin|>")
    tree = tokenized(pair(), tokenizer).tree
    assert tree.prompt.count(tokenizer.bos_token_id) == 1 and tree.prompt[0] == tokenizer.bos_token_id
    for completion in tree.completions:
        assert completion.count(tokenizer.eos_token_id) == 1 and completion[-1] == tokenizer.eos_token_id


def test_the_end_token_need_not_be_the_tokenizers_eos() -> None:
    # Gemma ends its turns with a special token of their own.
    assert tokenized(pair(), make_tokenizer(CHATML, eos="<|text_end|>")).oddities == ()


def test_the_end_token_stays_where_padding_is_the_same_token() -> None:
    tokenizer = make_tokenizer(CHATML)
    tokenizer.pad_token = tokenizer.eos_token
    assert all(tokenizer.eos_token_id in ids for ids in tokenized(pair(), tokenizer).tree.completions)


def test_a_template_without_end_token_is_found() -> None:
    result = tokenized(pair(), make_tokenizer(NO_END))
    assert result.oddities == ("no_end_token",)


def test_an_eos_that_is_no_special_token_ends_an_answer() -> None:
    tokenizer = make_tokenizer(NO_END.replace("}}\n", "}}~\n"))
    assert tokenized(pair(), tokenizer).oddities == ("no_end_token",)
    tokenizer.eos_token = "~"
    assert tokenized(pair(), tokenizer).oddities == ()


def test_both_answers_need_an_end_token() -> None:
    for preference in (pair(chosen="So.<|im_end|>"), pair(rejected="No.<|im_end|>")):
        assert tokenized(preference, make_tokenizer(NO_END)).oddities == ("no_end_token",)


def test_a_generation_prompt_that_is_no_prefix_is_cut_to_what_is_common() -> None:
    tokenizer = make_tokenizer(THINKING)
    assert tokenized(pair(), tokenizer).oddities == ("prompt_not_prefix",)
    prompt, chosen, _ = texts(pair(), tokenizer)
    assert prompt.endswith("<|im_start|>assistant\n") and chosen == "So.<|im_end|>\n"


def test_the_shorter_common_beginning_decides_for_both(chatml: PreTrainedTokenizerFast) -> None:
    # The newline before the rejected answer melts into one token with the template's own.
    preference = pair(chosen="So.", rejected="\nNo.")
    assert tokenized(preference, chatml).oddities == ("prompt_not_prefix",)
    prompt, chosen, rejected = texts(preference, chatml)
    assert prompt.endswith("<|im_start|>assistant")
    assert (chosen, rejected) == ("\nSo.<|im_end|>\n", "\n\nNo.<|im_end|>\n")


def random_preference(draw: random.Random) -> Preference:
    def words() -> str:
        return "".join(draw.choice("ab é\n\t.漢😀<|>") for _ in range(draw.randint(1, 30))) + "x"

    history: list[Message] = [system(words())] if draw.random() < 0.5 else []
    for _ in range(draw.randint(0, 2)):
        history += [user(words()), assistant(words())]
    return Preference((*history, user(words())), (assistant(words()),), (assistant(words()),), ORIGIN)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, THINKING, NO_END])
def test_prompt_and_completion_are_the_templates_own_ids(template: str) -> None:
    draw = random.Random(0)
    tokenizer = make_tokenizer(template, bos="<|begin|>")
    for _ in range(50):
        assert_own_ids(random_preference(draw), tokenizer)


def assert_own_ids(preference: Preference, tokenizer: PreTrainedTokenizerFast) -> None:
    tree = tokenized(preference, tokenizer).tree
    for answer, completion in zip((preference.chosen, preference.rejected), tree.completions, strict=True):
        conversation: Sequence[Message] = [*preference.prompt, *answer]
        assert list(tree.prompt + completion) == tokenizer.apply_chat_template(conversation, return_dict=False)


def test_an_end_token_in_the_text_is_a_second_one(chatml: PreTrainedTokenizerFast) -> None:
    assert tokenized(pair(chosen="So.<|im_end|>"), chatml).oddities == ("double_end_token",)
    assert tokenized(pair(rejected="No.<|im_end|>\n"), chatml).oddities == ("double_end_token",)
    assert tokenized(pair(rejected="No<|im_end|>."), chatml).oddities == ()


def test_a_template_that_ends_with_two_different_tokens_is_no_double_end() -> None:
    tokenizer = make_tokenizer(CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}", eos="<|eot|>")
    assert tokenized(pair(), tokenizer).oddities == ()


def test_a_second_bos_is_found() -> None:
    assert tokenized(pair(), make_tokenizer("<|begin|>" + LLAMA3, eos="<|eot|>", bos="<|begin|>")).oddities == (
        "double_bos",
    )


def test_many_at_once_are_what_each_is_alone(chatml: PreTrainedTokenizerFast) -> None:
    draw = random.Random(1)
    records = [random_preference(draw) for _ in range(20)]
    records.insert(7, Preference((user("A"), user("B")), (assistant(""),), (assistant(""),), ORIGIN))
    assert tokenize_all(records, chatml) == [tokenize(record, chatml) for record in records]
    assert isinstance(tokenize_all(records, chatml)[7], Problem)


def test_prompts_and_unpaired_answers_are_cut_at_the_same_place(chatml: PreTrainedTokenizerFast) -> None:
    whole = tokenized(pair(), chatml).tree
    prompt = Prompt((user("Why?"),), {"answer": 3}, ORIGIN)
    unpaired = Unpaired((user("Why?"),), (assistant("No."),), False, ORIGIN)
    assert tokenize_all([prompt, unpaired], chatml) == [
        Tokenized(TokenTree(whole.prompt, ()), (), ORIGIN),
        Tokenized(TokenTree(whole.prompt, whole.completions[1:]), (), ORIGIN),
    ]


# ---- without a template -----------------------------------------------------------------------------------------


def test_bare_text_begins_with_bos_and_ends_with_eos() -> None:
    tokenizer = make_tokenizer(None, eos="<|eot|>", bos="<|begin|>", adds_bos=True)
    (result,) = tokenize_all([pair("Once upon", " a time.", " a mattress.")], tokenizer, "none")
    assert isinstance(result, Tokenized) and result.oddities == ()
    assert tokenizer.decode(result.tree.prompt) == "<|begin|>Once upon"
    assert [tokenizer.decode(ids) for ids in result.tree.completions] == [" a time.<|eot|>", " a mattress.<|eot|>"]


def test_bare_text_has_no_turns(chatml: PreTrainedTokenizerFast) -> None:
    preference = Preference((system("Be brief."), user("Why?")), (assistant("So."),), (assistant("No."),), ORIGIN)
    (result,) = tokenize_all([preference], chatml, "none")
    assert isinstance(result, Problem) and result.kind == "template_refused"


# ---- what a template refuses ------------------------------------------------------------------------------------


def test_what_the_template_refuses_is_a_problem_in_its_words() -> None:
    preference = Preference((system("Be brief."), user("Why?")), (assistant("So."),), (assistant("No."),), ORIGIN)
    message = "the chat template refuses it: no system message, please"
    assert tokenize(preference, make_tokenizer(STRICT)) == Problem("template_refused", message, ORIGIN)


@pytest.mark.parametrize(
    "template, kind",
    [
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", "template_refused"),
        ("{% for m in messages %}{{ m.content }}", "template_refused"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "template_refused"),
        ("{% for m in messages %}{{ m.role }}{{ m.content | length }}{% endfor %}", "identical"),
        ("{% if add_generation_prompt %}ask{% else %}{{ messages[-1].content }}{% endif %}", "template_refused"),
    ],
)
def test_templates_that_leave_nothing_to_learn(template: str, kind: str) -> None:
    result = tokenize(pair(), make_tokenizer(template))
    assert isinstance(result, Problem) and result.kind == kind


@pytest.mark.parametrize("template", [None, {"tool_use": CHATML}])
def test_a_tokenizer_without_chat_template(template: object) -> None:
    tokenizer = make_tokenizer(None)
    tokenizer.chat_template = template
    with pytest.raises(UserError, match="no chat template") as caught:
        require_chat_template(tokenizer)
    assert "instruct" in str(caught.value)


# ---- overlong pairs ---------------------------------------------------------------------------------------------

TREE = TokenTree((1, 2, 3, 4), ((5, 6, 7), (8, 9)))
OVERLONG = Tokenized(TREE, (), ORIGIN)


def test_what_counts_is_the_prompt_and_the_longer_completion() -> None:
    assert fit(OVERLONG, data(7)) is TREE
    assert fit(OVERLONG, data(6)) == Problem("overlong", "7 tokens, more than `max_length` 6", ORIGIN)


@pytest.mark.parametrize(
    "max_length, max_prompt_length, prompt",
    [(7, 2, (1, 2, 3, 4)), (6, None, (2, 3, 4)), (4, None, (4,)), (6, 2, (3, 4)), (6, 50, (2, 3, 4))],
)
def test_a_prompt_is_truncated_from_the_left(
    max_length: int, max_prompt_length: int | None, prompt: tuple[int]
) -> None:
    overlong = Tokenized(replace(TREE, context=(((1, 2),), ())), (), ORIGIN)
    tree = fit(overlong, data(max_length, "truncate_prompt", max_prompt_length))
    assert tree == TokenTree(prompt, TREE.completions, (((1, 2),), ()))


@pytest.mark.parametrize("max_length", [2, 3])
def test_a_completion_is_never_truncated(max_length: int) -> None:
    problem = fit(OVERLONG, data(max_length, "truncate_prompt"))
    assert isinstance(problem, Problem) and problem.kind == "overlong" and "completion of 3 tokens" in problem.message


def test_long_rows_cause_no_remark_of_transformers(caplog: pytest.LogCaptureFixture, capsys) -> None:
    tokenizer = make_tokenizer(CHATML)
    tokenizer.model_max_length = 8
    tokenized(pair(), tokenizer)
    captured = capsys.readouterr()
    assert not caplog.records and captured.out == captured.err == ""


# ---- a real tokenizer -------------------------------------------------------------------------------------------


def real_smollm2() -> Path | None:
    folders = (path.parent for path in cache_folder().rglob("tokenizer.json"))
    return next((folder for folder in folders if "smollm2" in str(folder).lower()), None)


@pytest.mark.skipif(real_smollm2() is None, reason="SmolLM2's tokenizer is not in the cache")
def test_real_smollm2() -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_smollm2())
    result = tokenized(pair("What is rain?", "Water.", "No idea."), tokenizer)
    assert result.oddities == ()
    assert tokenizer.decode(result.tree.prompt).count("<|im_start|>system") == 1
    assert [tokenizer.decode(ids) for ids in result.tree.completions] == ["Water.<|im_end|>\n", "No idea.<|im_end|>\n"]
    draw = random.Random(0)
    for _ in range(20):
        assert_own_ids(random_preference(draw), tokenizer)
