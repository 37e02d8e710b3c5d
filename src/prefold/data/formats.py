"""One file -> rows, by its ending: JSON lines, a JSON list, CSV, Parquet; all but the last may be compressed.

Data in: a file's bytes as a stream; data out: an iterator of `RawRow` (only a JSON list is read whole). A row that
cannot be parsed becomes a row with a problem, since the next one may be sound. A file that cannot be read to its end
ends with such a row; a file of which no row can be read is a `UserError`.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import PurePath
from typing import IO, Any

from prefold.data.preference import RowId
from prefold.errors import UserError, json_type

_BATCH_ROWS = 256
_SURROGATES = range(0xDC80, 0xDD00)
"""The code points that `surrogateescape` makes of bytes that are not UTF-8."""


@dataclass(frozen=True)
class RawRow:
    """One row as it was read: `value` is an object, or None, and then `problem` says why.

    `pads_with_nulls`: the source writes null for fields of objects that only other rows have, as Arrow does. `kind`:
    of a finding that counts the row beside any others; of a row with a problem, the kind of the problem, `broken_row`
    if empty.
    """

    origin: RowId
    value: dict[str, Any] | None
    problem: str | None = None
    pads_with_nulls: bool = field(default=False, compare=False)
    kind: str = ""


Reader = Callable[[IO[bytes], str], Iterator[RawRow]]


def reader_for(file_name: str) -> Reader | None:
    """The reader of files of this name; None if there is none."""
    *before, ending = ["", *PurePath(file_name.lower()).suffixes]
    if ending in _DECOMPRESSED and before[-1] != ".parquet":
        ending = before[-1]
    return _READERS.get(ending)


def read_file(file: Traversable, name: str) -> Iterator[RawRow]:
    """The rows of a file that `reader_for` has a reader for; `name` is the source in their origins. Raises UserError:
    the file cannot be read, or is not in its format."""
    reader, rows = reader_for(file.name), 0
    assert reader is not None, file.name
    try:
        with file.open("rb") as raw:
            decompressed = _DECOMPRESSED.get(PurePath(file.name.lower()).suffix, lambda stream: stream)
            for row in reader(decompressed(raw), name):
                rows = row.origin.row
                yield row
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).partition("\n")[0][:60]
        if not rows:
            raise UserError(f"cannot be read ({reason})", where=name) from None
        yield RawRow(RowId(name, rows + 1), None, f"the file cannot be read from here on ({reason})")


def _json_lines(stream: IO[bytes], name: str) -> Iterator[RawRow]:
    """A row's number is that of its line, so that an editor finds it."""
    # Split at \n only: text mode would also split at characters that JSON allows within a string.
    for number, line in enumerate(_lines(stream, name), start=1):
        if line.strip():
            yield _json_line(line, RowId(name, number))


def _lines(stream: IO[bytes], name: str) -> Iterator[bytes]:
    for index, line in enumerate(stream):
        yield line if index else _without_byte_order_mark(line, name)


def _json_line(line: bytes, origin: RowId) -> RawRow:
    try:
        return _object(json.loads(line.decode("utf-8").strip()), origin)
    except UnicodeDecodeError as error:
        return RawRow(origin, None, f"not UTF-8 at byte {error.start + 1} of the line (0x{line[error.start]:02x})")
    except json.JSONDecodeError as error:
        return RawRow(origin, None, f"not JSON: {error.msg} at character {error.pos + 1}")
    except RecursionError:
        return RawRow(origin, None, "not JSON that can be read: nested too deeply")
    except ValueError:
        return RawRow(origin, None, "not JSON that can be read: a number has too many digits")


def _object(value: Any, origin: RowId) -> RawRow:
    if isinstance(value, dict):
        return RawRow(origin, value)
    return RawRow(origin, None, f"not a JSON object but {json_type(value)}")


def _json_list(stream: IO[bytes], name: str) -> Iterator[RawRow]:
    content = _without_byte_order_mark(stream.read(), name)
    try:
        text = content.decode("utf-8")
        values = json.loads(text) if text.strip() else []
    except UnicodeDecodeError as error:
        raise _not_utf8(f"at byte {error.start} (0x{content[error.start]:02x})", name) from None
    except json.JSONDecodeError as error:
        several_documents = error.msg == "Extra data"
        raise UserError(
            f"not JSON: {error.msg}",
            where=f"{name}, line {error.lineno}, column {error.colno}",
            expected="one list of objects: [{...}, {...}]",
            advice="if it has one object a line, let its name end in .jsonl" if several_documents else "",
        ) from None
    except (ValueError, RecursionError):
        raise UserError("JSON nested too deeply, or a number with too many digits", where=name) from None
    if not isinstance(values, list):
        advice = "put the rows in one list, or write a .jsonl file"
        what, expected = f"the file holds {json_type(values)}", "a list of objects: [{...}, {...}]"
        raise UserError(what, where=name, expected=expected, advice=advice)
    for number, value in enumerate(values, start=1):
        yield _object(value, RowId(name, number))


def _csv(stream: IO[bytes], name: str) -> Iterator[RawRow]:
    """Every value is text; the first record names the columns, and row 1 is the one below it."""
    records = _records(line.decode("utf-8", "surrogateescape") for line in _lines(stream, name))
    columns, problem = next(records, ([], None))
    if not problem and len(set(columns)) < len(columns):
        problem = "a column is named twice"
    if problem:
        raise UserError(f"its first line does not name the columns: {problem}", where=name)
    for number, (values, problem) in enumerate(records, start=1):
        if not problem and len(values) != len(columns):
            problem = f"{len(values)} values for {len(columns)} columns"
        value = None if problem else dict(zip(columns, values, strict=True))
        yield RawRow(RowId(name, number), value, problem)


def _records(lines: Iterator[str]) -> Iterator[tuple[list[str], str | None]]:
    """The values of each record, and what is wrong with it. After a record that cannot be parsed, reading resumes at
    its second line: an open quote takes in all lines up to the next quote, and those may be good records."""
    pushed_back: deque[str] = deque()

    def next_lines(taken: list[str]) -> Iterator[str]:
        while (line := pushed_back.popleft() if pushed_back else next(lines, None)) is not None:
            taken.append(line)
            yield line

    record: list[str] | None = []
    while record is not None:
        taken: list[str] = []
        try:
            record = next(csv.reader(next_lines(taken), strict=True), None)
        except csv.Error as error:
            pushed_back.extendleft(reversed(taken[1:]))
            yield [], _CSV_PROBLEMS.get(str(error), f"not CSV: {error}")
            continue
        text = "".join(record or ())
        if "\0" in text:
            yield [], "it holds a NUL byte"
        elif not text.isascii() and any(ord(character) in _SURROGATES for character in text):
            yield [], "not UTF-8"
        elif record:
            yield record, None


_CSV_PROBLEMS = {
    "unexpected end of data": "a quote is not closed",
    f"field larger than field limit ({csv.field_size_limit()})": (
        f"a quote is not closed, or a value has more than {csv.field_size_limit()} characters"
    ),
}


def _parquet(stream: IO[bytes], name: str) -> Iterator[RawRow]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(stream).iter_batches(batch_size=_BATCH_ROWS):
            for value in _python_values(batch):
                number += 1
                if isinstance(value, Exception):
                    yield RawRow(RowId(name, number), None, f"a value cannot be read: {value}")
                else:
                    yield RawRow(RowId(name, number), value, pads_with_nulls=True)
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from None


def _python_values(batch: Any) -> list[dict[str, Any] | Exception]:
    """The rows of a record batch; an exception in place of a row that has no Python value."""
    try:
        rows: list[dict[str, Any] | Exception] = batch.to_pylist()
        return rows
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            return [error]
        return [row for index in range(batch.num_rows) for row in _python_values(batch.slice(index, 1))]


def _zstd(raw: IO[bytes]) -> IO[bytes]:
    import pyarrow

    # A read that fails returns nothing, so a small buffer loses the fewest rows before the end of a truncated file.
    return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), buffer_size=256)


def _without_byte_order_mark(content: bytes, name: str) -> bytes:
    """A file's bytes from its start, without a UTF-8 byte order mark. Raises UserError: they seem to be UTF-16."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise _not_utf8("but, it seems, UTF-16", name)
    return content.removeprefix(codecs.BOM_UTF8)


def _not_utf8(how: str, name: str) -> UserError:
    return UserError(f"not UTF-8 {how}", where=name, advice="convert the file to UTF-8")


_READERS: dict[str, Reader] = {".jsonl": _json_lines, ".json": _json_list, ".csv": _csv, ".parquet": _parquet}
_DECOMPRESSED: dict[str, Callable[[Any], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}
READABLE = ".jsonl, .json, .csv or .parquet, the first three also compressed"
