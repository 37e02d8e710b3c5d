"""Examples come back from disk as they were put there."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from data_samples import assistant, example, pair, user

from prefold.data.examples import Example, Examples
from prefold.data.preference import Message, Preference, Prompt, RowId, Unpaired
from prefold.trees.packing import TokenTree

TREE = TokenTree((1, 2), ((3,), (4, 70_000)))
WITH_CONTEXT = TokenTree((1, 2), ((3,), (4, 5, 6, 7, 8)), ((), ((1, 2), (3, 5))))
GIVEN = {"tools": [{"name": "f", "parameters": {"x": [1, 2.5, None]}}], "enable_thinking": False}
CALL: Message = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": [1]}}]}
RATED = Preference((user("é\n😀"),), (assistant("a"),), (assistant("b"),), RowId("x.jsonl", 7), ratings=(4.5, 2.0))
CALLING = Preference((user("Why?"),), (CALL, assistant("a")), (assistant("b"),), RowId("x", 1), template_kwargs=GIVEN)
UNPAIRED = Unpaired((user("Why?"),), (assistant("No."),), False, RowId("y.csv", 1))
PROMPT = Prompt((user("Why?"),), {"answer": 3, "notes": ["a", {"b": None}]}, RowId("z", 2))


@pytest.mark.parametrize(
    "given",
    [
        Example(RATED, TREE),
        Example(CALLING, WITH_CONTEXT),
        Example(UNPAIRED, TokenTree((1,), ((2, 3),), (((0, 1),),))),
        Example(replace(UNPAIRED, template_kwargs=GIVEN), TokenTree((1,), ((2, 3),))),
        Example(PROMPT, TokenTree((1, 2, 3), ())),
    ],
)
def test_every_kind_comes_back(given: Example) -> None:
    found = Examples.of([given])
    assert found[0] == given and list(found) == [given]
    assert (found.records[0], found.trees[0], found.origins[0]) == (given.record, given.tree, given.record.origin)


def test_many_are_read_in_any_order() -> None:
    given = [example(row, prompt=f"Question {row}", lengths=(row % 7 + 1, 2)) for row in range(700)]
    found = Examples.of(given)
    assert len(found) == 700 and list(found) == given
    chosen = found.select([699, 3, 256, 255])
    assert [one.record.origin.row for one in chosen] == [699, 3, 256, 255]
    assert [origin.row for origin in chosen[1:3].origins] == [3, 256]
    assert chosen.trees[-1] == given[255].tree and chosen.trees[1:3] == [given[3].tree, given[256].tree]
    with pytest.raises(IndexError):
        chosen[4]


def test_none_are_a_set_as_well() -> None:
    assert len(Examples.of([])) == 0 and list(Examples.of([]).trees) == [] and Examples.of([]).prompt_keys == []


def test_keys_are_equal_for_equal_text_and_for_nothing_else() -> None:
    found = Examples.of([example(1), example(2), example(3, chosen="Yes."), example(4, prompt="How?")])
    prompts, records = found.prompt_keys, found.record_keys
    assert prompts[0] == prompts[1] == prompts[2] != prompts[3]
    assert records[0] == records[1] and len(set(records)) == 3


def test_records_whose_template_is_given_something_else_are_not_equal() -> None:
    given = [{}, {}, {"enable_thinking": False}, {"enable_thinking": True}]
    found = Examples.of(Example(replace(pair(row=row), template_kwargs=of), TREE) for row, of in enumerate(given, 1))
    assert found.record_keys[0] == found.record_keys[1] and len(set(found.record_keys)) == 3
    assert len(set(found.prompt_keys)) == 1


def test_lengths_are_those_of_all_tokens() -> None:
    assert Examples.of([Example(pair(), WITH_CONTEXT)]).lengths == [(2, 1, 5)]


def test_values_that_json_does_not_know_become_text() -> None:
    given = Prompt((user("Why?"),), {"day": date(2024, 2, 29)}, RowId("z", 1))
    record = Examples.of([Example(given, TokenTree((1,), ()))]).records[0]
    assert isinstance(record, Prompt) and record.columns == {"day": "2024-02-29"}


def test_the_file_lives_as_long_as_its_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def broken() -> Iterator[Example]:
        yield Example(pair(), TREE)
        raise ValueError

    with pytest.raises(ValueError):
        Examples.of(broken())
    gc.collect()
    assert not any(tmp_path.iterdir())
    part = Examples.of([Example(pair(), TREE)])[:1]
    assert any(tmp_path.iterdir()) and part[0].tree == TREE
    del part
    assert not any(tmp_path.iterdir())
