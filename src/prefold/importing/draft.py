"""The draft of a recipe from another tool's file: which fields are set, why, and what became of every key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefold.importing.tables import CONVERSIONS, NoCounterpartError, Table

Group = Literal["same", "renamed", "decided", "missing", "unknown", "off"]
"""What became of a key: a field of the same name, one of another name, decided by prefold itself, without a
counterpart, not known to the import, or off in the file."""


@dataclass(frozen=True)
class Note:
    group: Group
    keys: tuple[str, ...]
    text: str = ""


class Draft:
    """A recipe in the making. Every key of the file is taken once and leaves a note."""

    def __init__(self, tool: str, given: Mapping[str, Any], output: Path | None = None):
        self.tool, self.output = tool, output
        self.files: dict[Path, str] = {}
        """Contents of files to be written beside the recipe (`output`), by path."""
        self.given = dict(given)
        self.values: dict[str, Any] = {}
        """The values of the recipe by dotted field."""
        self.comments: dict[str, str] = {}
        self.notes: list[Note] = []
        self.silent: list[str] = []
        """Fields with the other tool's default, since the file does not set them."""
        self._left = dict(given)
        for key, value in given.items():
            if value is None or value in ("", [], {}):
                self.note("off", key)

    def section(self, key: str) -> None:
        """Flatten a section: its keys join the others as `section.key`."""
        section = self._left.get(key)
        if not isinstance(section, Mapping):
            return
        inner = Draft(self.tool, {f"{key}.{name}": value for name, value in section.items()})
        self.given |= inner.given
        self._left |= inner._left
        self.notes += inner.notes
        self.note("renamed", key, text="its keys follow")

    def has(self, key: str) -> bool:
        return key in self._left

    def look(self, key: str, default: Any = None) -> Any:
        """The value of a key, taken or not; `default` if it is absent or null."""
        value = self.given.get(key)
        return default if value is None else value

    def take(self, key: str, default: Any = None) -> Any:
        """Take a key and return its value; the caller writes its note."""
        return self._left.pop(key, default)

    def carry(self, field: str, value: Any, *keys: str, comment: str = "") -> None:
        """Set a field, and note the keys that its value is from."""
        self.values[field] = value
        if comment:
            self.comments[field] = comment
        if keys:
            if keys == (field.rpartition(".")[2],) and not comment:
                self.note("same", *keys)
            else:
                self.note("renamed", *keys, text=f"{field}{': ' if comment else ''}{comment}")

    def note(self, group: Group, *keys: str, text: str = "") -> None:
        for key in keys:
            self._left.pop(key, None)
        self.notes.append(Note(group, keys, text))

    def fill(self, field: str, value: Any, why: str = "") -> None:
        """Set a field that is not set yet to the other tool's default."""
        if field not in self.values:
            self.silent.append(field)
            self.values[field] = value
            self.comments[field] = f"{self.tool}'s default{': ' if why else ''}{why}"

    def follow(self, table: Table) -> None:
        """Take the keys that a table has, as it says."""
        for key in [key for key in self._left if key in table]:
            entry, value = table[key], self._left[key]
            try:
                converted = CONVERSIONS[entry.conversion](value) if entry.kind == "field" else None
            except NoCounterpartError as reason:
                self.note("missing", key, text=f"{value}: {reason}")
                continue
            if converted is not None:
                self.carry(entry.text, converted, key)
            elif entry.kind == "field" or (value in (0, "none", "no") and not key.endswith("seed")):
                self.note("off", key)
            else:
                self.note(entry.kind, key, text=entry.text)

    def off(self, *keys: str) -> None:
        """Note as off those of the keys that were not taken."""
        for key in filter(self.has, keys):
            self.note("off", key)

    def finish(self) -> None:
        """Note as unknown the keys that were not taken."""
        for key in list(self._left):
            self.note("unknown", key)
