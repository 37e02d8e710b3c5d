"""Rows of a file by number: only the rows on the screen are read.

A .jsonl file is read in place, by the byte offsets of its lines; any other is first converted to a temporary one. Lines
are indexed in a thread, and those indexed so far can be read.
"""

from __future__ import annotations

import codecs
import json
import tempfile
import weakref
from collections.abc import Collection, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Event, Thread

import numpy as np
from numpy.typing import NDArray

from prefold.data.formats import RawRow, read_file
from prefold.data.preference import RowId
from prefold.errors import UserError

CHUNK = 2**23
"""Bytes that are read at once."""
SOON = 0.12
"""Seconds to wait for the index of a new table, before it is used as far as it goes."""


class Table:
    """The rows of `file`, whose ids name the source `name`."""

    def __init__(self, file: Path, name: str):
        self.file, self.name, self.lines = file, name, file
        self.written = None
        if file.suffix.lower() != ".jsonl":
            self.written = tempfile.NamedTemporaryFile(prefix="prefold-")  # noqa: SIM115
            weakref.finalize(self, self.written.close)  # which removes it
            self.lines = Path(self.written.name)
        self.ends: list[NDArray[np.int64]] = []
        self.problems: dict[int, str] = {}
        self.failed: UserError | None = None
        self.is_whole = Event()
        Thread(target=self._index, daemon=True).start()
        self.is_whole.wait(SOON)

    def _index(self) -> None:
        try:
            self._convert()
            self._find_ends()
        except (OSError, UserError) as error:
            self.failed = error if isinstance(error, UserError) else UserError(f"cannot be read ({error.strerror})")
        finally:
            self.is_whole.set()

    def _convert(self) -> None:
        """Write every row as JSON on the line with the row's number, and an empty line for one that cannot be read."""
        line = 1
        for row in read_file(self.file, self.name) if self.written else ():
            assert self.written
            text = "" if row.value is None else json.dumps(row.value, ensure_ascii=False, default=str)
            self.written.write(b"\n" * (row.origin.row - line) + text.encode("utf-8", "surrogatepass") + b"\n")
            line = row.origin.row + 1
            if row.problem:
                self.problems[row.origin.row] = row.problem
        if self.written:
            self.written.flush()

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
        if number in self.problems:
            return RawRow(origin, None, self.problems[number])
        try:
            value = json.loads(
                line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode("utf-8", "surrogatepass")
            )
        except (ValueError, RecursionError) as error:
            return RawRow(origin, None, "an empty line" if not line.strip() else f"not JSON that can be read: {error}")
        return RawRow(origin, value) if isinstance(value, dict) else RawRow(origin, None, "not a JSON object")

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
    return _table(file, name, facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=8)
def _table(file: Path, name: str, *state: int) -> Table:
    return Table(file, name)
