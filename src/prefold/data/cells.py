"""Cells of a row: access by column or path, and lists that files store as text.

A path joins keys and positions (from 0) with dots: `input.messages`, `answers.0.text`. A column of exactly that name
takes precedence. Paths also reach into lists and objects that are stored as text.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from prefold.data.preference import short

MISSING = object()
"""The cell at a path that a row does not have. A null is None."""
_OPENING_BRACKET = re.compile(r"""\s*['"]?(\[|\{)""")
_SPEAKER, _WORDS = re.compile(r"""['"](role|from)\\?['"]\s*:"""), re.compile(r"""['"](content|value)\\?['"]\s*:""")
_START = 300
"""Characters at the start of a text that are searched for the keys of a message."""


def cell_at(row: Mapping[str, Any], path: str) -> Any:
    """The cell at a column or path, or MISSING."""
    if path in row or "." not in path:
        return row.get(path, MISSING)
    value: Any = row
    for part in path.split("."):
        value = _item(value, part)
    return value


def end_of_path(row: Mapping[str, Any], path: str) -> tuple[str, str, list[str]]:
    """For a path that a row does not have: the part of it that exists, the first key that is missing, and the keys or
    positions that are there instead."""
    parts = path.split(".")
    depth = next(depth for depth in range(len(parts)) if cell_at(row, ".".join(parts[: depth + 1])) is MISSING)
    parent: Any = cell_at(row, ".".join(parts[:depth])) if depth else row
    keys = parent if isinstance(parent, dict) else range(len(_list(parent)))
    return ".".join(parts[:depth]), parts[depth], list(map(str, keys))


def has_cell(row: Mapping[str, Any], path: str) -> bool:
    return cell_at(row, path) is not MISSING


def _item(value: Any, part: str) -> Any:
    value = read_if_text(value)
    if isinstance(value, dict):
        return value.get(part, MISSING)
    is_position = part.isascii() and part.isdigit() and len(part) < 9
    return value[int(part)] if is_position and int(part) < len(_list(value)) else MISSING


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def read_written(text: str) -> Any:
    """A list, an object or null parsed from its text, as JSON or as printed by Python; MISSING if the text is none."""
    if not _OPENING_BRACKET.match(text := text.strip()) and text not in ("null", "None"):
        return MISSING
    for read in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = read(text)
                return read_written(value) if isinstance(value, str) else value
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return MISSING


def written(cells: Sequence[Any], is_meant: Callable[[Any], bool]) -> list[Any]:
    """The text cells, parsed; MISSING for each that is not what is meant. Empty if no text begins like a list or an
    object."""
    texts = [cell for cell in cells if isinstance(cell, str) and cell.strip()]
    # Most columns hold no such text, and need not be parsed.
    begins = any(_OPENING_BRACKET.match(text) for text in texts)
    return [value if is_meant(value) else MISSING for value in map(read_written, texts)] if begins else []


def is_cut_off(text: Any) -> bool:
    """Whether a text begins like a list of messages, or a message, but cannot be parsed."""
    if not isinstance(text, str) or not (begin := _OPENING_BRACKET.match(text)):
        return False
    keys = [bool(key.search(text[:_START])) for key in (_SPEAKER, _WORDS)]
    return (any(keys) if begin[1] == "[" else all(keys)) and read_written(text) is MISSING


def is_empty(cell: Any) -> bool:
    return cell is MISSING or cell is None or cell == "" or cell == [] or cell == {}


def read_if_text(cell: Any) -> Any:
    """The list, object or null that a text cell holds; any other cell as it is."""
    value = read_written(cell) if isinstance(cell, str) else cell
    return cell if value is MISSING else value


def listed(names: Iterable[str]) -> str:
    """Names as a message shows them."""
    return ", ".join(f"`{short(name)}`" for name in names)
