"""Sources -> selected rows: filtered by `where`, drawn by `weight` and `count`, and counted.

What the columns mean is not known here. The draws are those of `datasets.Dataset.shuffle(seed=seed).select(range(n))`,
so that a recipe can repeat a published mixture row by row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from prefold.data.decisions import Decisions
from prefold.data.formats import RawRow
from prefold.data.preference import Problem, RowId
from prefold.data.sources import read_rows, source_name
from prefold.errors import UserError, did_you_mean, json_type
from prefold.recipe import Benchmark, Rows, Source
from prefold.recipe.where import Mismatch, Where
from prefold.terminal import progress_bar

ROWS_BETWEEN = 256
"""Rows between two updates of a progress bar."""


@dataclass
class Selection:
    """The selected rows of a source, and counts of the others, which are complete once `rows` is exhausted.

    `rows_in` were read; `problems` are those for which `where` could not be evaluated. Rows that could not be read
    are among `rows`: the conversion reports what is wrong with them.
    """

    name: str
    rows: Iterator[RawRow] = field(default_factory=lambda: iter(()))
    problems: list[Problem] = field(default_factory=list)
    rows_in: int = 0
    rows_filtered: int = 0
    rows_not_drawn: int = 0


def select_rows(sources: Sequence[Source], seed: int, decisions: Decisions | None = None) -> list[Selection]:
    """Apply `where`, `weight` and `count`. Sources without the last two, or streamed with `count`, are read lazily.

    Raises UserError: a source cannot be read, `where` names a column that no row has or leaves none, there are fewer
    rows than are to be drawn, or a row has changed since it was decided about.
    """
    selections = [_filtered(source, decisions) for source in sources]
    # The readable rows of the sources that are drawn from, in memory.
    pools: list[tuple[Source, Selection, list[RawRow]]] = []
    for source, selection in zip(sources, selections, strict=True):
        if source.count and source.streaming:
            selection.rows = _first(selection.rows, selection.name, int(source.count))
        elif source.count or source.weight:
            rows = list(watched(selection.rows, selection.name))
            selection.rows = iter([row for row in rows if row.value is None])
            pools.append((source, selection, [row for row in rows if row.value is not None]))
    # The source that runs out first sets the scale: no row is repeated. 1e-6 is for the rounding of the division.
    scale = min((len(pool) / source.weight for source, _, pool in pools if source.weight), default=0.0)
    for source, selection, pool in pools:
        wanted = source.count or scale * (source.weight or 0)
        count = math.floor((wanted * len(pool) if wanted < 1 and source.count else wanted) + 1e-6)
        if not 0 < count <= len(pool):
            raise _too_few(selection.name, len(pool), count, source.count or 0)
        drawn = [pool[index] for index in shuffled(len(pool), seed)[:count]]
        selection.rows = chain(selection.rows, drawn)
        selection.rows_not_drawn = len(pool) - count
    return selections


def benchmark_texts(benchmark: Benchmark) -> Iterator[tuple[str, RowId]]:
    """The texts of a benchmark and the rows they are from; nulls and blank texts are left out. Raises UserError: it
    cannot be read, a row is broken or lacks the column, or a value is not text."""
    selection, column = _filtered(benchmark), benchmark.column
    for row in selection.rows:
        text = (row.value or {}).get(column)
        problem = None if isinstance(text, str | None) else f"it is {json_type(text)}"
        if row.value is None:
            problem = row.problem
        elif column not in row.value:
            near = did_you_mean(column, row.value)
            problem = "there is no such column" + (f"; {near}" if near else "")
        if problem:
            expected = "a text in every row of a benchmark"
            raise UserError(problem, where=f"{row.origin}, `{column}`", expected=expected)
        if text and text.strip():
            yield text, row.origin


def _filtered(source: Rows, decisions: Decisions | None = None) -> Selection:
    selection, rows = Selection(source_name(source)), read_rows(source)
    if decisions:
        rows = decisions.checked(rows, source)
    selection.rows = _passing(rows, Where(source.where) if source.where else None, selection)
    return selection


def _passing(rows: Iterable[RawRow], condition: Where | None, into: Selection) -> Iterator[RawRow]:
    passed = 0
    for row in rows:
        into.rows_in += 1
        try:
            keep = condition is None or row.value is None or condition(row.value)
        except Mismatch as mismatch:
            into.problems.append(Problem("where_failed", str(mismatch), row.origin))
            continue
        if keep:
            passed += row.value is not None
            yield row
        else:
            into.rows_filtered += 1
    if not into.rows_in:
        raise UserError("there are no rows in it", where=into.name, expected="at least one row")
    if condition:
        condition.require_known_columns(into.name)
    if condition and not passed:
        failed = f"; it fails for {len(into.problems)}: {into.problems[0].message}" if into.problems else ""
        what = f"`where` leaves none of its {into.rows_in} rows{failed}"
        raise UserError(what, where=into.name, advice="mend the condition")


def _first(rows: Iterator[RawRow], name: str, count: int) -> Iterator[RawRow]:
    taken = 0
    for row in rows:
        yield row
        taken += row.value is not None
        if taken == count:
            return
    raise _too_few(name, taken, count)


def _too_few(name: str, rows: int, count: int, share: float = 0) -> UserError:
    if not count and share:
        what = f"no row of it would be used: `count: {share}` of {rows} rows is less than a row"
        return UserError(what, where=name, advice="raise `count`")
    if not count:
        what = "no row of it would be used: the other sources with a `weight` are too small beside it"
        return UserError(what, where=name, advice="raise its `weight`, or give `count`")
    return UserError(f"only {rows} rows to draw from, but `count: {count}`", where=name, advice="lower `count`")


def shuffled(number: int, seed: int) -> list[int]:
    """The order in which `datasets.Dataset.shuffle(seed=seed)` puts this number of rows."""
    order: list[int] = np.random.default_rng(seed).permutation(number).tolist()
    return order


def watched(rows: Iterable[RawRow], name: str) -> Iterator[RawRow]:
    """The rows, with a bar that counts them as they are read."""
    with progress_bar(f"reading {name}", None) as advance:
        for number, row in enumerate(rows, 1):
            yield row
            if number % ROWS_BETWEEN == 0:
                advance(advance=ROWS_BETWEEN)
