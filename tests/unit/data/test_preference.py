"""Every known shape becomes the same record; the boundary between prompt and answers is where it should be."""

from __future__ import annotations

from typing import Any

import pytest
from data_samples import assistant, system, user

from prefold.data.preference import Preference, RowId, find_shape, messages_key, shape_of, to_preference
from prefold.data.sources import RawRow
from prefold.errors import UserError

ORIGIN = RowId("pairs.jsonl", 7)
TEXT = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
HISTORY = [user("Hi"), assistant("Hello"), user("Why?")]


def converted(value: dict[str, Any]) -> Preference:
    result = to_preference(RawRow(ORIGIN, value))
    assert isinstance(result, Preference), result
    assert result.origin == ORIGIN
    return result


@pytest.mark.parametrize(
    "value, prompt",
    [
        (TEXT, [user("Why?")]),
        ({**TEXT, "score": 3, "chosen_model": None}, [user("Why?")]),
        ({**TEXT, "system": "Be brief."}, [system("Be brief."), user("Why?")]),
        ({**TEXT, "system": ""}, [user("Why?")]),
        ({**TEXT, "system": None}, [user("Why?")]),
        ({**TEXT, "prompt": HISTORY}, HISTORY),
        ({**TEXT, "prompt": HISTORY, "system": "Be brief."}, [system("Be brief."), *HISTORY]),
        (
            {**TEXT, "prompt": [system("Be brief."), user("Why?")], "system": "Be brief."},
            [system("Be brief."), user("Why?")],
        ),
        ({**TEXT, "prompt": [system(""), user("Why?")]}, [system(""), user("Why?")]),
        ({**TEXT, "prompt": HISTORY, "chosen": [assistant("So.")], "rejected": [assistant("No.")]}, HISTORY),
        ({**TEXT, "prompt": HISTORY, "chosen": [assistant("So.")]}, HISTORY),
        ({**TEXT, "chosen": [assistant("So.")], "rejected": [assistant("No.")]}, [user("Why?")]),
        ({"chosen": [*HISTORY, assistant("So.")], "rejected": [*HISTORY, assistant("No.")]}, HISTORY),
        (
            {"chosen": [{**user("Why?"), "id": 4}, assistant("So.")], "rejected": [user("Why?"), assistant("No.")]},
            [user("Why?")],
        ),
    ],
)
def test_known_shapes(value: dict[str, Any], prompt: list[Any]) -> None:
    result = converted(value)
    assert result == Preference(tuple(prompt), (assistant("So."),), (assistant("No."),), ORIGIN)


def test_white_space_of_texts_is_kept() -> None:
    result = converted({"prompt": " Why? ", "chosen": "\n So.", "rejected": "No.\t"})
    assert (result.prompt, result.chosen, result.rejected) == (
        (user(" Why? "),),
        (assistant("\n So."),),
        (assistant("No.\t"),),
    )


def test_conversations_are_cut_before_the_first_words_of_the_assistant_in_a_row() -> None:
    common = [user("Why?"), assistant("Let me see.")]
    result = converted({"chosen": [*common, assistant("So.")], "rejected": [*common, assistant("No.")]})
    assert result.prompt == (user("Why?"),)
    assert result.chosen == (assistant("Let me see."), assistant("So."))


@pytest.mark.parametrize(
    "value, shape",
    [
        (TEXT, "text"),
        ({**TEXT, "prompt": HISTORY}, "messages"),
        ({**TEXT, "chosen": [assistant("So.")]}, "messages"),
        ({"chosen": HISTORY, "rejected": HISTORY}, "conversations"),
        ({"chosen": "So.", "rejected": "No."}, None),
        ({"prompt": "Why?", "chosen": "So."}, None),
        ({}, None),
    ],
)
def test_shape_of(value: dict[str, Any], shape: str | None) -> None:
    assert shape_of(value) == shape


def test_the_shape_of_a_source_is_that_of_its_first_known_row() -> None:
    rows = [RawRow(ORIGIN, None, "not JSON"), RawRow(ORIGIN, {"prompt": "Why?"}), RawRow(ORIGIN, TEXT)]
    rows.append(RawRow(ORIGIN, {"chosen": HISTORY, "rejected": HISTORY}))
    assert find_shape(rows, "pairs.jsonl") == "text"
    assert find_shape(rows[:1], "pairs.jsonl") == "unknown"


def test_unknown_columns_are_shown_beside_the_shapes_that_are_known() -> None:
    with pytest.raises(UserError) as caught:
        find_shape([RawRow(ORIGIN, {"question": "Why?", "good": "So."}), RawRow(ORIGIN, {"bad": "No."})], "pairs.jsonl")
    assert str(caught.value) == (
        "pairs.jsonl: its columns are no known shape of pairs: `question`, `good`, `bad`\n"
        "  expected: one of\n"
        "    text: strings `prompt`, `chosen`, `rejected` (and `system`)\n"
        "    messages: `prompt`: list of {role, content}; answers: text or list\n"
        "    conversations: `chosen`, `rejected`: lists of messages, prompt first\n"
        "  to do: rename or complete its columns"
    )


def test_odd_column_names_can_be_shown() -> None:
    with pytest.raises(UserError) as caught:
        find_shape([RawRow(ORIGIN, {"\ud800\n": 1, "x" * 99: 2})], "pairs.jsonl")
    assert "`\\ud800\\n`" in str(caught.value) and "x" * 31 not in str(caught.value)


def test_messages_key_tells_messages_apart() -> None:
    assert messages_key([user("a")]) == messages_key([{"content": "a", "role": "user"}])
    different = [[[user("a"), user("b")]], [[user("a")], [user("b")]], [[user("ab")]], [[assistant("a"), user("b")]]]
    assert len({messages_key(*parts) for parts in different}) == len(different)
