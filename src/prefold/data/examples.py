"""Examples on disk: what was written and the token ids that it became, in an Arrow file that is mapped and not read.

A set of a million pairs takes no more memory than one of a hundred. The file lies in the system's temporary folder and
goes with the last `Examples` that reads it.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from prefold.data.preference import Message, Preference, Prompt, Record, RowId, Unpaired, messages_key
from prefold.trees.packing import TokenTree

_BATCH_ROWS = 256
_SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        ("lengths", pa.list_(pa.int32())),
        ("record", pa.string()),
        ("kind", pa.string()),
        ("source", pa.string()),
        ("row", pa.int64()),
        ("prompt_key", pa.binary(16)),
        ("record_key", pa.binary(16)),
    ]
)
_KINDS: dict[str, type[Record]] = {kind.__name__: kind for kind in (Preference, Unpaired, Prompt)}
Item = TypeVar("Item")


@dataclass(frozen=True)
class Example:
    """A record as it was written and as it is trained on.

    `tree.completions` are `(chosen, rejected)` of a `Preference`, the completion of an `Unpaired`, none of a `Prompt`.
    """

    record: Record
    tree: TokenTree


class Examples(Sequence[Example]):
    """Rows of the file in some order. Records and trees are made when they are asked for."""

    def __init__(self, batches: Sequence[pa.RecordBatch], places: Sequence[int] | NDArray[np.int64], owner: Any = None):
        self._batches, self._places, self._owner = batches, np.asarray(places, dtype=np.int64), owner

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Examples:
        writer = ExampleWriter()
        for example in examples:
            writer.append(example)
        return writer.finish()

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> Examples: ...
    def __getitem__(self, place: int | slice) -> Example | Examples:
        if isinstance(place, slice):
            return Examples(self._batches, self._places[place], self._owner)
        return Example(self._record(place), self._tree(place))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Examples) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def select(self, places: Sequence[int]) -> Examples:
        return Examples(self._batches, self._places[np.asarray(places, dtype=np.int64)], self._owner)

    @property
    def trees(self) -> Sequence[TokenTree]:
        return _View(len(self), self._tree)

    @property
    def lengths(self) -> Sequence[tuple[int, ...]]:
        """Tokens of each tree's prompt and of its completions, without reading the tokens."""
        return _View(len(self), self._lengths)

    @property
    def records(self) -> Sequence[Record]:
        return _View(len(self), self._record)

    @property
    def origins(self) -> Sequence[RowId]:
        return _View(len(self), self._origin)

    @property
    def prompt_keys(self) -> list[bytes]:
        """Equal for equal prompts, and for nothing else."""
        return self._column("prompt_key")

    @property
    def record_keys(self) -> list[bytes]:
        """Equal for records whose prompt and answers are equal, and for nothing else."""
        return self._column("record_key")

    def _column(self, name: str) -> list[bytes]:
        values = [value for batch in self._batches for value in batch.column(name).to_pylist()]
        return [values[place] for place in self._places]

    def _at(self, place: int) -> tuple[pa.RecordBatch, int]:
        number, row = divmod(int(self._places[place]), _BATCH_ROWS)
        return self._batches[number], row

    def _tree(self, place: int) -> TokenTree:
        batch, row = self._at(place)
        ids, lengths = (_list(batch.column(name), row) for name in ("ids", "lengths"))
        prompt, *completions = (tuple(ids[start:stop]) for start, stop in pairwise(accumulate(lengths, initial=0)))
        return TokenTree(prompt, tuple(completions))

    def _lengths(self, place: int) -> tuple[int, ...]:
        batch, row = self._at(place)
        return tuple(_list(batch.column("lengths"), row))

    def _record(self, place: int) -> Record:
        batch, row = self._at(place)
        kind = _KINDS[batch.column("kind")[row].as_py()]
        fields = json.loads(batch.column("record")[row].as_py())
        return kind(**{name: _restored(name, value) for name, value in fields.items()}, origin=self._origin(place))

    def _origin(self, place: int) -> RowId:
        batch, row = self._at(place)
        return RowId(batch.column("source")[row].as_py(), batch.column("row")[row].as_py())


class _View(Sequence[Item]):
    """A list whose items are made when they are asked for."""

    def __init__(self, length: int, make: Callable[[int], Item]):
        self._length, self._make = length, make

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, place: int) -> Item: ...
    @overload
    def __getitem__(self, place: slice) -> list[Item]: ...
    def __getitem__(self, place: int | slice) -> Item | list[Item]:
        if isinstance(place, slice):
            return [self._make(one) for one in range(*place.indices(self._length))]
        return self._make(range(self._length)[place])

    def __iter__(self) -> Iterator[Item]:
        return map(self._make, range(self._length))


def _list(column: pa.ListArray, row: int) -> list[int]:
    start, stop = column.offsets[row].as_py(), column.offsets[row + 1].as_py()
    values: list[int] = column.values.to_numpy()[start:stop].tolist()
    return values


# ---- writing ----------------------------------------------------------------------------------------------------


class ExampleWriter:
    """Takes examples one by one; `finish` gives them back as a mapped file."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="prefold-", ignore_cleanup_errors=True)
        self._path = Path(self._folder.name) / "examples.arrow"
        self._writer = pa.ipc.new_file(str(self._path), _SCHEMA)
        self._waiting: list[dict[str, Any]] = []
        self._written = 0

    def __len__(self) -> int:
        return self._written + len(self._waiting)

    def append(self, example: Example) -> None:
        self._waiting.append(_row(example))
        if len(self._waiting) == _BATCH_ROWS:
            self._flush()

    def finish(self) -> Examples:
        self._flush()
        self._writer.close()
        reader = pa.ipc.open_file(pa.memory_map(str(self._path)))
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        return Examples(batches, np.arange(self._written), owner=self._folder)

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._waiting, schema=_SCHEMA))
            self._written += len(self._waiting)
            self._waiting = []


def _row(example: Example) -> dict[str, Any]:
    record, parts = example.record, (example.tree.prompt, *example.tree.completions)
    fields = {name: value for name, value in vars(record).items() if name != "origin"}
    return {
        "ids": np.array(list(chain.from_iterable(parts)), dtype=np.int32),
        "lengths": [len(part) for part in parts],
        # Values of a .parquet file may be dates and bytes, which rewards are given as text.
        "record": json.dumps(fields, default=str),
        "kind": type(record).__name__,
        "source": record.origin.source,
        "row": record.origin.row,
        "prompt_key": _key(record.prompt),
        "record_key": _key(record.prompt, *record.answers),
    }


def _key(*parts: Sequence[Message]) -> bytes:
    return hashlib.blake2b(messages_key(*parts).encode(), digest_size=16).digest()


def _restored(name: str, value: Any) -> Any:
    return tuple(value) if isinstance(value, list) and name != "columns" else value


def prompts_of(examples: Iterable[Example]) -> list[Prompt]:
    """The records of examples of a set of prompts."""
    return [example.record for example in examples if isinstance(example.record, Prompt)]
