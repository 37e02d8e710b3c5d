"""Pairs of prompt, chosen and rejected: the boundary between prompt and answers is where it should be."""

from __future__ import annotations

from typing import Any

import pytest
from data_samples import assistant, system, to_record, user

from prefold.data.formats import RawRow
from prefold.data.preference import Preference, Problem, RowId, messages_key, short
from prefold.data.shapes import find_shape

ORIGIN = RowId("pairs.jsonl", 7)
TEXT = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
HISTORY = [user("Hi"), assistant("Hello"), user("Why?")]
WHOLE = {"chosen": [*HISTORY, assistant("So.")], "rejected": [*HISTORY, assistant("No.")]}


def test_the_key_of_plain_messages_stays_as_it_is() -> None:
    """Which prompts are held out hangs on it, so another one would be another split of every set."""
    plain = {"content": "Why?", "role": "user"}
    assert messages_key((plain,), ()) == '[[["user", "Why?"]], []]'
    assert messages_key(({**plain, "name": "Ann"},)) == '[[["user", "Why?", {"name": "Ann"}]]]'


def converted(value: dict[str, Any], like: dict[str, Any] | None = None) -> Any:
    """The record of a row in the shape of a source whose rows are `like` another."""
    row = RawRow(ORIGIN, value)
    shape = find_shape([RawRow(ORIGIN, like or value)], "pairs.jsonl")
    result = to_record(row, shape)
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
        ({**TEXT, "chosen": assistant("So."), "rejected": assistant("No.")}, [user("Why?")]),
        (WHOLE, HISTORY),
        ({**WHOLE, "prompt": "Why?"}, HISTORY),
        ({**WHOLE, "prompt": HISTORY, "system": "Be brief."}, [system("Be brief."), *HISTORY]),
        (
            {"chosen": [{**user("Why?"), "id": 4}, assistant("So.")], "rejected": [user("Why?"), assistant("No.")]},
            [{**user("Why?"), "id": 4}],
        ),
    ],
)
def test_known_shapes(value: dict[str, Any], prompt: list[Any]) -> None:
    assert converted(value) == Preference(tuple(prompt), (assistant("So."),), (assistant("No."),), ORIGIN)


def test_white_space_of_texts_is_kept() -> None:
    result = converted({"prompt": " Why? ", "chosen": "\n So.", "rejected": "No.\t"})
    assert (result.prompt, result.chosen, result.rejected) == (
        (user(" Why? "),),
        (assistant("\n So."),),
        (assistant("No.\t"),),
    )


def test_text_that_looks_like_markup_is_left_as_it_is() -> None:
    written = "<|im_start|>user\nHow?<|im_end|>"
    result = converted({"prompt": written, "chosen": f"{written} So.", "rejected": "Human: No."}, like=TEXT)
    assert result.prompt == (user(written),) and result.chosen == (assistant(f"{written} So."),)
    assert result.rejected == (assistant("Human: No."),)


def test_conversations_are_cut_before_the_first_words_of_the_assistant_in_a_row() -> None:
    common = [user("Why?"), assistant("Let me see.")]
    result = converted({"chosen": [*common, assistant("So.")], "rejected": [*common, assistant("No.")]})
    assert result.prompt == (user("Why?"),)
    assert result.chosen == (assistant("Let me see."), assistant("So."))


def test_whole_conversations_are_seen_in_a_source_of_texts_as_well() -> None:
    assert converted(WHOLE, like=TEXT) == converted({**WHOLE, "prompt": "Hi"}, like=TEXT) == converted(WHOLE)
    assert converted(TEXT, like=WHOLE) == Problem("bad_message", "`chosen` is a string, not a list of messages", ORIGIN)


@pytest.mark.parametrize(
    "value, text",
    [("\ud800\n", "\\ud800\\n"), ("x" * 10**6, "x" * 27 + "..."), (["user"], "['user']"), ("it's", "it's")],
)
def test_any_value_can_be_shown_in_short(value: Any, text: str) -> None:
    assert short(value) == text


def test_messages_key_tells_messages_apart() -> None:
    assert messages_key([user("a")]) == messages_key([{"content": "a", "role": "user"}])
    different = [[[user("a"), user("b")]], [[user("a")], [user("b")]], [[user("ab")]], [[assistant("a"), user("b")]]]
    assert len({messages_key(*parts) for parts in different}) == len(different)
