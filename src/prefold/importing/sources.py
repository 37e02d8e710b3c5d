"""Data sets that a file lists, as sources of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefold.importing.draft import Draft, Group
from prefold.importing.shared import listed

SHAPE = "the shape is recognised by the columns; `prefold check` names it and shows a pair"
TEMPLATE = "the model's own chat template writes the turns; `prefold check` shows them"
READERS = ("json", "csv", "parquet")
"""What stands for a path where the files are named beside it."""

_FIELDS = {"name": "name", "split": "split", "revision": "revision", "fraction": "weight", "weight": "weight"}
_COLUMNS = ("prompt", "chosen", "rejected", "messages", "completion", "label", "system")
_DECIDED = {
    "type": SHAPE,
    "ds_type": "the ending of a file says what it is",
    "columns": SHAPE,
    "field_tools": "turns with tools are left out, and counted",
    "message_property_mappings": "role and content, from and value are recognised; other names need renaming",
    "message_field_role": "role and from are recognised; other names need renaming",
    "message_field_content": "content and value are recognised; other names need renaming",
    "roles": "user, human, assistant, gpt and system are recognised; other names need renaming",
    "roles_to_train": "the answers are trained on, and nothing else",
    "train_on_eos": "an answer's end token is trained on",
    "chat_template": TEMPLATE,
    "prompt_format": TEMPLATE,
    "chosen_format": TEMPLATE,
    "rejected_format": TEMPLATE,
    "completion_format": TEMPLATE,
}


def write_sources(draft: Draft, key: str, field: str) -> None:
    """A list of data sets. Keys inside an entry are noted as `key.inner`, once for all entries."""
    if not draft.has(key):
        return
    entries = draft.take(key)
    sources: list[dict[str, Any]] = []
    told: dict[str, str] = {}
    for entry in entries if isinstance(entries, list) else [entries]:
        sources += _sources(entry if isinstance(entry, Mapping) else {"path": entry}, told, draft)
    draft.carry(field, sources, key)
    for inner, text in told.items():
        group: Group = "missing" if text.startswith("!") else "decided" if text in _DECIDED.values() else "renamed"
        draft.note(group, f"{key}.{inner}", text=text.removeprefix("!"))


def _sources(entry: Mapping[str, Any], told: dict[str, str], draft: Draft) -> list[dict[str, Any]]:
    values = {name: value for name, value in entry.items() if value not in (None, "", [], {})}
    told |= dict.fromkeys(set(entry) - set(values), "empty")
    if isinstance(kind := values.get("type"), Mapping):
        values = {**values, **{name: value for name, value in kind.items() if value}, "type": "user_defined"}
    source: dict[str, Any] = {"path": values.pop("path", "")}
    told["path"] = "`path`"
    files = values.pop("data_files", None)
    columns: dict[str, str] = {}
    for name, value in values.items():
        role = name.removeprefix("field_")
        if name in _FIELDS:
            source[_FIELDS[name]] = value
            told[name] = f"`{_FIELDS[name]}`"
        elif name.startswith("field_") and role in _COLUMNS and isinstance(value, str):
            columns |= {role: value} if value != role else {}
            told[name] = f"`columns.{role}`" if value != role else "recognised by itself"
        else:
            told[name] = _DECIDED.get(name, "!sources of a recipe have no such setting; see `prefold schema`")
    source |= {"columns": columns} if columns else {}
    return _of_files(source, files, told, draft)


def _of_files(source: dict[str, Any], files: Any, told: dict[str, str], draft: Draft) -> list[dict[str, Any]]:
    """A source for each of the files that are named beside a path, if any are."""
    if files is None:
        return [source] if source["path"] else []
    named = list(files.values()) if isinstance(files, dict) else listed(files)
    if source["path"] and source["path"] not in READERS:
        told["data_files"] = "!download these files and give their paths: a source is a whole split, a folder or files"
        return [source]
    told["data_files"] = "`path`"
    return [{**source, "path": path} for path in named]


def need_data(draft: Draft, text: str) -> None:
    """A recipe names its data; where the file does not, a place to write it."""
    if not draft.values.get("data.train"):
        draft.values["data.train"] = [{"path": "pairs.jsonl"}]
        draft.comments["data.train"] = f"to write: {text}"
