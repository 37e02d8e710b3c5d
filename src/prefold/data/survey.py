"""What a source contains, without a recipe or a model: its columns, what becomes of its rows, which methods it fits.

Data in: a `Source`; data out: a `Survey`. Nothing here needs torch or transformers, so that it answers at once.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from typing import Any

import yaml

from prefold.data.cells import MISSING, cell_at
from prefold.data.conversion import to_records
from prefold.data.findings import about_problems, by_severity, left_out_in_part, oddities_of
from prefold.data.formats import RawRow
from prefold.data.preference import Problem, Prompt, Record, Unpaired
from prefold.data.rankings import with_rule
from prefold.data.selection import select_rows, watched
from prefold.data.shapes import FITTING, KINDS, Kind, Shape, find_shape
from prefold.data.sources import source_name
from prefold.data.votes import is_rating, vote_columns
from prefold.errors import UserError, json_type
from prefold.recipe import Data, Source, make_section

METHODS: dict[Kind, tuple[str, ...]] = {
    "pairs": ("dpo", "ipo", "simpo", "orpo", "cpo", "sft", "reward"),
    "unpaired": ("kto",),
    "prompts": ("grpo",),
}
"""Some of the methods that take each kind; the registry of all of them imports torch."""
_HEAD_ROWS = 1000
_FIRST_ROWS = 3
_VALUES_COUNTED = 12


@dataclass
class Survey:
    """`refusal` is what `prefold check` would stop with; then only the columns are known."""

    source: Source
    columns: dict[str, dict[str, Any]]
    refusal: UserError | None = None
    shape: Shape | None = None
    uses: dict[Kind, str | None] = field(default_factory=dict)
    """The name of the shape for each kind that a method may take; None if the source has none of that kind."""
    rows: int = 0
    rows_filtered: int = 0
    rows_usable: int = 0
    records: int = 0
    problems: list[Problem] = field(default_factory=list)
    """Why rows are left out, and what is odd about the others; `parts`: what is left out of rows that are used."""
    parts: list[Problem] = field(default_factory=list)
    votes: dict[str, Counter[str]] = field(default_factory=dict)
    first: list[Record] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        about = about_problems(self.problems, Data(train=[self.source]))
        findings = by_severity(about + left_out_in_part(self.parts))
        given = self.source.model_dump(exclude_defaults=True, mode="json")
        return {
            "source": source_name(self.source),
            "recognised_as": self.shape and self.shape.name,
            "kind": self.shape and self.shape.kind,
            "refused": self.refusal and str(self.refusal),
            "rows": self.rows,
            "rows_filtered": self.rows_filtered,
            "rows_usable": self.rows_usable,
            "examples": self.records,
            "columns": self.columns,
            "uses": {
                kind: shape and {"recognised_as": shape, "methods": METHODS[kind]} for kind, shape in self.uses.items()
            },
            "votes": {column: dict(counts.most_common()) for column, counts in self.votes.items()},
            "findings": [asdict(finding) | {"rows": list(map(asdict, finding.rows))} for finding in findings],
            "first": [{"row": asdict(record.origin), **messages_of(record)} for record in self.first],
            "section": yaml.safe_dump({"data": {"train": [given]}}, sort_keys=False, allow_unicode=True, width=1000),
        }


def describe_data(path: str, *, limit: int | None = None, **settings: Any) -> Survey:
    """What a file, folder, built-in set or data set of the Hub contains, and what would become of its rows.

    Args:
        limit: the most rows to read.
        settings: other fields of a source in a recipe, such as `columns` and `where`.

    Raises:
        UserError: a setting is wrong, or the source cannot be read. One that is not recognised does not raise: its
            survey has a `refusal`.
    """
    source = make_section(Source, {"path": path, **settings})
    [selection] = select_rows([source], seed=0)
    rows = islice(watched(selection.rows, selection.name), limit)
    head = list(islice(rows, _HEAD_ROWS))
    survey = Survey(source, columns_of(head))
    try:
        survey.shape = find_shape(head, selection.name, source.columns, values=source.values)
        survey.shape = shape = with_rule(survey.shape, source, selection.name, survey.shape.kind)
    except UserError as refusal:
        survey.refusal = refusal
        survey.rows = len(head)
        return survey
    survey.uses = {kind: _shape_name(head, source, FITTING[kind]) for kind in KINDS}
    for column, role in _roles(shape, survey.columns).items():
        survey.columns[column]["role"] = role
    for row in chain(head, rows):
        _convert(row, shape, survey)
    survey.problems += selection.problems
    survey.rows, survey.rows_filtered = selection.rows_in, selection.rows_filtered
    return survey


def _convert(row: RawRow, shape: Shape, into: Survey) -> None:
    _count_votes(row, shape, into)
    made = to_records(row, shape)
    records = [record for record in made if not isinstance(record, Problem)]
    problems = [problem for problem in made if isinstance(problem, Problem)]
    if not records:
        into.problems.append(problems[0])
        return
    into.parts += problems
    into.rows_usable += 1
    into.records += len(records)
    into.problems += [oddity for record in records for oddity in oddities_of(record)]
    into.problems += [Problem(row.kind, "", row.origin)] if row.kind else []
    into.first += records[: max(0, _FIRST_ROWS - len(into.first))]


def _count_votes(row: RawRow, shape: Shape, into: Survey) -> None:
    for role, column in shape.columns:
        if role in ("vote", "label") and row.value:
            for name in vote_columns(column, row.value):
                counts = into.votes.setdefault(name, Counter())
                cell = cell_at(row.value, name)
                value = "no value" if cell is MISSING else json.dumps(cell, default=str)
                counts[value if value in counts or len(counts) < _VALUES_COUNTED else "other values"] += 1


def _shape_name(head: Sequence[RawRow], source: Source, kinds: Sequence[Kind]) -> str | None:
    try:
        return find_shape(head, source_name(source), source.columns, kinds, source.values).name
    except UserError:
        return None


def _roles(shape: Shape, columns: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The roles of the columns that are used."""
    roles: dict[str, str] = {}
    for role, path in shape.columns:
        for name in vote_columns(path, columns) if role == "vote" else [path]:
            column = name if name in columns else name.partition(".")[0]
            if column in columns:
                roles[column] = f"{roles[column]}, {role}" if column in roles else role
    others = [name for name in columns if name not in roles and name not in shape.unused]
    if shape.kind == "prompts":
        return roles | dict.fromkeys(others, "for rewards")
    return roles | {name: "rating" for name in others if is_rating(name, columns[name]["example"])}


def columns_of(rows: Iterable[RawRow]) -> dict[str, dict[str, Any]]:
    """For each column the kinds of its cells with their counts, its first cell that is not empty, and no role yet."""
    holds: dict[str, Counter[str]] = {}
    examples: dict[str, Any] = {}
    for row in rows:
        for name, cell in (row.value or {}).items():
            holds.setdefault(name, Counter())[kind_of_cell(cell)] += 1
            if examples.get(name) in (None, "", []):
                examples[name] = cell
    return {
        name: {"holds": dict(counts.most_common()), "role": None, "example": examples[name]}
        for name, counts in holds.items()
    }


def kind_of_cell(cell: Any) -> str:
    """What a cell is, in a few words: `text`, `number`, `list of {role, content}`."""
    if isinstance(cell, Mapping):
        names = ", ".join(map(str, list(cell)[:4]))
        return f"{{{names}{', ...' if len(cell) > 4 else ''}}}"
    if isinstance(cell, list):
        return f"list of {kind_of_cell(cell[0])}" if cell else "empty list"
    if isinstance(cell, str) and cell[:1] in ("[", "{"):
        return "text (JSON?)"
    known = {"a string": "text", "an object": type(cell).__name__}
    return known.get(kind := json_type(cell), kind.removeprefix("a "))


def parts_of(record: Record) -> tuple[str, ...]:
    """The names of the prompt and the answers of a record."""
    return ("prompt", *{Unpaired: ("completion",), Prompt: ()}.get(type(record), ("chosen", "rejected")))


def messages_of(record: Record) -> dict[str, Any]:
    """The messages of a record by the names of its parts, its label, and its keywords for the template."""
    written = dict(zip(parts_of(record), map(list, (record.prompt, *record.answers)), strict=True))
    return {**written, **({"label": record.label} if isinstance(record, Unpaired) else {}), **record.template_kwargs}
