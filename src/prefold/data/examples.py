"""Examples on disk: records and their token ids, in an Arrow file that is memory-mapped.

A set of a million pairs takes hardly more memory than one of a hundred. Without a path, the file lies in the system's
temporary folder and is removed with the last `Examples` that reads it.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice, pairwise
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from prefold.data.preference import Message, Preference, Prompt, Record, RowId, Unpaired, messages_key, whole_prompt
from prefold.trees.packing import Span, TokenTree

_BATCH_ROWS = 256
_NUMBERS, _KEY, _TEXT = pa.list_(pa.int32()), pa.binary(16), pa.string()
_SCHEMA = pa.schema(
    {"ids": _NUMBERS, "lengths": _NUMBERS, "context": _NUMBERS, "record": _TEXT, "kind": _TEXT, "source": _TEXT}
    | {"row": pa.int64(), "prompt_key": _KEY, "record_key": _KEY}
)
_KINDS: dict[str, type[Record]] = {kind.__name__: kind for kind in (Preference, Unpaired, Prompt)}
Item = TypeVar("Item")


@dataclass(frozen=True)
class Example:
    """A record and its token ids.

    `tree.completions` are `(chosen, rejected)` of a `Preference`, the completion of an `Unpaired`, none of a `Prompt`.
    """

    record: Record
    tree: TokenTree


class Examples(Sequence[Example]):
    """Rows of the file in some order. Records and trees are made on access."""

    def __init__(self, batches: Sequence[pa.RecordBatch], order: NDArray[np.int64], owner: Any = None):
        self._batches, self.order, self._owner = batches, order, owner

    @classmethod
    def open(cls, path: Path, owner: Any = None) -> Examples:
        """All rows of a file, in order; `owner` is kept alive by this object and its selections."""
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        return cls(batches, np.arange(sum(batch.num_rows for batch in batches)), owner)

    @classmethod
    def of(cls, examples: Iterable[Example], path: Path | None = None) -> Examples:
        """Write examples to a file as they come, a temporary one without `path`, and open it."""
        folder = None
        if path is None:
            folder = tempfile.TemporaryDirectory(prefix="prefold-", ignore_cleanup_errors=True)
            path = Path(folder.name) / "examples.arrow"
        rows = map(_row, examples)
        with pa.ipc.new_file(str(path), _SCHEMA) as writer:
            while batch := list(islice(rows, _BATCH_ROWS)):
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=_SCHEMA))
        return cls.open(path, folder)

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return Examples(self._batches, self.order[index], self._owner)
        return Example(self._record(index), self._tree(index))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Examples) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> Examples:
        return Examples(self._batches, self.order[np.asarray(indices, dtype=np.int64)], self._owner)

    @property
    def trees(self) -> Sequence[TokenTree]:
        return _View(len(self), self._tree)

    @property
    def lengths(self) -> list[tuple[int, ...]]:
        """Numbers of tokens of each tree's prompt and of its completions, scored or not. The tokens are not read."""
        values = list(chain.from_iterable(_tuples(batch.column("lengths")) for batch in self._batches))
        return [values[row] for row in self.order.tolist()]

    @property
    def records(self) -> Sequence[Record]:
        return _View(len(self), self._record)

    @property
    def origins(self) -> Sequence[RowId]:
        return _View(len(self), self._origin)

    @property
    def prompt_keys(self) -> list[bytes]:
        """Keys that are equal exactly if the messages of the prompts are."""
        return self._column("prompt_key")

    @property
    def record_keys(self) -> list[bytes]:
        """Keys that are equal exactly if prompts, answers and the keywords for the template are."""
        return self._column("record_key")

    def largest_token(self) -> tuple[int, int]:
        """The largest token id, and the index of a row that has it; (-1, 0) if there are no rows."""
        largest = np.concatenate([np.full(1, -1), *map(_largest_ids, self._batches)])[1:][self.order]
        return (int(largest.max()), int(largest.argmax())) if len(largest) else (-1, 0)

    def _column(self, name: str) -> list[Any]:
        values = [value for batch in self._batches for value in batch.column(name).to_pylist()]
        return [values[row] for row in self.order.tolist()]

    def _at(self, index: int) -> tuple[pa.RecordBatch, int]:
        number, row = divmod(int(self.order[index]), _BATCH_ROWS)
        return self._batches[number], row

    def _tree(self, index: int) -> TokenTree:
        batch, row = self._at(index)
        ids, lengths, context = (_list(batch.column(name), row) for name in ("ids", "lengths", "context"))
        prompt, *completions = (tuple(ids[start:stop]) for start, stop in pairwise(accumulate(lengths, initial=0)))
        spans: list[list[Span]] = [[] for _ in completions]
        for completion, start, stop in zip(*[iter(context)] * 3, strict=True):
            spans[completion].append((start, stop))
        return TokenTree(prompt, tuple(completions), tuple(map(tuple, spans)))

    def _record(self, index: int) -> Record:
        batch, row = self._at(index)
        kind = _KINDS[batch.column("kind")[row].as_py()]
        fields = json.loads(batch.column("record")[row].as_py())
        for name, value in fields.items():
            if isinstance(value, list) and name != "columns":
                fields[name] = tuple(value)
        return kind(**fields, origin=self._origin(index))

    def _origin(self, index: int) -> RowId:
        batch, row = self._at(index)
        return RowId(batch.column("source")[row].as_py(), batch.column("row")[row].as_py())


class _View(Sequence[Item]):
    """A list whose items are made on access."""

    def __init__(self, length: int, make: Callable[[int], Item]):
        self._length, self._make = length, make

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        at = range(self._length)[index]
        return list(map(self._make, at)) if isinstance(at, range) else self._make(at)


def _largest_ids(batch: pa.RecordBatch) -> NDArray[np.int64]:
    """The largest token id of each row, `[rows]`."""
    column = batch.column("ids")
    # `to_numpy` imports pandas, which takes half a second.
    ids: Any = np.from_dlpack(column.values)
    offsets: Any = np.from_dlpack(column.offsets)
    return np.maximum.reduceat(ids, offsets[:-1]).astype(np.int64)


def _tuples(column: pa.ListArray) -> Iterator[tuple[int, ...]]:
    values, offsets = (np.from_dlpack(part).tolist() for part in (column.values, column.offsets))
    return (tuple(values[start:stop]) for start, stop in pairwise(offsets))


def _list(column: pa.ListArray, row: int) -> list[int]:
    values: list[int] = np.from_dlpack(column[row].values).tolist()
    return values


def _row(example: Example) -> dict[str, Any]:
    record, parts = example.record, (example.tree.prompt, *example.tree.completions)
    fields = {name: value for name, value in vars(record).items() if name != "origin"}
    return {
        "ids": np.array(list(chain.from_iterable(parts)), dtype=np.int32),
        "lengths": [len(part) for part in parts],
        # For each span: the index of its completion, its start, its stop.
        "context": [n for i, spans in enumerate(example.tree.context) for span in spans for n in (i, *span)],
        # Values of .parquet files may be dates or bytes; rewards get them as text.
        "record": json.dumps(fields, default=str),
        "kind": type(record).__name__,
        "source": record.origin.source,
        "row": record.origin.row,
        "prompt_key": _key(record.prompt),
        "record_key": _key(whole_prompt(record), *record.answers),
    }


def _key(*parts: Sequence[Message]) -> bytes:
    return hashlib.blake2b(messages_key(*parts).encode(), digest_size=16).digest()


def prompts_of(examples: Examples | Iterable[Example]) -> list[Prompt]:
    """The prompts among the records of examples."""
    # `Examples.records` makes no trees.
    records = examples.records if isinstance(examples, Examples) else (example.record for example in examples)
    return [record for record in records if isinstance(record, Prompt)]
