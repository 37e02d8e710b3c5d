"""Data sets that a file lists, as sources of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefold.importing.draft import Draft, Group
from prefold.importing.tables import listed, read_tool

READERS = ("json", "csv", "parquet")
"""What stands for a path where the files are named beside it."""
_FIELDS = {"name": "name", "config": "name", "split": "split", "revision": "revision"}
_FIELDS |= {"fraction": "weight", "weight": "weight"}
_COLUMNS = ("prompt", "chosen", "rejected", "messages", "completion", "label", "system")


def write_sources(draft: Draft, key: str, field: str, shares: bool = False) -> None:
    """A list of data sets. Keys inside an entry are noted as `key.inner`, once for all entries; `shares`: their
    `weight` is the share of a set's own rows."""
    if not draft.has(key):
        return
    entries = draft.take(key)
    sources: list[dict[str, Any]] = []
    notes: dict[str, tuple[Group, str]] = {}
    for entry in entries if isinstance(entries, list) else [entries]:
        sources += _sources(entry if isinstance(entry, Mapping) else {"path": entry}, notes, shares)
    draft.carry(field, sources, key)
    for inner, (group, text) in notes.items():
        draft.note(group, f"{key}.{inner}", text=text)


def _sources(entry: Mapping[str, Any], notes: dict[str, tuple[Group, str]], shares: bool) -> list[dict[str, Any]]:
    """The sources of an entry; `notes` gets what became of its keys."""
    decided = {key: text for text, keys in read_tool("sources").items() for key in keys}
    values = {name: value for name, value in entry.items() if value not in (None, "", [], {})}
    notes |= dict.fromkeys(set(entry) - set(values), ("renamed", "empty"))
    if isinstance(kind := values.get("type"), Mapping):
        values = {**values, **{name: value for name, value in kind.items() if value}, "type": "user_defined"}
    source, files = _read_from(values, notes)
    columns: dict[str, str] = {}
    for name, value in values.items():
        role = name.removeprefix("field_")
        if name == "weight" and shares:
            source |= {"count": value} if value != 1 else {}
            notes[name] = "renamed", "`count`, the share of its rows that is drawn; 1 is all of them"
        elif name in _FIELDS:
            source[_FIELDS[name]] = value
            notes[name] = "renamed", f"`{_FIELDS[name]}`"
        elif name.startswith("field_") and role in _COLUMNS and isinstance(value, str):
            columns |= {role: value} if value != role else {}
            notes[name] = "renamed", f"`columns.{role}`" if value != role else "recognised by itself"
        elif name in decided:
            notes[name] = "decided", decided[name]
        else:
            notes[name] = "missing", "sources of a recipe have no such setting; see `prefold schema`"
    source |= {"columns": columns} if columns else {}
    if files is None:
        return [source] if source["path"] else []
    if source["path"] and source["path"] not in READERS:
        advice = "download these files and give their paths: a source is a whole split, a folder or files"
        notes["data_files"] = "missing", advice
        return [source]
    notes["data_files"] = "renamed", "`path`"
    return [{**source, "path": path} for path in (files.values() if isinstance(files, dict) else listed(files))]


def _read_from(values: dict[str, Any], notes: dict[str, tuple[Group, str]]) -> tuple[dict[str, Any], Any]:
    """Take the keys that say where rows are read from; gives the source so far, and the files if they are named."""
    key = "id" if "id" in values else "path"
    source, files, folder = {"path": values.pop(key, "")}, values.pop("data_files", None), values.pop("data_dir", None)
    notes[key] = "renamed", "`path`"
    if folder and source["path"] in READERS and not files:
        source["path"] = folder
        notes["data_dir"] = "renamed", "`path`"
    elif folder:
        text = "download this folder and give its path: a source is a whole set, a folder or files"
        notes["data_dir"] = "missing", text
    return source, files
