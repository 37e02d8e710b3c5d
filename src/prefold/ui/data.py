"""The pages of data: the rows of a recipe or file as they are read, as messages and as they are trained on, and
decisions about single rows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import yaml
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from prefold.data.conversion import to_records
from prefold.data.decisions import Decision, append_decision, digest_of_row, read_decisions
from prefold.data.formats import RawRow, reader_for
from prefold.data.preference import Problem, Record
from prefold.data.rankings import with_rule
from prefold.data.shapes import Shape, find_shape
from prefold.data.sources import BUILTIN_PREFIX, named_files, source_name
from prefold.data.survey import messages_of
from prefold.errors import UserError
from prefold.recipe import Data, Source, builtin_recipes, make_section, parse_yaml, read_text
from prefold.recipe.paths import run_folder, start_of_paths, with_paths_from
from prefold.reports.data_tables import data_tables, example
from prefold.reports.each_pair import joined
from prefold.reports.run_files import Values, cleaned, readable, turns
from prefold.ui.runs import decisions_beside, index_of, recipes_in, require_inside, run_at
from prefold.ui.site import Fields, Page, Site, action, go_to, page, route, site_of, whole_number
from prefold.ui.tables import Table, table_from_hub, table_of
from prefold.ui.worker import STREAMED, checker, reader

PAGE = Page("/data", "Data")
ON_A_PAGE = 50
HEAD_ROWS = 200
"""Rows from which the shape of a file is recognised here."""
LONGEST_COMPARED = 3000
"""Words and spaces of the longest answer in which differences are marked."""
ORDERS = {"": "as they are", "longest": "longest first", "shortest": "shortest first", "decided": "decided about"}


@dataclass(frozen=True)
class File:
    """A data file of a recipe, or by itself; a data set of the Hub has no `path`. `recipe`: the recipe's text with
    absolute paths, empty for a file by itself; `address`: the query that names the file."""

    site: Site
    address: dict[str, str]
    source: Source
    split: str
    name: str
    path: Path | None
    recipe: str
    decided_in: Path

    @cached_property
    def table(self) -> Table:
        if self.path is None:
            return table_from_hub(self.source.model_dump_json(), self.name)
        return table_of(self.path, self.name)

    @cached_property
    def shape(self) -> Shape | None:
        """None where it is not recognised."""
        return _shape_of(self.table, self.source.model_dump_json(), min(len(self.table), HEAD_ROWS))

    @property
    def decided_as(self) -> Path | str:
        """How decisions name it: by its path, or, of the Hub or built in, by the name of the source."""
        if self.path is None or self.source.path.startswith(BUILTIN_PREFIX):
            return source_name(self.source)
        return self.path

    @property
    def title(self) -> str:
        name = self.decided_as
        shown = self.site.name_of(name) if isinstance(name, Path) else name
        return f"{shown}, the first {STREAMED:,} rows" if self.source.streaming else shown

    def decisions(self) -> dict[int, Decision]:
        """The last decision about each row of this file. Raises UserError: see `read_decisions`."""
        if not self.decided_in.is_file():
            return {}
        known = {str(self.decided_as)}
        root = self.decided_in.parent
        return {
            row: decision
            for (source, row), decision in read_decisions(self.decided_in).items()
            if {source, str((root / source).resolve())} & known
        }

    def records_of(self, row: RawRow) -> list[Record | Problem]:
        return to_records(row, self.shape) if self.shape else []


@lru_cache(maxsize=16)
def _shape_of(table: Table, source: str, rows: int) -> Shape | None:
    settings, head = Source.model_validate_json(source), [table.row(number) for number in range(1, rows + 1)]
    try:
        shape = find_shape(head, table.name, settings.columns, values=settings.values)
        return with_rule(shape, settings, table.name, shape.kind)
    except UserError:
        return None


# ---- which file ---------------------------------------------------------------------------------------------------


def _files(site: Site, given: Fields) -> list[File]:
    """The data files of a recipe or of a path. Raises UserError, HTTPException: one cannot be shown."""
    if path := given.get("path"):
        source = make_section(Source, {"path": path if path.startswith(BUILTIN_PREFIX) else str(site.inside(path))})
        sources, recipe, named_by = [("train", source)], "", site.folders[0] / source.path.rpartition(":")[2]
        decided_in = named_by.with_name(f"{named_by.name.partition('.')[0]}.decisions.jsonl")
    else:
        recipe, data = _recipe_of(site, given.get("recipe", ""))
        sources = [(split, source) for split in ("train", "eval") for source in getattr(data, split)]
        decided_in = site.inside(data.decisions or decisions_beside(site, given["recipe"]))
    files: list[File] = []
    for split, source in sources:
        named: dict[str, Any] = {**named_files(source)} or {source_name(source): None}
        for name, file in named.items():
            is_outside = file is None or source.path.startswith(BUILTIN_PREFIX)
            resolved = None if file is None else Path(str(file)) if is_outside else site.inside(str(file))
            address = {key: given[key] for key in ("path", "recipe", "model") if given.get(key)}
            address["n"] = str(len(files))
            files.append(File(site, address, source, split, name, resolved, recipe, decided_in))
    return files


def _recipe_of(site: Site, name: str) -> tuple[str, Data]:
    """The text of a recipe whose relative paths are absolute, and its section `data`."""
    builtin = name in builtin_recipes()
    path = Path(name) if builtin else site.inside(name)
    path = run_at(site, name) if path.is_dir() else path
    values = parse_yaml(read_text(str(path))[0], name if builtin else site.name_of(path))
    if not isinstance(values, dict) or not isinstance(values.get("data"), dict):
        raise UserError("it has no section `data`", where=site.name_of(path), expected="a recipe")
    folder = None if builtin else run_folder(str(path))
    values = with_paths_from(start_of_paths(folder) if folder else site.start, values)
    require_inside(site, values)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True), make_section(Data, values["data"])


def _file(site: Site, given: Fields) -> File:
    files, number = _files(site, given), whole_number(given, "n")
    if number >= len(files):
        raise HTTPException(404, "There is no such file.")
    return files[number]


# ---- recipes, runs and files --------------------------------------------------------------------------------------


def _data(request: Request) -> Response:
    site, given = site_of(request), request.query_params
    if given.get("recipe") or given.get("path"):
        files = _files(site, given)
        if len(files) == 1 and given.get("path") and "findings" not in given:
            return go_to(f"/data/rows?{urlencode(files[0].address)}")
        recipe = given.get("recipe", "")
        title = recipe if recipe in builtin_recipes() else site.name_of(site.inside(recipe or given["path"]))
        query_of_findings = urlencode({"recipe": recipe} if recipe else {"path": given["path"]})
        return page(request, "data_files.html.j2", files=files, findings=query_of_findings, title=title)
    return page(
        request,
        "data_start.html.j2",
        recipes=recipes_in(site),
        builtin={name: name for name in builtin_recipes()},
        runs={str(row.folder): site.name_of(row.folder) for row in index_of(site.folders).rows()[:20]},
        files=_data_files(site),
    )


def _data_files(site: Site) -> dict[str, str]:
    """Files of data in the folders and one level below, by path."""
    files = [file for folder in site.folders for pattern in ("*", "*/*") for file in islice(folder.glob(pattern), 2000)]
    shown = [file for file in files if reader_for(file.name) and file.is_file() and not _is_of_a_run(file)]
    return {str(file): site.name_of(file) for file in sorted(shown)[:200]}


def _is_of_a_run(file: Path) -> bool:
    return (file.parent / "recipe.yaml").is_file() or file.name.startswith(".") or ".decisions." in file.name


def _findings(request: Request) -> Response:
    """The findings in the data of a recipe or in a file, each with links to its rows."""
    site, given = site_of(request), request.query_params
    files = _files(site, given)
    addresses = {readable(file.name): file.address for file in files}
    if given.get("path"):
        facts = cleaned(reader.ask("survey", path=files[0].source.path))
        if facts["refused"]:
            raise UserError(facts["refused"])
    else:
        facts = cleaned(checker.ask("check", start=str(site.start), text=_recipe_of(site, given.get("recipe", ""))[0]))
    data = None if given.get("path") else {**data_tables(facts), "findings": None}
    return page(request, "data_findings.html.j2", data=data, findings=facts["findings"], files=addresses)


# ---- rows ---------------------------------------------------------------------------------------------------------


def _rows(request: Request) -> Response:
    """Rows of a file: a page of all, of those that contain a text, or those with given numbers."""
    site, given = site_of(request), request.query_params
    file = _file(site, given)
    decisions, table = file.decisions(), file.table
    numbers, following = _numbers(file, given, decisions)
    return page(
        request,
        "data_rows_part.html.j2" if request.url.path.endswith("/part") else "data_rows.html.j2",
        file=file,
        address=file.address,
        rows=[_in_short(file, number) for number in numbers],
        decisions=decisions,
        number=len(table),
        is_whole=table.is_whole.is_set(),
        failed=table.failed and readable(str(table.failed)),
        following=following,
        orders=ORDERS,
    )


def _numbers(file: File, given: Fields, decisions: dict[int, Decision]) -> tuple[list[int], dict[str, str] | None]:
    """The numbers of the rows to show, and what the address of the next page has in addition."""
    table, after = file.table, whole_number(given, "after")
    if text := given.get("text"):
        numbers = list(islice(table.holding(text, after), ON_A_PAGE + 1))
        return numbers[:ON_A_PAGE], {"after": str(numbers[-2])} if len(numbers) > ON_A_PAGE else None
    order: Any = range(1, len(table) + 1)
    if given.get("rows"):
        named = [int(number) for number in given["rows"].split(",") if number.isdecimal() and len(number) < 12]
        order = [number for number in named if 1 <= number <= len(table)]
    elif given.get("order") in ("longest", "shortest"):
        order = table.by_length[::-1] if given["order"] == "longest" else table.by_length
    elif given.get("order") == "decided":
        order = sorted(number for number, decision in decisions.items() if decision.action != "keep")
    numbers = [int(number) for number in order[after : after + ON_A_PAGE]]
    return numbers, {"after": str(after + ON_A_PAGE)} if after + ON_A_PAGE < len(order) else None


def _in_short(file: File, number: int) -> Values:
    """A row of the list, with the beginnings of its parts."""
    row = file.table.row(number)
    records = file.records_of(row)
    first = records[0] if records else None
    parts = (
        {"": row.problem or str(row.value)}
        if first is None
        else {"": first.message}
        if isinstance(first, Problem)
        else {}
    )
    if first is not None and not isinstance(first, Problem):
        parts = _texts(messages_of(first))
        parts["prompt"] = first.prompt[-1]["content"]
    shown = {name: readable(text[:300]) for name, text in parts.items()}
    return {"number": number, "bytes": file.table.bytes_of(number), "parts": shown, "more": max(len(records) - 1, 0)}


def _texts(messages: Values) -> dict[str, str]:
    """The parts of a record as texts."""
    return {
        name: joined([dict(message) for message in value])
        if isinstance(value, list) and name != "tools"
        else str(value)
        for name, value in messages.items()
    }


# ---- one row ------------------------------------------------------------------------------------------------------


def _row(request: Request) -> Response:
    site, given = site_of(request), request.query_params
    file, number = _file(site, given), whole_number(given, "row", 1)
    row = file.table.row(number)
    records: list[Values] = []
    for record in file.records_of(row):
        if isinstance(record, Problem):
            records.append({"problem": readable(record.message)})
            continue
        texts = {name: readable(text) for name, text in _texts(messages_of(record)).items()}
        chosen, rejected = texts.get("chosen", ""), texts.get("rejected", "")
        marked = dict(zip(("chosen", "rejected"), _marked(chosen, rejected), strict=True)) if rejected else {}
        records.append({"texts": texts, "marked": marked, "prompt": turns(cleaned(list(record.prompt)))})
    decision = file.decisions().get(number)
    return page(
        request,
        "data_row.html.j2",
        file=file,
        address=file.address,
        number=number,
        last=len(file.table),
        cells=cleaned(row.value) if row.value is not None else None,
        problem=row.problem,
        records=records,
        decision=decision,
        is_same=decision is None or digest_of_row(row.value or {}) == decision.digest,
        decided_in=site.name_of(file.decided_in),
        is_named=bool(file.recipe and parse_yaml(file.recipe, "the recipe")["data"].get("decisions")),
    )


def _marked(*texts: str) -> list[list[tuple[str, bool]]]:
    """Two texts in pieces, each with whether the other text lacks it."""
    words = [re.findall(r"\w+|\s+|[^\w\s]", text) for text in texts]
    if max(map(len, words)) > LONGEST_COMPARED:
        return [[(text, False)] for text in texts]
    same: tuple[list[bool], ...] = tuple([False] * len(of_text) for of_text in words)
    for at, begin, size in SequenceMatcher(None, words[0], words[1], autojunk=False).get_matching_blocks():
        same[0][at : at + size] = same[1][begin : begin + size] = [True] * size
    return [
        [(word, not is_same) for word, is_same in zip(*pair, strict=True)] for pair in zip(words, same, strict=True)
    ]


def _tokens(request: Request) -> Response:
    """A row as text and as tokens, by the tokenizer of the recipe's model or of the one that is named."""
    site, given = site_of(request), request.query_params
    file, number = _file(site, given), whole_number(given, "row", 1)
    if not file.recipe and not given.get("model"):
        return page(request, "data_tokens.html.j2", facts=None)
    kind = file.shape.kind if file.shape else "pairs"
    source = {"text": file.recipe}
    if not file.recipe:
        source = {"model": given["model"], "path": file.source.path, "kind": kind}
    # A file that had to be converted is read again as for training, which knows the nulls that mean nothing.
    value = file.table.row(number).value if file.table.temporary is None else None
    facts = cleaned(reader.ask("row", start=str(site.start), row=f"{file.name}:{number}", value=value, **source))
    records = []
    for texts, tokens in zip(facts["rendered"], facts["tokens"], strict=True):
        counts = {name: len(of_part) for name, of_part in (tokens or {}).items()}
        records.append((texts, example({"tokens": tokens or {}, "counts": counts})[1]))
    return page(request, "data_tokens.html.j2", facts=facts, records=records)


def _decide(request: Request, fields: Fields) -> Response:
    """Record a decision about a row."""
    site = site_of(request)
    file, number, wanted = _file(site, fields), whole_number(fields, "row"), fields.get("action", "")
    row = file.table.row(number)
    if row.value is None:
        raise UserError("it cannot be read, and is left out anyway", where=str(row.origin))
    records = file.records_of(row)
    if wanted == "flip" and not any(getattr(record, "answers", ()) for record in records):
        raise UserError("it has no preference or label to flip", where=str(row.origin))
    decided_in = site.inside(str(file.decided_in))
    with site.writing(decided_in.parent):
        reason = fields.get("reason") or ("as it was" if wanted == "keep" else "")
        append_decision(decided_in, file.decided_as, row, wanted, reason)
    return go_to(f"/data/row?{urlencode({**file.address, 'row': str(number)})}")


ROUTES = [
    route("/data", _data),
    route("/data/findings", _findings),
    route("/data/rows", _rows),
    route("/data/rows/part", _rows),
    route("/data/row", _row),
    route("/data/row/tokens", _tokens),
    action("/data/decide", _decide),
]
