"""Whatever a file holds: its rows are used, or left out with their reason and place; or there is one message."""

from __future__ import annotations

import io
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from corpus import CASES, COMPRESS, GOOD, HEAD, RECORD, Case
from pyarrow import parquet
from transformers import PreTrainedTokenizerFast

from prefold.data.findings import Finding
from prefold.data.mixture import Prepared, load_split
from prefold.data.preference import RowId
from prefold.data.shapes import Kind
from prefold.errors import UserError
from prefold.recipe import Data, Source

SECONDS = 60
# Of sets of rows, and of rows that are used all the same.
ABOUT_SETS = {"small_held_out", "one_label", "duplicate", "contradiction", "length_bias", "telling_opening"}
ABOUT_USED_ROWS = {"control_character", "template_residue", "double_end_token", "flipped_rating", "tied_rating"} | {
    "unread_field",
    "text_dropped",
    "header_trained",
}


@contextmanager
def limited_time() -> Iterator[None]:
    """Fail instead of waiting on a pipe that nobody writes to."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def loaded(
    path: Path, tokenizer: PreTrainedTokenizerFast, kind: Kind = "pairs", where: str | None = None, **settings: Any
) -> Prepared:
    with limited_time():
        data = Data(train=[Source(path=str(path), where=where)], **settings)
        return load_split(data, tokenizer, seed=1, kind=kind)


def about_rows(prepared: Prepared) -> list[Finding]:
    return [finding for finding in prepared.report.findings if finding.kind not in ABOUT_SETS]


def assert_no_row_is_lost(prepared: Prepared) -> None:
    (counts,) = prepared.report.sources
    left_out = sum(finding.count for finding in about_rows(prepared) if finding.kind not in ABOUT_USED_ROWS)
    assert counts.rows_used == len(prepared.train)
    assert counts.rows_in == counts.rows_used + left_out


def as_origins(path: Path, rows: tuple[int | tuple[str, int], ...]) -> list[RowId]:
    return [RowId(f"{path}", row) if isinstance(row, int) else RowId(f"{path}/{row[0]}", row[1]) for row in rows]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_row_is_used_or_named(case: Case, tmp_path: Path, chatml: PreTrainedTokenizerFast) -> None:
    if case.root_can and os.geteuid() == 0:
        pytest.skip("root may read any file")
    path = case.make(tmp_path)
    if case.refused:
        with pytest.raises(UserError) as caught:
            loaded(path, chatml, case.kind)
        assert case.refused in str(caught.value)
        assert len(str(caught.value).encode()) < 2_000
        return
    prepared = loaded(path, chatml, case.kind)
    assert list(prepared.train.origins) == as_origins(path, case.used)
    found = {finding.kind: (finding.count, list(finding.rows)) for finding in about_rows(prepared)}
    assert found == {kind: (len(rows), as_origins(path, rows)) for kind, rows in case.found.items()}
    assert_no_row_is_lost(prepared)
    json.dumps(prepared.report.as_json(), ensure_ascii=False).encode()


NO_FAULT = {*ABOUT_USED_ROWS, "tie", "overlong"}


@pytest.mark.parametrize(
    "case", [case for case in CASES[::4] if set(case.found) - NO_FAULT], ids=lambda case: case.name
)
def test_the_first_bad_row_stops_where_that_is_the_policy(
    case: Case, tmp_path: Path, chatml: PreTrainedTokenizerFast
) -> None:
    path = case.make(tmp_path)
    (first, *_) = sorted(row.row for kind in set(case.found) - NO_FAULT for row in as_origins(path, case.found[kind]))
    with pytest.raises(UserError, match=f", row {first}: ") as caught:
        loaded(path, chatml, case.kind, bad_rows="error")
    assert "`data.bad_rows: drop`" in str(caught.value)


def test_a_condition_that_cannot_be_evaluated_for_a_row(tmp_path: Path, chatml: PreTrainedTokenizerFast) -> None:
    values = [7, "8", 10**400, "1e999", [1], None, 1]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(GOOD | {"n": value}) + "\n" for value in values))
    prepared = loaded(path, chatml, where="number(n) > 5")
    assert [row.row for row in prepared.train.origins] == [1, 2, 4]
    assert {finding.kind: finding.rows for finding in about_rows(prepared)} == {
        "where_failed": (RowId(str(path), 3), RowId(str(path), 5))
    }
    assert prepared.report.sources[0].rows_filtered == 2


def test_the_corpus_is_large_and_its_cases_have_names_of_their_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 150


# ---- random damage ----------------------------------------------------------------------------------------------


def lines() -> bytes:
    return b"".join(json.dumps(GOOD | {"prompt": f"Why {place}?"}).encode() + b"\n" for place in range(30))


def table() -> bytes:
    sink = io.BytesIO()
    rows = [json.loads(line) for line in lines().splitlines()]
    parquet.write_table(pa.Table.from_pylist(rows), sink, row_group_size=10)
    return sink.getvalue()


WHOLE: dict[str, Callable[[], bytes]] = {
    "rows.jsonl": lines,
    "rows.json": lambda: b"[" + b",".join(lines().splitlines()) + b"]",
    "rows.csv": lambda: HEAD + RECORD * 20 + b'"Why,\n""not""?",So.,"No.\n\n"\n' * 10,
    "rows.parquet": table,
    **{
        f"rows.jsonl.{ending}": (lambda ending=ending: COMPRESS[ending](b"".join(lines().splitlines(True)[:10])) * 4)
        for ending in COMPRESS
    },
}


def damaged(content: bytes, draw: random.Random) -> bytes:
    """A few bytes changed, lost, or written twice."""
    for _ in range(draw.randint(1, 4)):
        place, length = draw.randrange(len(content)), draw.choice((0, 1, 1, 7, 60))
        middle = draw.choice((b"", draw.randbytes(length), content[place : place + length] * 2, b'"', b"\n", b"\0"))
        content = content[:place] + middle + content[place + length :]
    return content


@pytest.mark.parametrize("name", WHOLE)
def test_damage_is_no_crash_and_loses_no_row(name: str, tmp_path: Path, chatml: PreTrainedTokenizerFast) -> None:
    draw, read = random.Random(name), 0
    for _ in range(25):
        (tmp_path / name).write_bytes(damaged(WHOLE[name](), draw))
        try:
            prepared = loaded(tmp_path / name, chatml)
        except UserError:
            continue
        assert_no_row_is_lost(prepared)
        read += 1
    assert read or name in ("rows.parquet", "rows.json")


def test_a_whole_file_is_used_whole(tmp_path: Path, chatml: PreTrainedTokenizerFast) -> None:
    for name, make in WHOLE.items():
        (tmp_path / name).write_bytes(make())
        assert_no_row_is_lost(prepared := loaded(tmp_path / name, chatml))
        assert len(prepared.train) >= 30, name
