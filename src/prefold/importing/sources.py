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
READERS = ("json", "csv", "parquet")
"""What stands for a path where the files are named beside it."""


def carry_sources(
    draft: Draft, key: str, field: str, sources: list[dict[str, Any]], lost: Sequence[str] = (), comment: str = ""
) -> None:
    """Sources of a key, and what of it has no counterpart."""
    draft.carry(field, sources, key, comment=comment)
    for text in lost:
        draft.note("missing", key, text=text)


def take_weights(draft: Draft, key: str) -> list[Any]:
    """One number for each data set, which may be text."""
    if not draft.has(key):
        return []
    draft.note("renamed", key, text="`weight` of each source")
    return [parse_yaml(value, key) if isinstance(value, str) else value for value in listed(draft.look(key))]


def weigh(sources: Sequence[dict[str, Any]], weights: Sequence[Any]) -> None:
    """A source has a weight or a count."""
    for source, weight in zip(sources, weights, strict=False):
        source.pop("count", None)
        source["weight"] = weight


def is_file(path: str) -> bool:
    return Path(path).suffix in (".jsonl", ".json", ".csv", ".parquet", ".txt") or Path(path).exists()


def drop_splits_of_files(draft: Draft) -> None:
    """What is read from files is `train` to the other tools; here splits are the Hub's."""
    for source in (*draft.values["data.train"], *draft.values.get("data.eval", [])):
        if source.get("split") == "train" and is_file(str(source["path"])):
            del source["split"]


# ---- lists of data sets -----------------------------------------------------------------------------------------


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
    decided = {key: text for text, keys in KEYS["decided"].items() for key in keys}
    values = {name: value for name, value in entry.items() if value not in (None, "", [], {})}
    notes |= dict.fromkeys(set(entry) - set(values), ("off", ""))
    if isinstance(kind := values.get("type"), Mapping):
        values = {**values, **{name: value for name, value in kind.items() if value}, "type": "user_defined"}
    source, files = _read_from(values, notes)
    columns: dict[str, str] = {}
    for name, value in values.items():
        role = name.removeprefix("field_")
        if name == "weight" and shares:
            source |= {"count": value} if value != 1 else {}
            notes[name] = "renamed", "`count`, the share of its rows that is drawn; 1 is all of them"
        elif name in KEYS["fields"]:
            field = KEYS["fields"][name]
            source[field] = value
            notes[name] = "renamed", f"`{field}`"
        elif name != role in ROLES and isinstance(value, str):
            columns |= {role: value} if value != role else {}
            notes[name] = "renamed", f"`columns.{role}`" if value != role else "recognised by itself"
        elif name in KEYS["namings"]:
            odd = [str(leaf) for leaf in _leaves(value) if leaf not in WORDS]
            text = f"{', '.join(odd)}: {TO_RENAME}"
            notes[name] = ("missing", text) if odd else ("decided", "recognised by themselves")
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


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)
    else:
        yield value
