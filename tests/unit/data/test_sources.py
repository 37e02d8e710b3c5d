"""Files, built-in sets and Hub data sets become rows, with the numbers a person finds them by."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from prefold.data import sources
from prefold.data.formats import RawRow
from prefold.data.preference import RowId
from prefold.data.sources import read_rows
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


def test_a_line_in_another_encoding_does_not_stop_the_reading(write: Write) -> None:
    rows = rows_of(write("pairs.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n{"a": 3}\n'))
    assert [row.value for row in rows] == [{"a": 1}, None, {"a": 3}]
    assert rows[1].problem == "not UTF-8 at byte 11 of the line (0xe9)"


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


# ---- compressed files -------------------------------------------------------------------------------------------

LINES = b"".join(
    json.dumps({"a": place, "noise": str(random.Random(place).random())}).encode() + b"\n" for place in range(2000)
)
COMPRESSED = {
    "gz": gzip.compress(LINES),
    "bz2": bz2.compress(LINES),
    "xz": lzma.compress(LINES),
    "zst": pyarrow.compress(LINES, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("ending", COMPRESSED)
def test_compressed_files_are_read_as_they_are_asked_for(write: Write, ending: str) -> None:
    rows = rows_of(write(f"pairs.jsonl.{ending}", COMPRESSED[ending]))
    assert [row.origin.row for row in rows] == list(range(1, 2001))
    assert [row.value["a"] for row in rows if row.value] == list(range(2000))
    assert rows_of(write(f"list.JSON.{ending.upper()}", compress_like(ending, b'[{"a": 1}]')))[0].value == {"a": 1}
    assert rows_of(write(f"table.csv.{ending}", compress_like(ending, b"a\n1\n")))[0].value == {"a": "1"}


def compress_like(ending: str, content: bytes) -> bytes:
    if ending == "zst":
        return pyarrow.compress(content, codec="zstd", asbytes=True)
    return {"gz": gzip, "bz2": bz2, "xz": lzma}[ending].compress(content)


@pytest.mark.parametrize("ending", ["gz", "xz"])
def test_a_truncated_file_gives_its_rows_and_then_a_broken_one(write: Write, ending: str) -> None:
    *rows, last = rows_of(write(f"pairs.jsonl.{ending}", COMPRESSED[ending][:-5000]))
    assert len(rows) > 500
    assert [row.value["a"] for row in rows if row.value] == list(range(len(rows)))
    assert last.value is None and last.origin.row == len(rows) + 1
    assert last.problem is not None and last.problem.startswith("the file cannot be read from here on (")


def test_a_damaged_file_gives_its_rows_and_then_a_broken_one(write: Write) -> None:
    content = bytearray(COMPRESSED["gz"])
    content[-3000:-2900] = bytes(100)
    *rows, last = rows_of(write("pairs.jsonl.gz", bytes(content)))
    assert len(rows) > 500 and "cannot be read from here on" in str(last.problem)


# ---- CSV --------------------------------------------------------------------------------------------------------


def test_csv_rows_are_numbered_below_the_header(write: Write) -> None:
    path = write("pairs.csv", '\ufeffprompt,chosen\r\nWhy?,"two\r\nlines, and ""so"""\r\n\r\nHow?,\r\n')
    assert rows_of(path) == [
        RawRow(RowId(path, 1), {"prompt": "Why?", "chosen": 'two\r\nlines, and "so"'}),
        RawRow(RowId(path, 2), {"prompt": "How?", "chosen": ""}),
    ]


@pytest.mark.parametrize(
    "line, problem",
    [
        (b"one", "1 values for 2 columns"),
        (b"one,two,three", "3 values for 2 columns"),
        (b'one,"two', "not CSV: ',' expected after '\"'"),
        (b'one,"two"three', "not CSV: ',' expected after '\"'"),
        (b"one,t\0wo", "it holds a NUL byte"),
        (b"one,caf\xe9", "not UTF-8"),
    ],
)
def test_a_bad_csv_row_does_not_stop_the_reading(write: Write, line: bytes, problem: str) -> None:
    path = write("pairs.csv", b"a,b\n1,2\n" + line + b'\n3,"4, \xc3\xa9"\n5,6\n')
    rows = rows_of(path)
    assert [row.value and row.value["a"] for row in rows] == ["1", None, "3", "5"]
    assert (rows[1].origin, rows[1].problem) == (RowId(path, 2), problem)
    assert rows[2].value == {"a": "3", "b": "4, é"}


def test_a_quote_open_to_the_end_costs_one_row(write: Write) -> None:
    rows = rows_of(write("pairs.csv", 'a,b\n1,2\n3,"4\n5,6\n7,8\n'))
    assert [row.value and row.value["a"] for row in rows] == ["1", None, "5", "7"]
    assert rows[1].problem == "a quote is not closed"


# ---- Parquet ----------------------------------------------------------------------------------------------------


def write_parquet(folder: Path, table: pyarrow.Table, **options: int) -> str:
    parquet.write_table(table, folder / "pairs.parquet", **options)
    return str(folder / "pairs.parquet")


def test_parquet_rows_are_python_values(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Why?"}]
    path = write_parquet(
        tmp_path, pyarrow.table({"chosen": [talk] * 600, "rating": [4.5, None] * 300}), row_group_size=70
    )
    rows = rows_of(path)
    assert [row.origin.row for row in rows] == list(range(1, 601))
    assert rows[599].value == {"chosen": talk, "rating": None}


def test_a_text_of_parquet_that_is_not_utf8_is_one_broken_row(tmp_path: Path) -> None:
    texts = pyarrow.array([b"one", b"caf\xe9", b"three"]).view(pyarrow.string())
    rows = rows_of(write_parquet(tmp_path, pyarrow.table({"a": texts})))
    assert [row.value for row in rows] == [{"a": "one"}, None, {"a": "three"}]
    assert "utf-8" in str(rows[1].problem)


def test_a_damaged_parquet_file_gives_its_rows_and_then_a_broken_one(tmp_path: Path) -> None:
    path = Path(
        write_parquet(tmp_path, pyarrow.table({"a": [str(place) for place in range(5000)]}), row_group_size=500)
    )
    content = bytearray(path.read_bytes())
    content[20_000:24_000] = bytes(4000)
    path.write_bytes(content)
    *rows, last = rows_of(str(path))
    assert len(rows) >= 500 and [row.value for row in rows] == [{"a": str(place)} for place in range(len(rows))]
    assert (last.origin.row, last.value) == (len(rows) + 1, None)


def test_rows_are_read_as_they_are_asked_for(write: Write, tmp_path: Path) -> None:
    lines = write("pairs.jsonl", b'{"a": 1}\n' * 100_000)
    values = write("pairs.csv", b"a\n" + b"1\n" * 100_000)
    table = write_parquet(tmp_path, pyarrow.table({"a": range(100_000)}))
    for path in (lines, values, table):
        reading = read_rows(Source(path=path))
        next(reading)
        tracemalloc.start()
        for _ in range(1000):
            next(reading)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 400_000, path


# ---- folders and globs ------------------------------------------------------------------------------------------


def test_a_folder_is_its_readable_files_in_order(write: Write, tmp_path: Path) -> None:
    write("b.jsonl", [{"is": "b1"}, {"is": "b2"}])
    write("a.csv", "is\na1\n")
    write("c.jsonl", "")
    for other in ("README.md", ".hidden.jsonl"):
        write(other, "{}")
    rows = rows_of(str(tmp_path))
    assert [(Path(row.origin.source).name, row.origin.row, row.value) for row in rows] == [
        ("a.csv", 1, {"is": "a1"}),
        ("b.jsonl", 1, {"is": "b1"}),
        ("b.jsonl", 2, {"is": "b2"}),
    ]


def test_a_glob_is_the_files_that_match_in_order(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("x/2.jsonl", "x/10.jsonl", "y/z/1.jsonl", "y/other.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"a": 1}\n')
    assert [row.origin for row in rows_of("~/x/*.jsonl")] == [RowId("~/x/10.jsonl", 1), RowId("~/x/2.jsonl", 1)]
    assert [row.origin.source for row in rows_of("~/**/*.jsonl")] == ["~/x/10.jsonl", "~/x/2.jsonl", "~/y/z/1.jsonl"]
    (tmp_path / "[1].jsonl").write_text('{"a": 1}\n')
    assert rows_of("~/[1].jsonl")[0].origin.source == "~/[1].jsonl"


def test_a_folder_without_any_row_is_empty(write: Write, tmp_path: Path) -> None:
    write("a.jsonl", "")
    with pytest.raises(UserError, match="there are no rows in it"):
        rows_of(str(tmp_path))


# ---- Hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch) -> list[dict[str, object]]:
    """`org/set` is a folder with a train and a test split; the keywords of every call are kept."""
    folder = tmp_path / "hub"
    folder.mkdir()
    for split, number in (("train", 3), ("test", 2)):
        (folder / f"{split}.jsonl").write_text("".join(f'{{"is": "{split} {row}"}}\n' for row in range(number)))
    calls: list[dict[str, object]] = []
    load = datasets.load_dataset

    def load_local(path: str, name: str | None = None, **settings: object) -> object:
        calls.append({"path": path, "name": name, **settings})
        if path != "org/set":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub\nor so")
        return load(str(folder), **{**settings, "revision": None}, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    monkeypatch.chdir(tmp_path)
    return calls


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_data_set_is_read_by_split(hub: list[dict[str, object]], streaming: bool) -> None:
    rows = list(read_rows(Source(path="org/set", streaming=streaming)))
    assert rows[2] == RawRow(RowId("org/set", 3), {"is": "train 2"}) and len(rows) == 3
    rows = list(read_rows(Source(path="org/set", split="test", streaming=streaming)))
    assert [row.origin for row in rows] == [RowId("org/set (test)", 1), RowId("org/set (test)", 2)]
    rows = list(read_rows(Source(path="org/set", split="all", streaming=streaming)))
    assert [row.value["is"] for row in rows if row.value] == ["train 0", "train 1", "train 2", "test 0", "test 1"]


def test_what_the_hub_is_asked_for(hub: list[dict[str, object]]) -> None:
    source = Source(path="org/set", name="main", split="test", revision="abc123")
    assert next(read_rows(source)).origin.source == "org/set (main, test)"
    assert hub == [{"path": "org/set", "name": "main", "split": "test", "revision": "abc123", "streaming": False}]


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    "path, split, expected", [("org/sett", None, "doesn't exist on the Hub"), ("org/set", "x", "x")]
)
def test_what_the_hub_does_not_have_is_one_message(path: str, split: str | None, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        rows_of(path, split)
    assert expected in str(caught.value) and str(caught.value).startswith(path)
    assert len(str(caught.value).split("\n")) == 2


def test_a_file_goes_before_a_hub_data_set_of_that_name(hub: list[dict[str, object]], tmp_path: Path) -> None:
    (tmp_path / "org" / "set").mkdir(parents=True)
    (tmp_path / "org" / "set" / "a.jsonl").write_text('{"is": "here"}\n')
    assert [row.value for row in rows_of("org/set")] == [{"is": "here"}] and not hub


@pytest.mark.parametrize("settings", [{"name": "main"}, {"revision": "abc"}, {"streaming": True}, {"split": "test"}])
def test_a_file_has_nothing_of_a_hub_data_set(write: Write, settings: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"a file has no `{next(iter(settings))}`"):
        read_rows(Source(path=write("pairs.jsonl", [{"a": 1}]), **settings))


# ---- built-in sets ----------------------------------------------------------------------------------------------


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
