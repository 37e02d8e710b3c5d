"""Rows by their numbers are those that reading a file from its beginning gives."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from prefold.data.formats import read_file
from prefold.errors import UserError
from prefold.ui import tables
from prefold.ui.tables import Table, Written, table_of

ROWS: list[dict[str, Any]] = [{"prompt": f"Ask {i}", "chosen": "é" * i, "rejected": "\u2028no"} for i in range(30)]


def whole(path: Path) -> Table:
    table = table_of(path, path.name)
    table.is_whole.wait(10)
    return table


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: Path) -> Path:
    """A file of these rows by its name."""
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines(ROWS).encode()))
    elif path.suffix == ".csv":
        cells = [[f'"{row[name]}"' for name in ROWS[0]] for row in ROWS]
        path.write_text("\n".join(map(",".join, [list(ROWS[0]), *cells])), encoding="utf-8")
    else:
        path.write_text(json.dumps(ROWS) if path.suffix == ".json" else lines(ROWS), encoding="utf-8")
    return path


@pytest.mark.parametrize("chunk", [7, 2**23])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet", "A.JSONL"])
def test_rows_are_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, chunk: int) -> None:
    monkeypatch.setattr(tables, "CHUNK", chunk)
    path = write(tmp_path / name)
    table = whole(path)
    assert [table.row(number).value for number in range(1, len(table) + 1)] == [
        row.value for row in read_file(path, name)
    ]
    assert [row.value for row in read_file(path, name)] == ROWS


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b'{"a": 1}',
        b'{"a": 1}\n\n\n{"a": 2}\n',
        b'{"a": 1}\r\n{"a": 2}\r\n',
        b'\xef\xbb\xbf{"a": 1}\n{"a": 2}',
        b'{"a": 1}\n{"a": \n[1]\n{"a": "\xff"}\n{"b": 1}',
        b'{"a": ' + b"[" * 3000 + b"]" * 3000 + b'}\n{"a": 1}\n',
    ],
)
def test_numbers_are_those_of_lines_whatever_is_in_them(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    table = whole(path)
    read = {row.origin.row: row.value for row in read_file(path, path.name)}
    known = {number: table.row(number).value for number in range(1, len(table) + 1)}
    assert {number: value for number, value in known.items() if value is not None} == {
        number: value for number, value in read.items() if value is not None
    }
    assert len(table) == max(read, default=len(table))
    for number in set(known) - {number for number in read if read[number] is not None}:
        assert table.row(number).problem
    for number in (0, -1, len(table) + 1):
        with pytest.raises(UserError, match="there is no row"):
            table.row(number)


@pytest.mark.parametrize("chunk", [50, 2**23])
def test_rows_that_hold_a_text_are_found_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(tables, "CHUNK", chunk)
    path = tmp_path / "a.jsonl"
    rows = [{"a": "Grüße"}, {"a": "nothing"}, {"a": 'say "hi"'}, {"a": "GRü"}, {"a": "line\nbreak"}]
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=bool(i % 2)) + "\n" for i, row in enumerate(rows)), encoding="utf-8"
    )
    table = whole(path)
    assert list(table.holding("grü")) == [1, 4]
    assert list(table.holding("grü", after=1)) == [4]
    assert list(table.holding('"HI"')) == [3] and list(table.holding("line\nbreak")) == [5]
    assert list(table.holding("absent")) == []
    assert list(table.by_length) == sorted(range(1, 6), key=lambda number: (table.bytes_of(number), number))


def test_a_file_that_is_not_of_its_format_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    table = whole(tmp_path / "a.json")
    assert len(table) == 0 and "not JSON" in str(table.failed)
    (tmp_path / "a.csv").write_text("a,b\n1,2\n1,2,3\n4,5\n")
    table = whole(tmp_path / "a.csv")
    assert table.row(2).problem == "3 values for 2 columns" and table.row(3).value == {"a": "4", "b": "5"}


def test_a_conversion_that_fails_says_so(tmp_path: Path) -> None:
    """Whatever the error, also where rows were already written."""

    def convert(lines: Path) -> Written:
        lines.write_text('{"a": 1}\n')
        raise MemoryError

    table = Table("a.csv", None, convert)
    table.is_whole.wait(10)
    assert str(table.failed) == "a.csv: cannot be read (MemoryError())" and len(table) == 0


def test_a_file_that_has_changed_is_looked_at_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n')
    first = table_of(path, "a")
    assert table_of(path, "a") is first and len(first) == 1
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert len(table_of(path, "a")) == 2
