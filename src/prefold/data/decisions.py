"""Decisions of people about single rows: `data.decisions` of a recipe, an append-only file of JSON lines.

    {"source": "pairs.jsonl", "row": 12, "action": "flip", "reason": "the label is wrong", "digest": "5f0c…"}

`strike` leaves the row out, `flip` swaps chosen and rejected or inverts a label, and `keep` uses the row as it is; the
last decision about a row counts. `digest` is that of the row when the decision was made: if it differs, the row has
changed since, or another row has taken its number.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from prefold.data.formats import RawRow
from prefold.data.preference import Preference, Problem, Record, RowId, Unpaired, short
from prefold.data.sources import named_files, names_of_rows, source_name
from prefold.data.vote_file import append_line
from prefold.errors import UserError, did_you_mean, json_type
from prefold.files import without_home
from prefold.recipe import Data, Rows, Source

ACTIONS = ("strike", "flip", "keep")


@dataclass(frozen=True)
class Decision:
    """`source`: a file's path relative to the folder of the decisions, or the name of a source that is not a file."""

    source: str
    row: int
    action: str
    reason: str
    digest: str


def digest_of_row(value: dict[str, Any]) -> str:
    """16 hex digits of the SHA-256 of a row, whatever the order of its columns."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def read_decisions(path: Path) -> dict[tuple[str, int], Decision]:
    """The last decision about each row, by source and row. Raises UserError: the file cannot be read, or a line is not
    a decision."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(f"cannot be read ({reason})", where=_where(path), expected="a file of decisions") from None
    decisions = (_decision(line, f"{_where(path)}, line {number}") for number, line in enumerate(lines, 1) if line)
    return {(decision.source, decision.row): decision for decision in decisions}


def _where(path: Path) -> str:
    return f"`data.decisions`, {without_home(str(path))}"


def _decision(line: str, where: str) -> Decision:
    fields = {"source": str, "row": int, "action": str, "reason": str, "digest": str}
    expected = "an object with " + ", ".join(f"`{name}`" for name in fields)
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError("not JSON", where=where, expected=expected) from None
    if not isinstance(value, dict):
        raise UserError(f"not an object but {json_type(value)}", where=where, expected=expected)
    for name in (*value, *fields):
        if name not in fields or name not in value:
            what = f"`{short(name)}` is {'missing' if name in fields else 'not a field of a decision'}"
            raise UserError(what, where=where, expected=expected, advice=did_you_mean(name, fields))
        if not isinstance(value[name], fields[name]) or isinstance(value[name], bool):
            raise UserError(f"`{name}` is {json_type(value[name])}", where=where, expected=expected)
    if value["action"] not in ACTIONS:
        what, known = f"`action` is `{short(value['action'])}`", "one of: " + ", ".join(ACTIONS)
        raise UserError(what, where=where, expected=known, advice=did_you_mean(value["action"], ACTIONS))
    if value["row"] < 1 or not value["reason"].strip():
        what = "`row` is below 1" if value["row"] < 1 else "`reason` is empty"
        raise UserError(what, where=where, expected="the 1-based row, and why it was decided so")
    return Decision(**value)


def append_decision(path: Path, file: Path | str, row: RawRow, action: str, reason: str) -> Decision:
    """Append a decision about a row of `file`, a path or the name of a source that is not a file. The caller has locked
    the folder of `path`. Raises UserError: `path` holds something else, the action is unknown, or the reason is empty.
    """
    if action not in ACTIONS:
        raise UserError(f"`{short(action)}` is no decision", expected="one of: " + ", ".join(ACTIONS))
    if not reason.strip():
        raise UserError("a decision without a reason", expected="in some words, why", advice="write the reason")
    if path.exists():
        read_decisions(path)
    source = os.path.relpath(file.resolve(), path.parent.resolve()) if isinstance(file, Path) else file
    decision = Decision(source, row.origin.row, action, " ".join(reason.split()), digest_of_row(row.value or {}))
    append_line(path, asdict(decision))
    return decision


class Decisions:
    """The decisions of a recipe about the rows of its sources."""

    def __init__(self, path: Path, sources: Iterable[Source]):
        """Raises UserError: see `read_decisions`; or a decision is about a source that is not among `sources`."""
        self.path, self.of_rows = path, dict[RowId, Decision]()
        names: dict[str, list[str]] = {}
        for source in sources:
            files = {name: file for name, file in named_files(source).items() if isinstance(file, Path)}
            for name, file in files.items():
                names.setdefault(str(file.resolve()), []).append(name)
            if not files:
                names.setdefault(source_name(source), []).append(source_name(source))
        for decision in read_decisions(path).values():
            if decision.action == "keep":
                continue
            known_as = names.get(decision.source) or names.get(str((path.parent / decision.source).resolve()))
            if known_as is None:
                what = f"row {decision.row} of {short(decision.source)}, which is none of the recipe's sources"
                advice = "take the line out, or give the recipe its own file of decisions"
                raise UserError(f"it decides about {what}", where=_where(path), advice=advice)
            self.of_rows |= {RowId(name, decision.row): decision for name in known_as}

    @classmethod
    def of(cls, data: Data) -> Decisions | None:
        return cls(Path(data.decisions).expanduser(), (*data.train, *data.eval)) if data.decisions else None

    def checked(self, rows: Iterable[RawRow], source: Rows) -> Iterator[RawRow]:
        """The rows of a source, each checked. Raises UserError: see `check`; or, at the end, a row does not exist."""
        last = dict.fromkeys(names_of_rows(source), 0)
        for row in rows:
            last[row.origin.source] = row.origin.row
            self.check(row)
            yield row
        for origin in self.of_rows:
            if origin.row > last.get(origin.source, origin.row):
                self._refuse(origin, f"is not there, the last is {last[origin.source]}")

    def check(self, row: RawRow) -> None:
        """Raises UserError: the row has changed since it was decided about."""
        decision = self.of_rows.get(row.origin)
        if decision and (row.value is None or digest_of_row(row.value) != decision.digest):
            self._refuse(row.origin, "has changed since it was decided about")

    def _refuse(self, origin: RowId, what: str) -> NoReturn:
        advice = "restore its source, or decide again: `prefold ui` shows the row"
        raise UserError(f"{origin} {what}", where=_where(self.path), advice=advice)

    def flips(self, origin: RowId) -> list[Problem]:
        """The oddity of a row that is used but was flipped, if it was."""
        decision = self.of_rows.get(origin)
        return [Problem("flipped", decision.reason, origin)] if decision and decision.action == "flip" else []

    def applied(self, record: Record | Problem) -> Record | Problem:
        """A record after the decision about it. Raises UserError: a prompt alone cannot be flipped."""
        decision = self.of_rows.get(record.origin)
        if decision is None or isinstance(record, Problem):
            return record
        if decision.action == "strike":
            return Problem("struck", decision.reason, record.origin)
        if isinstance(record, Unpaired):
            return replace(record, label=not record.label)
        if not isinstance(record, Preference):
            self._refuse(record.origin, "is a prompt alone, and cannot be flipped")
        ratings = record.ratings and record.ratings[::-1]
        return replace(record, chosen=record.rejected, rejected=record.chosen, ratings=ratings)
