"""Files and built-in sets -> rows. Knows file formats; knows nothing of what the columns mean.

Data in: a `recipe.Source`; data out: `RawRow` after `RawRow`, read as they are asked for. A line that cannot be
understood is a row with a problem, because one bad line says nothing about the next; a file that cannot be understood
is a `UserError`. Hub data sets and other file formats are not read.
"""

from __future__ import annotations

import codecs
import difflib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from prefold.data.preference import RowId, json_type
from prefold.errors import UserError
from prefold.files import without_home
from prefold.recipe import Source

BUILTIN_PREFIX = "builtin:"
BUILTIN_FOLDER: Traversable = resources.files("prefold.data") / "builtin"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class RawRow:
    """One row as it was read: either an object, or None and what kept it from being one."""

    origin: RowId
    value: dict[str, Any] | None
    problem: str | None = None


def source_name(source: Source) -> str:
    """What rows and messages call a source: its path as the resolved recipe has it, and the split if one is named."""
    path = without_home(source.path)
    return path if source.split is None else f"{path} ({source.split})"


def read_rows(source: Source) -> Iterator[RawRow]:
    """Find the source now, read its rows as they are asked for.

    Raises:
        UserError: there is no such source, or it is not of its format; for what only reading can tell, while reading.
    """
    if source.path.startswith(BUILTIN_PREFIX):
        return _read_lines(_builtin_file(source), source_name(source))
    path = _existing_file(source)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"files that end in `{path.suffix}` are not read" if path.suffix else "the file name has no ending",
            where=source.path,
            expected=".jsonl (one JSON object a line) or .json (a list of objects)",
            advice="convert it to .jsonl",
        )
    return reader(path, source_name(source))


# ---- finding ----------------------------------------------------------------------------------------------------


def _existing_file(source: Source) -> Path:
    if source.split is not None:
        raise UserError(
            f"a file has no splits, but `split: {source.split}` is given", where=source.path, advice="remove `split`"
        )
    path = Path(os.path.expanduser(source.path))
    try:
        if path.is_dir():
            raise UserError("this is a folder", where=source.path, expected="a file", advice=_files_in(path))
        if path.is_file():
            return path
        raise _missing(source, path)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=source.path) from None


def _missing(source: Source, path: Path) -> UserError:
    looks_like_hub_id = _HUB_ID.fullmatch(source.path) and path.suffix.lower() not in _READERS
    if looks_like_hub_id and not path.parent.is_dir():
        return UserError(
            "no such file, and data sets of the Hub are not read yet",
            where=source.path,
            advice="download it as .jsonl and give the path of that file",
        )
    if not path.parent.is_dir():
        return UserError("no such file: its folder does not exist either", where=source.path)
    near = difflib.get_close_matches(path.name, [file.name for file in path.parent.iterdir()], n=3)
    advice = "did you mean " + " or ".join(f"`{name}`" for name in near) + "?" if near else _files_in(path.parent)
    return UserError("no such file", where=source.path, advice=advice)


def _files_in(folder: Path) -> str:
    """Advice that names files of `folder` which can be read."""
    try:
        names = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in _READERS)
    except OSError:
        return ""
    return f"readable files in that folder: {_listed(names)}" if names else "that folder has no .jsonl or .json file"


def _builtin_file(source: Source) -> Traversable:
    name, split = source.path.removeprefix(BUILTIN_PREFIX), source.split or "train"
    names = sorted(entry.name for entry in _entries(BUILTIN_FOLDER) if entry.is_dir() and _entries(entry))
    if name not in names:
        raise UserError(
            f"there is no built-in set `{name}`",
            where=source.path,
            expected=f"one of: {_listed(names)}" if names else "",
            advice=_nearest(name, names),
        )
    files = {entry.name.removesuffix(".jsonl"): entry for entry in _entries(BUILTIN_FOLDER / name)}
    if split not in files:
        raise UserError(
            f"it has no split `{split}`",
            where=source.path,
            expected=f"one of: {_listed(sorted(files))}",
            advice=_nearest(split, sorted(files)),
        )
    return files[split]


def _entries(folder: Traversable) -> list[Traversable]:
    """The subfolders and .jsonl files of a package folder; none if it does not exist."""
    if not folder.is_dir():
        return []
    return [entry for entry in folder.iterdir() if entry.is_dir() or entry.name.endswith(".jsonl")]


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean `{near[0]}`?" if near else ""


def _listed(names: list[str], limit: int = 8) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# ---- reading ----------------------------------------------------------------------------------------------------


def _read_lines(file: Traversable, name: str) -> Iterator[RawRow]:
    """Rows of JSON lines; a row's number is that of its line, so that an editor finds it."""
    offset, found = 0, False
    with _opened(file, name) as lines:
        # Split at \n only: text mode would also split at characters that JSON allows within a string.
        for number, line in enumerate(lines, start=1):
            text = _decoded(line, offset, name)
            offset += len(line)
            if text.strip():
                found = True
                yield _row(text.strip(), RowId(name, number))
    if not found:
        raise _empty(name)


def _row(text: str, origin: RowId) -> RawRow:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return RawRow(origin, None, f"not JSON: {error.msg} at character {error.pos + 1}")
    except RecursionError:
        return RawRow(origin, None, "not JSON that can be read: nested too deeply")
    except ValueError:
        return RawRow(origin, None, "not JSON that can be read: a number has too many digits")
    return _object(value, origin)


def _object(value: Any, origin: RowId) -> RawRow:
    if isinstance(value, dict):
        return RawRow(origin, value)
    return RawRow(origin, None, f"not a JSON object but {json_type(value)}")


def _read_list(file: Traversable, name: str) -> Iterator[RawRow]:
    with _opened(file, name) as whole:
        content = whole.read()
    text = _decoded(content, 0, name)
    if not text.strip():
        raise _empty(name)
    values = _parsed(text, name)
    if not isinstance(values, list):
        raise UserError(
            f"the file holds {json_type(values)}",
            where=name,
            expected="a list of objects: [{...}, {...}]",
            advice="put the rows in one list, or write a .jsonl file",
        )
    if not values:
        raise _empty(name)
    for number, value in enumerate(values, start=1):
        yield _object(value, RowId(name, number))


def _parsed(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        several_documents = error.msg == "Extra data"
        raise UserError(
            f"not JSON: {error.msg}",
            where=f"{name}, line {error.lineno}, column {error.colno}",
            expected="one list of objects: [{...}, {...}]",
            advice="if it has one object a line, let its name end in .jsonl" if several_documents else "",
        ) from None
    except (ValueError, RecursionError):
        raise UserError("JSON nested too deeply, or a number with too many digits", where=name) from None


def _opened(file: Traversable, name: str) -> Any:
    try:
        return file.open("rb")
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=name) from None


def _decoded(content: bytes, offset: int, name: str) -> str:
    """The text of bytes that begin at `offset` of their file, without a byte order mark."""
    if offset == 0:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise _not_utf8(0, "it looks like UTF-16", name)
        bom = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
        content, offset = content[bom:], bom
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(offset + error.start, f"0x{content[error.start]:02x}", name) from None


def _not_utf8(offset: int, found: str, name: str) -> UserError:
    return UserError(f"not UTF-8 at byte {offset} ({found})", where=name, advice="convert the file to UTF-8")


def _empty(name: str) -> UserError:
    return UserError("there are no rows in it", where=name, expected="at least one JSON object")


_READERS = {".jsonl": _read_lines, ".json": _read_list}
