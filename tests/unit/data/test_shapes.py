"""Shapes of preference data are recognised by themselves, and nothing that sits in a cell is a crash."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from data_samples import assistant, system, to_record, user

from prefold.data.formats import RawRow
from prefold.data.preference import Message, Preference, Problem, Prompt, RowId, Unpaired
from prefold.data.shapes import KINDS, Kind, Shape, find_shape
from prefold.errors import UserError

ORIGIN = RowId("rows.jsonl", 3)
ANSWERS = {"chosen": "So.", "rejected": "No."}
CHATML_PROMPT = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
TRANSCRIPT = "\n\nHuman: Hi\n\nAssistant: Hello\nto you\n\nHuman: Why?\n\nAssistant:"
OUTPUTS = {"instruction": "Why?", "output_1": "So.", "output_2": "No."}


def rows_of(*values: dict[str, Any] | None) -> list[RawRow]:
    return [RawRow(ORIGIN, value) for value in values]


def shape_of(*values: dict[str, Any], columns: Mapping[str, str] | None = None) -> Shape:
    return find_shape(rows_of(*values), "rows.jsonl", columns)


def converted(value: dict[str, Any], like: dict[str, Any] | None = None, columns: dict[str, str] | None = None) -> Any:
    """The record of a row in the shape of a source whose rows are `like` another."""
    return to_record(RawRow(ORIGIN, value), shape_of(like or value, columns=columns))


def pair(*prompt: Message, chosen: str = "So.", rejected: str = "No.") -> Preference:
    return Preference(prompt, (assistant(chosen),), (assistant(rejected),), ORIGIN)


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def refused(value: dict[str, Any], columns: dict[str, str] | None = None, kinds: tuple[Kind, ...] = KINDS) -> str:
    with pytest.raises(UserError) as caught:
        find_shape(rows_of(value), "rows.jsonl", columns, kinds)
    message = str(caught.value)
    assert max(map(len, message.split("\n"))) <= 90, message
    return message


# ---- pairs ------------------------------------------------------------------------------------------------------

PAIRS: list[tuple[str, dict[str, Any], list[Message]]] = [
    ("text", {"prompt": "Why?", **ANSWERS, "chosen-rating": 5, "rejected-rating": None}, [user("Why?")]),
    ("text", {"prompt": "Why?", **ANSWERS, "score_chosen": 9.0, "score_rejected": 1.5}, [user("Why?")]),
    ("text", {"question": "Why?", "system": "Be brief.", **ANSWERS}, [system("Be brief."), user("Why?")]),
    ("text", {"question": "Why?", "system": "", "chatgpt": "So.", "llama2-13b-chat": "No."}, [user("Why?")]),
    ("text", {"input": "Why?", **ANSWERS}, [user("Why?")]),
    ("text", {"instruction": "Explain.", "input": "Why?", **ANSWERS}, [user("Explain.\n\nWhy?")]),
    ("text", {"instruction": "Explain.", "input": "", **ANSWERS}, [user("Explain.")]),
    ("text", {"instruction": "Explain.", "input": None, **ANSWERS}, [user("Explain.")]),
    (
        "text, ChatML",
        {"prompt": CHATML_PROMPT, "chosen": "So.<|im_end|>\n", "rejected": "No.<|im_end|>\n"},
        [system("Be brief."), user("Why?")],
    ),
    (
        "text, ChatML",
        {"prompt": CHATML_PROMPT.replace("Be brief.", ""), "chosen": "So.", "rejected": "No.<|im_end|>"},
        [system(""), user("Why?")],
    ),
    ("messages", {"prompt": [user("Why?")], **ANSWERS}, [user("Why?")]),
    ("messages, ShareGPT", {"prompt": [human("Why?")], "chosen": gpt("So."), "rejected": gpt("No.")}, [user("Why?")]),
    (
        "conversations",
        {
            "source": "x",
            "prompt": "Why?",
            "question": "Why?",
            "chosen": [user("Hi"), assistant("Hello"), user("Why?"), assistant("So.")],
            "rejected": [user("Hi"), assistant("Hello"), user("Why?"), assistant("No.")],
        },
        [user("Hi"), assistant("Hello"), user("Why?")],
    ),
    (
        "conversations",
        {
            "prompt": "Why?",
            "prompt_id": "4",
            "messages": [user("Why?"), assistant("So.")],
            "chosen": [user("Why?"), assistant("So.")],
            "rejected": [user("Why?"), assistant("No.")],
            "score_chosen": 8.5,
        },
        [user("Why?")],
    ),
    (
        "conversations, ShareGPT",
        {"chosen": [human("Why?"), gpt("So.")], "rejected": [human("Why?"), gpt("No.")]},
        [user("Why?")],
    ),
    (
        "conversations, ChatML",
        {"chosen": CHATML_PROMPT + "So.<|im_end|>\n", "rejected": CHATML_PROMPT + "No.<|im_end|>\n"},
        [system("Be brief."), user("Why?")],
    ),
    (
        "turns, ShareGPT",
        {
            "conversations": [{"from": "system", "value": "Be brief."}, human("Hi"), gpt("Hello"), human("Why?")],
            "chosen": gpt("So."),
            "rejected": gpt("No."),
        },
        [system("Be brief."), user("Hi"), assistant("Hello"), user("Why?")],
    ),
    (
        "turns",
        {"messages": [user("Why?")], "chosen": assistant("So."), "rejected": assistant("No.")},
        [user("Why?")],
    ),
    (
        "conversations, transcripts",
        {"chosen": f"{TRANSCRIPT} So.", "rejected": f"{TRANSCRIPT}\nNo. "},
        [user("Hi"), assistant("Hello\nto you"), user("Why?")],
    ),
    (
        "text, transcripts",
        {"prompt": TRANSCRIPT, "chosen": " So.", "rejected": " No."},
        [user("Hi"), assistant("Hello\nto you"), user("Why?")],
    ),
    ("votes", {**OUTPUTS, "input": "", "preference": 1}, [user("Why?")]),
    ("votes", {"subset": "x", "input": "Why?", "output_1": "No.", "output_2": "So.", "label": 2}, [user("Why?")]),
    ("votes", {"instruction": "A", "input": "B", "response1": "So.", "response2": "No.", "label": 1}, [user("A\n\nB")]),
    ("votes", {"prompt": "Why?", "response_1": "No.", "response_2": "So.", "preference": 1.7}, [user("Why?")]),
]


@pytest.mark.parametrize("name, value, prompt", PAIRS, ids=range(len(PAIRS)))
def test_pairs(name: str, value: dict[str, Any], prompt: list[Message]) -> None:
    shape = shape_of(value)
    assert (shape.name, shape.kind) == (name, "pairs")
    record = to_record(RawRow(ORIGIN, value), shape)
    assert isinstance(record, Preference) and replace(record, ratings=None) == pair(*prompt)


CHATML_PAIR = {"prompt": CHATML_PROMPT, **ANSWERS}
TRANSCRIPTS = {"chosen": f"{TRANSCRIPT} So.", "rejected": f"{TRANSCRIPT} No."}
SHAREGPT_PAIR = {"conversations": [human("Why?")], "chosen": gpt("So."), "rejected": gpt("No.")}
VOTES = {**OUTPUTS, "preference": 1}
UNPAIRED = {"prompt": "Why?", "completion": "So.", "label": True}
# A source's rows, what is different in one of them, kind and message of its problem.
UNFIT: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    (CHATML_PAIR, {"prompt": "Why?"}, "bad_message", "`prompt` does not begin with `<|im_start|>`"),
    (CHATML_PAIR, {"prompt": CHATML_PROMPT[:40]}, "bad_message", "`prompt`, turn 1 does not end with its one"),
    (CHATML_PAIR, {"prompt": CHATML_PROMPT + "Well"}, "bad_message", "turn 3 does not end with its one `<|im_end|>`"),
    (CHATML_PAIR, {"prompt": "<|im_start|>tool\n4<|im_end|>"}, "bad_message", "`prompt`, turn 1 has the role `tool`"),
    (CHATML_PAIR, {"prompt": "<|im_start|>assistant\n"}, "empty_text", "`prompt` has no messages"),
    (CHATML_PAIR, {"chosen": f"A<|im_end|>\n{CHATML_PROMPT}B"}, "bad_message", "`chosen` has more than one turn"),
    (CHATML_PAIR, {"chosen": "<|im_end|>\n"}, "empty_text", "`chosen` is empty"),
    (TRANSCRIPTS, {"chosen": TRANSCRIPT}, "empty_text", "`chosen`, turn 4 is empty"),
    (TRANSCRIPTS, {"chosen": f"{TRANSCRIPT} So.\n\nHuman: Oh"}, "prompts_differ", "part before their last answers"),
    (TRANSCRIPTS, {"chosen": "\n\nHuman: How?\n\nAssistant: So."}, "prompts_differ", "do not begin with the same"),
    (TRANSCRIPTS, {"chosen": "So."}, "bad_message", "`chosen` does not begin with `Human:`"),
    (TRANSCRIPTS, {"chosen": TRANSCRIPTS["rejected"]}, "identical", "`chosen` and `rejected` are the same"),
    (TRANSCRIPTS, {"chosen": 3}, "bad_message", "`chosen` is a number, not a list of messages"),
    (
        SHAREGPT_PAIR,
        {"conversations": [human("Why?"), {"from": "narrator", "value": "4"}]},
        "bad_message",
        "`conversations`, message 2 has the role `narrator`, not one of system, user, assistant, tool",
    ),
    (SHAREGPT_PAIR, {"conversations": [human("Why?"), gpt("So")]}, "bad_message", "message of `conversations` is the"),
    (SHAREGPT_PAIR, {"conversations": [user("Why?")]}, "bad_message", "message 1 has no `from`"),
    (SHAREGPT_PAIR, {"conversations": [{"from": "human", "value": None}]}, "null_field", "`value` is null"),
    (SHAREGPT_PAIR, {"conversations": [{"from": "bard", "value": "Hi"}]}, "bad_message", "has the role `bard`"),
    (SHAREGPT_PAIR, {"conversations": "Why?"}, "bad_message", "`conversations` is a string, not a list of messages"),
    (SHAREGPT_PAIR, {"chosen": human("So.")}, "bad_message", "the answer in `chosen` has a message of the role user"),
    (SHAREGPT_PAIR, {"chosen": {"value": "So."}}, "not_text", "`chosen` is an object, not text"),
    (VOTES, {"preference": 0}, "tie", "the votes do not prefer one answer"),
    (VOTES, {"preference": 1.5}, "tie", "the votes do not prefer one answer"),
    (VOTES, {"preference": 3}, "bad_label", "`preference` is `3`, not 1 or 2 (0: a tie)"),
    (VOTES, {"preference": 0.9}, "bad_label", "`preference` is `0.9`"),
    (VOTES, {"preference": float("nan")}, "bad_label", "`preference` is `nan`"),
    (VOTES, {"preference": True}, "bad_label", "`preference` is true or false"),
    (VOTES, {"preference": "first"}, "bad_label", "`preference` is `first`"),
    (VOTES, {"preference": [1]}, "bad_label", "`preference` is a list"),
    (VOTES, {"preference": None}, "null_field", "`preference` is null"),
    (VOTES, {"output_2": "So."}, "identical", "`output_1` and `output_2` are the same"),
    (VOTES, {"output_2": " "}, "empty_text", "`output_2` is empty"),
    (VOTES, {"instruction": ""}, "empty_text", "`instruction` is empty"),
    (VOTES, {"input": ["B"]}, "not_text", "`input` is a list, not text"),
    (UNPAIRED, {"label": 2}, "bad_label", "`label` is `2`, not true or false"),
    (UNPAIRED, {"label": None}, "null_field", "`label` is null"),
    (UNPAIRED, {"completion": ""}, "empty_text", "`completion` is empty"),
    (UNPAIRED, {"completion": [user("So.")]}, "bad_message", "the answer in `completion` has a message of the role"),
    (UNPAIRED, {"prompt": [assistant("So.")]}, "bad_message", "the last message of `prompt` is the assistant's"),
    (
        {"messages": [user("Why?"), assistant("So.")], "label": True},
        {"messages": [user("Why?")]},
        "empty_text",
        "`messages` has no answer",
    ),
    (
        {"messages": [user("Why?"), assistant("So.")], "label": True},
        {"messages": [assistant("So.")]},
        "bad_message",
        "there is no prompt before the answer in `messages`",
    ),
    ({"question": "Why?"}, {"question": None}, "null_field", "`question` is null"),
    ({"question": "Why?"}, {"question": "\udc80"}, "not_text", "`question` has half a character"),
    (
        {"messages": [user("Why?")]},
        {"messages": [user("Why?"), assistant("So.")]},
        "bad_message",
        "the last message of",
    ),
]


@pytest.mark.parametrize("row, changed, kind, message", UNFIT, ids=range(len(UNFIT)))
def test_a_row_that_has_not_the_shape_of_its_source(
    row: dict[str, Any], changed: dict[str, Any], kind: str, message: str
) -> None:
    problem = converted({**row, **changed}, like=row)
    assert isinstance(problem, Problem), problem
    assert (problem.kind, problem.origin) == (kind, ORIGIN)
    assert message in problem.message and len(problem.message) <= 100


# ---- votes ------------------------------------------------------------------------------------------------------

FIRST, SECOND = pair(user("Why?")), pair(user("Why?"), chosen="No.", rejected="So.")


@pytest.mark.parametrize(
    "votes, expected",
    [
        ([1, 1, 2], FIRST),
        ([2, 0, 2], SECOND),
        ([0, 0, 2], SECOND),
        ([1, None], FIRST),
        ([1, 2, 0], "tie"),
        ([0, 0], "tie"),
        ([1, 1.2, 1.9], FIRST),
        ([1.5, 1.49], FIRST),
        (["2", "1.8", "1"], SECOND),
        ([1, 7], "bad_label"),
        ([None, None], "null_field"),
    ],
)
def test_the_majority_of_the_annotators_decides(votes: list[Any], expected: Any) -> None:
    annotated = {**OUTPUTS, **{f"annotator{place}": vote for place, vote in enumerate(votes, start=1)}}
    record = converted(annotated, like={**OUTPUTS, "annotator1": 1})
    assert getattr(record, "kind", record) == expected


def test_votes_that_count_from_0_are_refused() -> None:
    counted_from_0 = [{**OUTPUTS, "label": place % 2} for place in range(12)]
    with pytest.raises(UserError, match=r"`label` holds 0 \(6 rows\), 1 \(6\)\n    which does not say for sure"):
        shape_of(*counted_from_0)
    assert shape_of(*counted_from_0, {**OUTPUTS, "label": 2}).name == "votes"
    with pytest.raises(UserError, match=r"values: \{first: 0, second: 1\}"):
        shape_of(*counted_from_0[:2])
    assert shape_of(*[{**OUTPUTS, "annotator1": place % 2} for place in range(12)]).name == "votes"


# ---- unpaired answers and prompts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, prompt",
    [
        ("labelled text", UNPAIRED, [user("Why?")]),
        ("labelled text", {**UNPAIRED, "label": 1, "system": "Be brief."}, [system("Be brief."), user("Why?")]),
        ("labelled text", {**UNPAIRED, "label": "True"}, [user("Why?")]),
        ("labelled text", {"instruction": "A", "input": "B", "output": "So.", "kto_tag": True}, [user("A\n\nB")]),
        ("labelled text", {**UNPAIRED, "prompt": [user("Why?")], "completion": [assistant("So.")]}, [user("Why?")]),
        ("labelled messages", {"messages": [user("Why?"), assistant("So.")], "label": True}, [user("Why?")]),
        (
            "labelled messages, ShareGPT",
            {"conversations": [human("Hi"), gpt("Hello"), human("Why?"), gpt("So.")], "label": True},
            [user("Hi"), assistant("Hello"), user("Why?")],
        ),
    ],
)
def test_unpaired_answers(name: str, value: dict[str, Any], prompt: list[Message]) -> None:
    assert (shape_of(value).name, shape_of(value).kind) == (name, "unpaired")
    assert converted(value) == Unpaired(tuple(prompt), (assistant("So."),), True, ORIGIN)


def test_an_unwanted_answer() -> None:
    assert [converted({**UNPAIRED, "label": label}).label for label in (False, 0, "false", "0", True)] == [
        *[False] * 4,
        True,
    ]


@pytest.mark.parametrize(
    "name, value, prompt, columns",
    [
        ("prompts", {"question": "Why?", "answer": "So. #### 4"}, [user("Why?")], {"answer": "So. #### 4"}),
        ("prompts", {"prompt": "Why?", "completion": "So."}, [user("Why?")], {"completion": "So."}),
        ("prompts", {"prompt": [system("A"), user("Why?")], "n": [1]}, [system("A"), user("Why?")], {"n": [1]}),
        ("prompts", {"prompt": "Why?", "label": "B", "system": "A"}, [system("A"), user("Why?")], {"label": "B"}),
        ("prompts", {"instruction": "A", "input": "B", "output": "C"}, [user("A\n\nB")], {"output": "C"}),
        ("prompts", {"question": "Why?", "input": 3}, [user("Why?")], {"input": 3}),
        ("prompts, ChatML", {"prompt": CHATML_PROMPT}, [system("Be brief."), user("Why?")], {}),
        ("opening messages", {"messages": [user("Why?")], "label": 4}, [user("Why?")], {"label": 4}),
    ],
)
def test_prompts(name: str, value: dict[str, Any], prompt: list[Message], columns: dict[str, Any]) -> None:
    assert (shape_of(value).name, shape_of(value).kind) == (name, "prompts")
    assert converted(value) == Prompt(tuple(prompt), columns, ORIGIN)


def test_the_prompts_of_pairs_where_only_prompts_are_asked_for() -> None:
    row = RawRow(ORIGIN, {"prompt": "Why?", **ANSWERS})
    assert to_record(row, find_shape([row], "rows.jsonl", kinds=("prompts",))) == Prompt(
        (user("Why?"),), ANSWERS, ORIGIN
    )


# ---- recognition ------------------------------------------------------------------------------------------------


def test_a_source_has_the_shape_of_most_of_its_first_rows() -> None:
    text, turns = {"prompt": "Why?", **ANSWERS}, {"prompt": [user("Why?")], **ANSWERS}
    assert shape_of({"prompt": "Why?"}, {**text, "chosen": None}, turns, text, turns).name == "messages"
    assert shape_of(*[text] * 20, *[turns] * 30).name == "text"
    assert find_shape(rows_of(*[None] * 30, text), "rows.jsonl").name == "text"


def test_a_source_without_objects_has_no_shape() -> None:
    shape = find_shape([RawRow(ORIGIN, None, "not JSON")], "rows.jsonl", {"prompt": "question"})
    assert shape.name == "unknown"
    assert to_record(RawRow(ORIGIN, None, "not JSON"), shape) == Problem("broken_row", "not JSON", ORIGIN)
    assert to_record(RawRow(ORIGIN, {}), shape).kind == "broken_row"  # type: ignore[union-attr]


def test_a_system_column_counts_also_where_the_first_rows_have_none() -> None:
    text = {"prompt": "Why?", **ANSWERS}
    assert converted({**text, "system": "Be brief."}, like=text).prompt[0] == system("Be brief.")


def test_empty_cells_do_not_hide_the_shape() -> None:
    assert shape_of({"prompt": None, **ANSWERS}).name == "text"
    assert shape_of({"prompt": "Why?", "chosen": None, "rejected": "No."}).kind == "pairs"
    # Columns that are empty throughout come from the union of several sets.
    assert shape_of({"prompt": "Why?", "chosen": None, "rejected": None}).kind == "prompts"


def test_columns_can_be_named() -> None:
    named = {"prompt": "question", "chosen": "good", "rejected": "bad", "system": "persona"}
    value = {"prompt": "x", "question": "Why?", "good": "So.", "bad": "No.", "persona": "Be brief."}
    assert converted(value, columns=named) == pair(system("Be brief."), user("Why?"))
    missing = converted({"question": "Why?", "good": "So."}, like=value, columns=named)
    assert missing == Problem("missing_field", "`bad` is missing", ORIGIN)
    assert converted({"q": "Why?", "more": "B"}, columns={"prompt": "q", "input": "more"}).prompt == (
        user("Why?\n\nB"),
    )


@pytest.mark.parametrize(
    "columns, expected",
    [
        ({"promt": "question"}, ["rows.jsonl, `columns`: there is no role `promt`", "did you mean `prompt`?"]),
        ({"zzz": "question"}, ["there is no role `zzz`", "one of\n    prompt, chosen, rejected,"]),
        ({"prompt": "questoin"}, ["`prompt: questoin`, but there is no such column", "did you mean `question`?"]),
        ({"prompt": "zzz"}, ["no such column", "expected: `question`, `good`"]),
        ({"prompt": "good", "vote": "question"}, ["no known shape", "nearest is votes", "there is no `output_1`"]),
    ],
)
def test_named_columns_that_are_not_there(columns: dict[str, str], expected: list[str]) -> None:
    message = refused({"question": "Why?", "good": "So."}, columns)
    assert all(text in message for text in expected), message


def test_an_unknown_shape_shows_the_columns_and_the_nearest_one() -> None:
    assert refused({"text": "Why?", "chosen": "So.", "bad": "No."}) == (
        "rows.jsonl: its columns are no known shape: `text`, `chosen`, `bad`\n"
        "  expected: nearest is conversations:\n"
        "    `chosen`, `rejected`: lists of messages, prompt first\n"
        "    but there is no `rejected`\n"
        "  to do: rename its columns, or say by `columns:` which is what"
    )


@pytest.mark.parametrize(
    "value, kinds, expected",
    [
        (ANSWERS, KINDS, ["nearest is conversations", "but `chosen` is a string that does not fit"]),
        ({"prompt": 3, **ANSWERS}, KINDS, ["nearest is text", "but `prompt` is a number that does not fit"]),
        ({"question": "Why?", "answer": "So."}, ("pairs",), ["no known shape of pairs: `question`, `answer`"]),
        ({"question": "Why?"}, ("pairs", "unpaired"), ["of pairs or unpaired: ", "there is no `chosen`, `rejected`"]),
        ({"a": 1}, KINDS, ["one of", "text: strings `prompt`", "prompts: `prompt` or `question`"]),
        ({"a": 1}, ("prompts",), ["one of\n    prompts: `prompt` or `question`"]),
        ({}, KINDS, ["its rows have no columns"]),
        ({"\ud800\n": 1, "x" * 99: 2}, KINDS, ["`\\ud800\\n`, `" + "x" * 27 + "...`"]),
        (
            {"messages": [user("Why?"), assistant("So.")]},
            KINDS,
            ["`messages`", "one of the role `assistant`"],
        ),
    ],
)
def test_an_unknown_shape(value: dict[str, Any], kinds: tuple[Kind, ...], expected: list[str]) -> None:
    message = refused(value, kinds=kinds)
    assert all(text in message for text in expected), message


@pytest.mark.parametrize(
    "value, expected, way_out",
    [
        (
            {"prompt": "Why?", "question": "How?", **ANSWERS},
            [
                "    text: `prompt`, `chosen`, `rejected`\n    text: `question`, `chosen`, `rejected`\n",
                "such as {prompt: prompt}",
            ],
            {"prompt": "question"},
        ),
        (
            {**VOTES, **ANSWERS},
            ["text: `instruction`, `chosen`,", "votes: `instruction`, `output_1`, `output_2`, `preference`"],
            {"vote": "preference"},
        ),
        ({"prompt": "Why?", "messages": [user("Why?")]}, ["prompts: ", "opening messages: "], {"messages": "messages"}),
    ],
)
def test_an_ambiguous_shape(value: dict[str, Any], expected: list[str], way_out: dict[str, str]) -> None:
    message = refused(value)
    assert "can be read in more than one way" in message and all(text in message for text in expected), message
    assert set(way_out.items()) <= set(shape_of(value, columns=way_out).columns)


# ---- anything at all --------------------------------------------------------------------------------------------

COLUMNS = [
    *("prompt", "question", "instruction", "input", "system", "chosen", "rejected", "messages", "conversations"),
    *("completion", "label", "output_1", "output_2", "preference", "annotator1", "annotator2", "x" * 500, "\ud800", ""),
    *(
        "query",
        "response",
        "rejected_response",
        "history",
        "tools",
        "chat_template_kwargs",
        "images",
        "score_1",
        "score_2",
    ),
    *("response_0", "response_1", "winner", "context", "margin", "trajectory", "system_prompt", "preferred_output"),
]
TEXTS = ["", " ", "Why?", "\ud83d", "\x00", "a" * 100_000, "<|im_start|>", "<|im_end|>", CHATML_PROMPT, TRANSCRIPT]
TEXTS += ["[[]]", "{}", "[{}]", "[" * 5000, '[{"role": "user", "content": "a"}]', "['a', None]", "model_a", "A"]
TEXTS += ["<|im_start|>" * 50, "\n\nHuman:" * 50, "1", "nan", "1e999", "true", "Human:", "<|im_start|>user\n"]
NUMBERS = [0, 1, 2, 1.5, -1, 10**40, 1e308, float("nan"), float("inf")]
KEYS = ["role", "content", "from", "value", "text", ""]
SPEAKERS = ["user", "assistant", "system", "tool", "human", "gpt", ["user"], None, 3, {}]


def random_value(source: random.Random, depth: int = 0) -> Any:
    kind = source.choice("tttnbz" if depth > 2 else "tttnbzllomm")
    if kind == "l":
        return [random_value(source, depth + 1) for _ in range(source.randrange(4))]
    if kind == "o":
        return {source.choice(KEYS): random_value(source, depth + 1) for _ in range(source.randrange(4))}
    if kind == "m":
        first, second = source.choice([("role", "content"), ("from", "value"), ("role", "value")])
        content = source.choice([*TEXTS, None, 3, []])
        turn = {first: source.choice(SPEAKERS), second: content}
        return source.choice([turn, [turn], [user("Why?"), turn], [turn, assistant("So.")], [human("Why?"), turn]])
    return {"t": source.choice(TEXTS), "n": source.choice(NUMBERS), "b": source.random() < 0.5, "z": None}[kind]


SOUND_ROWS = [value for _, value, _ in PAIRS] + [row for row, *_ in UNFIT]


def random_row(source: random.Random) -> dict[str, Any]:
    """Anything in any columns, or a sound row with some of its cells exchanged."""
    if source.random() < 0.3:
        return {name: random_value(source) for name in source.sample(COLUMNS, source.randrange(len(COLUMNS)))}
    row = dict(source.choice(SOUND_ROWS))
    changed = source.sample([*row, source.choice(COLUMNS)], source.randrange(3))
    return row | {name: random_value(source) for name in changed}


def record_is_sound(record: Any) -> bool:
    """Whether a record holds what its type says, in text that can be written."""
    if isinstance(record, Problem):
        return bool(record.kind) and len(record.message) < 200 and bool(record.message.encode())
    answers = {Preference: ("chosen", "rejected"), Unpaired: ("completion",), Prompt: ()}[type(record)]
    turns = [turn for name in ("prompt", *answers) for turn in getattr(record, name)]
    written = all(set(turn) == {"role", "content"} and "".join(turn.values()).encode() for turn in turns)
    spoken = all(turn["role"] == "assistant" for name in answers for turn in getattr(record, name))
    return written and spoken and record.prompt[-1]["role"] != "assistant"


def test_whatever_sits_in_a_cell_nothing_crashes() -> None:
    source = random.Random(7)
    shapes = {shape_of(row) for row in SOUND_ROWS}
    types: set[type] = set()
    for _ in range(1000):
        row = RawRow(ORIGIN, random_row(source))
        try:
            shapes.add(find_shape([row, RawRow(ORIGIN, random_row(source))], "rows.jsonl"))
        except UserError as error:
            assert str(error).encode()
        for shape in source.sample(sorted(shapes, key=repr), 12):
            record = to_record(row, shape)
            types.add(type(record))
            assert record_is_sound(record), (record, row.value, shape)
    assert types == {Preference, Unpaired, Prompt, Problem}


def test_deep_nesting_is_no_crash() -> None:
    deep: Any = "end"
    for _ in range(5000):
        deep = [deep]
    for column in COLUMNS:
        for row, *_ in UNFIT:
            assert isinstance(converted({**row, column: deep}, like=row), Problem | Preference | Unpaired | Prompt)
    role = converted({"prompt": [{"role": deep, "content": "Why?"}], **ANSWERS}, like={"prompt": "Why?", **ANSWERS})
    assert role.kind == "bad_message"


def test_a_list_of_sentences_is_a_prompt() -> None:
    value = {"source": ["One.", " ", "Two. "], "target": ["So."], "title": "T"}
    shape = shape_of(value)
    assert (shape.name, shape.kind) == ("sentences", "prompts")
    record = to_record(RawRow(ORIGIN, value), shape)
    assert record == Prompt(({"role": "user", "content": "One. Two."},), {"target": ["So."], "title": "T"}, ORIGIN)
    for bad, kind in (("One.", "not_text"), ([" "], "empty_text"), (["One.", 2], "not_text"), (None, "null_field")):
        problem = to_record(RawRow(ORIGIN, value | {"source": bad}), shape)
        assert isinstance(problem, Problem) and problem.kind == kind, bad
    # A name of where rows are from is no prompt.
    assert shape_of({"source": "a set", "question": "Why?"}).name == "prompts"
