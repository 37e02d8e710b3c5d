"""Rows by number: only the rows on the screen are read.

A .jsonl file is read in place, by the byte offsets of its lines; any other file, or a data set of the Hub, is first
converted to a temporary one. Lines are indexed in a thread, and those indexed so far can be read.
"""

from __future__ import annotations

import codecs
import json
import tempfile
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefold.data.formats import RawRow, read_file
from prefold.data.preference import RowId
from prefold.errors import UserError
from prefold.ui.worker import checker

CHUNK = 2**20
"""Bytes that are read at once. The memory of larger ones goes back to the system each time, which costs a sixth of a
search."""
SOON = 0.12
"""Seconds to wait for the index of a new table, before it is used as far as it goes."""


class Written(NamedTuple):
    """Facts about converted rows. `problems`: what is wrong with those that cannot be read; `pads_with_nulls`: whether
    fields that only other rows have are null."""

    problems: dict[int, str]
    pads_with_nulls: bool = False


def write_out(rows: Iterable[RawRow], lines: Path) -> Written:
    """Write every row as JSON on the line with the row's number, and an empty line for one that cannot be read."""
    number, problems, pads = 1, {}, False
    with lines.open("wb") as opened:
        for row in rows:
            text = "" if row.value is None else json.dumps(row.value, ensure_ascii=False, default=str)
            opened.write(b"\n" * (row.origin.row - number) + text.encode("utf-8", "surrogatepass") + b"\n")
            number, pads = row.origin.row + 1, pads or row.pads_with_nulls
            if row.problem:
                problems[row.origin.row] = row.problem
    return Written(problems, pads)


class Table:
    """The rows of a .jsonl file, or of a temporary one that `write` fills; their ids name the source `name`."""

    def __init__(self, name: str, lines: Path | None, write: Callable[[Path], Written] | None = None):
        self.name, self.facts, self.temporary = name, Written({}), None
        if lines is None:
            self.temporary = tempfile.NamedTemporaryFile(prefix="prefold-")  # noqa: SIM115
            weakref.finalize(self, self.temporary.close)  # which removes it
        self.lines = lines or Path(self.temporary.name)  # type: ignore[union-attr]
        self.ends: list[NDArray[np.int64]] = []
        self.failed: UserError | None = None
        self.is_whole = Event()
        Thread(target=self._index, args=(write,), daemon=True).start()
        self.is_whole.wait(SOON)

    def _index(self, write: Callable[[Path], Written] | None) -> None:
        try:
            if write:
                self.facts = write(self.lines)
            self._find_ends()
        except UserError as error:
            self.failed = error
        except Exception as error:  # in a thread, which nobody else hears of
            reason = getattr(error, "strerror", None) or repr(error)
            self.failed = UserError(f"cannot be read ({reason})", where=self.name)
        finally:
            self.is_whole.set()

    def _find_ends(self) -> None:
        offset, ended = 0, True
        with self.lines.open("rb") as opened:
            while chunk := opened.read(CHUNK):
                self.ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + offset + 1)
                offset, ended = offset + len(chunk), chunk.endswith(b"\n")
        if not ended:
            self.ends.append(np.array([offset]))

    @property
    def bounds(self) -> NDArray[np.int64]:
        """Byte offsets of the start of the first line and of the end of each line indexed so far, `[lines + 1]`."""
        return self._all_bounds if self.is_whole.is_set() else np.concatenate([[0], *self.ends]).astype(np.int64)

    @cached_property
    def _all_bounds(self) -> NDArray[np.int64]:
        return np.concatenate([[0], *self.ends]).astype(np.int64)

    def __len__(self) -> int:
        """Rows indexed so far."""
        return len(self.bounds) - 1

    def row(self, number: int) -> RawRow:
        """Raises UserError: there is no such row."""
        bounds = self.bounds
        if not 1 <= number < len(bounds):
            raise UserError(f"there is no row {number}", where=self.name, expected=f"1 to {len(bounds) - 1}")
        with self.lines.open("rb") as opened:
            opened.seek(int(bounds[number - 1]))
            line = opened.read(int(bounds[number] - bounds[number - 1]))
        origin = RowId(self.name, number)
        if number in self.facts.problems:
            return RawRow(origin, None, self.facts.problems[number])
        try:
            value = json.loads(
                line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode("utf-8", "surrogatepass")
            )
        except (ValueError, RecursionError) as error:
            return RawRow(origin, None, "an empty line" if not line.strip() else f"not JSON that can be read: {error}")
        if not isinstance(value, dict):
            return RawRow(origin, None, "not a JSON object")
        return RawRow(origin, value, pads_with_nulls=self.facts.pads_with_nulls)

    def bytes_of(self, number: int) -> int:
        bounds = self.bounds
        return int(bounds[number] - bounds[number - 1])

    @cached_property
    def by_length(self) -> NDArray[np.int64]:
        """The numbers of all rows, the shortest first, `[rows]`."""
        self.is_whole.wait()
        return np.argsort(np.diff(self.bounds), kind="stable") + 1

    def holding(self, text: str, after: int = 0) -> Iterator[int]:
        """The numbers of the rows after row `after` that contain a text, ignoring the case of A to Z."""
        self.is_whole.wait()
        bounds = self.bounds
        written = [json.dumps(text, ensure_ascii=ascii)[1:-1] for ascii in (True, False)]
        patterns = {pattern.encode("utf-8", "surrogatepass").lower() for pattern in written}
        first = after + 1
        with self.lines.open("rb") as opened:
            while first < len(bounds):
                last = max(int(np.searchsorted(bounds, bounds[first - 1] + CHUNK)) - 1, first)
                opened.seek(int(bounds[first - 1]))
                content = opened.read(int(bounds[last] - bounds[first - 1])).lower()
                yield from _rows_with(patterns, content, bounds[first - 1 : last + 1] - bounds[first - 1], first)
                first = last + 1


def _rows_with(patterns: Collection[bytes], content: bytes, bounds: NDArray[np.int64], first: int) -> list[int]:
    """The numbers of the rows of `content` that contain any of the patterns; `first` is that of its first row."""
    rows: set[int] = set()
    for pattern in patterns:
        at = content.find(pattern)
        while at >= 0:
            row = int(np.searchsorted(bounds, at, side="right"))
            rows.add(row + first - 1)
            at = content.find(pattern, int(bounds[row]))
    return sorted(rows)


def table_of(file: Path, name: str) -> Table:
    """The table of a file as it is now."""
    facts = file.stat()
    return _table_of_file(file, name, facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=8)
def _table_of_file(file: Path, name: str, *state: int) -> Table:
    if file.suffix.lower() == ".jsonl":
        return Table(name, file)
    return Table(name, None, lambda lines: write_out(read_file(file, name), lines))


def table_from_hub(source: str, name: str) -> Table:
    """The table of a data set of the Hub; `source`: the recipe's `Source` as JSON."""
    table = _table_from_hub(source, name)
    if table.failed:
        _table_from_hub.cache_clear()  # the next try may succeed
    return table


@lru_cache(maxsize=8)
def _table_from_hub(source: str, name: str) -> Table:
    def write(lines: Path) -> Written:
        checker.ask("download", source=source, lines=str(lines))
        return Written({}, pads_with_nulls=True)

    return Table(name, None, write)
