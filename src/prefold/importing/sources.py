"""Data sets of a file, as sources of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefold.data.shapes import ROLES
from prefold.importing.draft import Draft, Group
from prefold.importing.tables import listed, read_tool
from prefold.recipe import parse_yaml

KEYS = read_tool("sources")
WORDS = KEYS["words"]
TO_RENAME = "other names of roles and contents need renaming in the rows"
TO_DOWNLOAD = "download this and give its path: a source is a whole split, a folder or files"


def carry_sources(
    draft: Draft, key: str, field: str, sources: list[dict[str, Any]], lost: Sequence[str] = (), comment: str = ""
) -> None:
    """Set a field to the sources of a key, and note what of it has no counterpart."""
    draft.carry(field, sources, key, comment=comment)
    for text in lost:
        draft.note("missing", key, text=text)


def take_weights(draft: Draft, key: str) -> list[Any]:
    """The weights, one for each data set; they may be given as text."""
    if not draft.has(key):
        return []
    draft.note("renamed", key, text="`weight` of each source")
    return [parse_yaml(value, key) if isinstance(value, str) else value for value in listed(draft.look(key))]


def weigh(sources: Sequence[dict[str, Any]], weights: Sequence[Any]) -> None:
    """Give the sources their weights. A source with a weight has no count."""
    for source, weight in zip(sources, weights, strict=False):
        source.pop("count", None)
        source["weight"] = weight


def is_file(path: str) -> bool:
    """Whether a path is that of a file: it exists, or has a known suffix, also in `a.jsonl.gz`."""
    return not {".jsonl", ".json", ".csv", ".parquet", ".txt"}.isdisjoint(Path(path).suffixes) or Path(path).exists()


def drop_splits_of_files(draft: Draft) -> None:
    """Other tools call what is read from a file `train`; here only data sets of the Hub have splits."""
    for source in (*draft.values["data.train"], *draft.values.get("data.eval", [])):
        if source.get("split") == "train" and is_file(str(source["path"])):
            del source["split"]


# ---- lists of data sets -----------------------------------------------------------------------------------------


def write_sources(draft: Draft, key: str, field: str, shares: bool = False) -> None:
    """A list of data sets. Keys inside an entry are noted as `key.inner`, once if entries say the same. `shares`: a
    `weight` is the share of a set's own rows."""
    if not draft.has(key):
        return
    entries = draft.take(key)
    sources: list[dict[str, Any]] = []
    notes: list[tuple[str, Group, str]] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        values = dict(entry) if isinstance(entry, Mapping) else {"path": entry}
        if isinstance(kind := values.get("type"), Mapping):
            values |= {**kind, "type": "user_defined"}
        filled = {name: value for name, value in values.items() if value not in (None, "", [], {})}
        notes += [(name, "off", "") for name in values if name not in filled]
        sources += _sources(filled, notes, shares)
    draft.carry(field, sources, key)
    for inner, group, text in dict.fromkeys(notes):
        draft.note(group, f"{key}.{inner}", text=text)


def _sources(values: dict[str, Any], notes: list[tuple[str, Group, str]], shares: bool) -> list[dict[str, Any]]:
    """The sources of an entry; what became of its keys is added to `notes`."""
    key = "id" if "id" in values else "path"
    source, files, folder = {"path": values.pop(key, "")}, values.pop("data_files", None), values.pop("data_dir", None)
    notes.append((key, "renamed", "`path`"))
    columns: dict[str, str] = {}
    for name, value in values.items():
        role = name.removeprefix("field_")
        if name == "weight" and shares:
            source |= {"count": value} if value != 1 else {}
            notes.append((name, "renamed", "`count`, the share of its rows that is drawn; 1 is all of them"))
        elif name in KEYS["fields"]:
            source[KEYS["fields"][name]] = value
            notes.append((name, "renamed", f"`{KEYS['fields'][name]}`"))
        elif name != role and role in ROLES and isinstance(value, str):
            columns |= {role: value} if value != role else {}
            notes.append((name, "renamed", f"`columns.{role}`" if value != role else "recognised by itself"))
        else:
            notes.append((name, *_without_counterpart(name, value)))
    source |= {"columns": columns} if columns else {}
    group: Group
    if folder:
        group = "renamed" if source["path"] in KEYS["readers"] and not files else "missing"
        source |= {"path": folder} if group == "renamed" else {}
        notes.append(("data_dir", group, "`path`" if group == "renamed" else TO_DOWNLOAD))
    if files is None:
        return [source] if source["path"] else []
    group = "renamed" if source["path"] in ("", *KEYS["readers"]) else "missing"
    notes.append(("data_files", group, "`path`" if group == "renamed" else TO_DOWNLOAD))
    paths = files.values() if isinstance(files, dict) else listed(files)
    return [{**source, "path": path} for path in paths] if group == "renamed" else [source]


def _without_counterpart(name: str, value: Any) -> tuple[Group, str]:
    """The note for a key that is no field of a source."""
    if name == "type" and isinstance(value, str) and value.partition(".")[0] not in KEYS["types"]:
        return "missing", f"{value}: code that makes rows; write what it makes to a file, and name that"
    if name.endswith("_format") and str(value).strip("{} ") not in ROLES:
        return "missing", f"{value!r}: the model's own chat template writes the turns; other words belong into the rows"
    if name in KEYS["namings"]:
        odd = [str(leaf) for leaf in _leaves(value) if leaf not in WORDS]
        return ("missing", f"{', '.join(odd)}: {TO_RENAME}") if odd else ("decided", "recognised by themselves")
    if reasons := [text for text, keys in KEYS["decided"].items() if name in keys]:
        return "decided", reasons[0]
    return "missing", "sources of a recipe have no such setting; see `prefold schema`"


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)
    else:
        yield value
