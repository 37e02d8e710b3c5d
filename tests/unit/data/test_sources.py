"""Files and built-in sets become rows, with the numbers a person finds them by."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from prefold.data import sources
from prefold.data.preference import RowId
from prefold.data.sources import RawRow, read_rows
from prefold.errors import UserError
from prefold.recipe import Source

Write = Callable[..., str]


def rows_of(path: str, split: str | None = None) -> list[RawRow]:
    return list(read_rows(Source(path=path, split=split)))


def test_a_row_of_json_lines_has_the_number_of_its_line(write: Write) -> None:
    path = write("pairs.jsonl", '{"a": 1}\n\n   \n{"a": 2}')
    assert rows_of(path) == [RawRow(RowId(path, 1), {"a": 1}), RawRow(RowId(path, 4), {"a": 2})]


def test_a_row_of_a_json_list_has_the_number_of_its_place(write: Write) -> None:
    path = write("pairs.json", '[{"a": 1},\n\n {"a": 2}]')
    assert [(row.origin.row, row.value) for row in rows_of(path)] == [(1, {"a": 1}), (2, {"a": 2})]


def test_the_case_of_an_ending_does_not_matter(write: Write) -> None:
    assert rows_of(write("PAIRS.JSONL", [{"a": 1}]))[0].value == {"a": 1}


@pytest.mark.parametrize("name, text", [("pairs.jsonl", '{"a": "é"}\r\n{"a": 2}\r\n'), ("pairs.json", '[{"a": "é"}]')])
def test_byte_order_mark_and_windows_line_ends_are_tolerated(write: Write, name: str, text: str) -> None:
    assert rows_of(write(name, text.encode("utf-8-sig")))[0].value == {"a": "é"}


def test_only_a_newline_ends_a_line(write: Write) -> None:
    # JSON allows these characters within a string; str.splitlines would cut there.
    text = "one\u2028two\u0085three"
    path = write("pairs.jsonl", json.dumps({"a": text}, ensure_ascii=False) + "\n")
    assert [row.value for row in rows_of(path)] == [{"a": text}]


def test_a_bad_line_does_not_stop_the_reading(write: Write) -> None:
    rows = rows_of(write("pairs.jsonl", '{"a": 1}\n{"a":\n{"a": 3}\n'))
    assert [row.value for row in rows] == [{"a": 1}, None, {"a": 3}]
    assert rows[1].problem == "not JSON: Expecting value at character 6"


def test_lines_are_read_as_they_are_asked_for(write: Write) -> None:
    reading = read_rows(Source(path=write("pairs.jsonl", b'{"a": 1}\n\xff\n')))
    assert next(reading).value == {"a": 1}
    with pytest.raises(UserError, match="byte 9"):
        next(reading)


def test_a_missing_file_is_reported_before_the_first_row_is_asked_for() -> None:
    with pytest.raises(UserError, match="no such file"):
        read_rows(Source(path="nowhere.jsonl"))


def test_the_home_folder_is_expanded_and_named_as_written(write: Write, tmp_path: Path, monkeypatch) -> None:
    write("pairs.jsonl", [{"a": 1}])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert rows_of("~/pairs.jsonl")[0].origin == RowId("~/pairs.jsonl", 1)
    with pytest.raises(UserError) as caught:
        rows_of("~/pears.jsonl")
    assert str(caught.value).startswith("~/pears.jsonl: no such file") and "`pairs.jsonl`" in str(caught.value)


def test_a_file_that_may_not_be_read(write: Write, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = write("pairs.jsonl", [{"a": 1}])
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\)"):
        rows_of(path)


@pytest.fixture
def builtin(tmp_path: Path, monkeypatch) -> None:
    for name, split in [("plain_words", "train"), ("plain_words", "held_out"), ("riddles", "train")]:
        folder = tmp_path / "builtin" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}.jsonl").write_text(json.dumps({"is": f"{name} {split}"}) + "\n")
    (tmp_path / "builtin" / "__pycache__").mkdir()
    (tmp_path / "builtin" / "README.md").touch()
    monkeypatch.setattr(sources, "BUILTIN_FOLDER", tmp_path / "builtin")


@pytest.mark.usefixtures("builtin")
def test_a_built_in_set_is_read_by_name_and_split() -> None:
    assert rows_of("builtin:plain_words") == [RawRow(RowId("builtin:plain_words", 1), {"is": "plain_words train"})]
    held_out = rows_of("builtin:plain_words", "held_out")
    assert held_out == [RawRow(RowId("builtin:plain_words (held_out)", 1), {"is": "plain_words held_out"})]


@pytest.mark.usefixtures("builtin")
@pytest.mark.parametrize(
    "path, split, expected",
    [
        (
            "builtin:plain_word",
            None,
            ["no built-in set `plain_word`", "plain_words, riddles", "did you mean `plain_words`?"],
        ),
        ("builtin:", None, ["no built-in set ``", "one of: plain_words, riddles"]),
        ("builtin:../builtin/riddles", None, ["no built-in set"]),
        ("builtin:__pycache__", None, ["no built-in set"]),
        ("builtin:plain_words", "heldout", ["no split `heldout`", "held_out, train", "did you mean `held_out`?"]),
    ],
)
def test_an_unknown_built_in_set_or_split_lists_those_there_are(
    path: str, split: str | None, expected: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        rows_of(path, split)
    assert all(text in str(caught.value) for text in expected), str(caught.value)


def test_without_any_built_in_set_the_name_is_unknown(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sources, "BUILTIN_FOLDER", tmp_path / "absent")
    with pytest.raises(UserError, match="no built-in set `plain_words`"):
        rows_of("builtin:plain_words")
