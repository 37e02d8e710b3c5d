"""Cells of a row: by a column or a path into it, and the lists that some files write as text.

A path is keys and places joined by dots, `input.messages`, `answers.0.text`; a column of exactly that name goes first.
It reaches into lists and objects that are written as text, too.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prefold.data.preference import Unfit

MISSING = object()
"""What is at a path that a row does not have."""
_WRITTEN = re.compile(r"""\s*['"]?(\[|\{)""")
_SPEAKER, _WORDS = re.compile(r"""['"](role|from)\\?['"]\s*:"""), re.compile(r"""['"](content|value)\\?['"]\s*:""")
_START = 300
"""Characters within which a list of messages shows itself as one."""


def cell_at(row: Mapping[str, Any], path: str) -> Any:
    """The cell at a column or path, or MISSING."""
    if path in row or "." not in path:
        return row.get(path, MISSING)
    here: Any = row
    for part in path.split("."):
        here = _item(here, part)
    return here


def end_of_path(row: Mapping[str, Any], path: str) -> tuple[str, str, list[str]]:
    """Where a path ends that a row does not have: the path so far, the part that is not there, and the keys or places
    that are."""
    parts = path.split(".")
    at = next(at for at in range(len(parts)) if cell_at(row, ".".join(parts[: at + 1])) is MISSING)
    here: Any = cell_at(row, ".".join(parts[:at])) if at else row
    keys = here if isinstance(here, dict) else range(len(_list(here)))
    return ".".join(parts[:at]), parts[at], list(map(str, keys))


def has_cell(row: Mapping[str, Any], path: str) -> bool:
    return cell_at(row, path) is not MISSING


def _item(value: Any, part: str) -> Any:
    value = read_if_text(value)
    if isinstance(value, dict):
        return value.get(part, MISSING)
    is_place = part.isascii() and part.isdigit() and len(part) < 9
    return value[int(part)] if is_place and int(part) < len(_list(value)) else MISSING


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def read_written(text: str) -> Any:
    """What a cell that holds a list, an object or null as JSON or printed by Python says; MISSING if it is neither."""
    if not _WRITTEN.match(text := text.strip()) and text not in ("null", "None"):
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


def is_turn(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    speaks = isinstance(value.get("role"), str) and ("content" in value or "tool_calls" in value)
    return speaks or (isinstance(value.get("from"), str) and "value" in value)


def is_turns(value: Any) -> bool:
    """A list of messages, or a single one."""
    return is_turn(value) or (isinstance(value, list) and value != [] and all(map(is_turn, value)))


def holds_turns(value: Any) -> bool:
    """Messages, or an object with messages in it."""
    return is_turns(value) or (isinstance(value, dict) and any(map(is_turns, value.values())))


def is_texts(value: Any) -> bool:
    """A list of strings, of which some may be null."""
    is_filled = isinstance(value, list) and value != [] and isinstance(value[0], str)
    return is_filled and all(item is None or isinstance(item, str) for item in value)


def written(cells: Sequence[Any], is_meant: Callable[[Any], bool]) -> list[Any]:
    """The cells that are texts, read; MISSING for those that are not what is meant."""
    texts = [cell for cell in cells if isinstance(cell, str) and cell.strip()]
    # Nothing else begins like that, so most columns cost a glance.
    begins = any(_WRITTEN.match(text) for text in texts)
    return [value if is_meant(value) else MISSING for value in map(read_written, texts)] if begins else []


def is_cut_off(text: Any) -> bool:
    """Whether a text begins as a list of messages, or as a message, and cannot be read."""
    if not isinstance(text, str) or not (begin := _WRITTEN.match(text)):
        return False
    keys = [bool(key.search(text[:_START])) for key in (_SPEAKER, _WORDS)]
    return (any(keys) if begin[1] == "[" else all(keys)) and read_written(text) is MISSING


def need_list(text: str, where: str) -> Any:
    """A cell of a column whose lists are written as text. Raises Unfit: it cannot be read."""
    if not text.strip():
        return None
    if (value := read_written(text)) is MISSING:
        raise Unfit("bad_message", f"{where} is text that is no list, unlike that of other rows")
    return value


def is_empty(cell: Any) -> bool:
    return cell is MISSING or cell is None or cell == "" or cell == [] or cell == {}


def is_tools(cell: Any) -> bool:
    """A list of objects, or of texts of objects, or the text of a list."""
    tools = _tools_in(cell)
    return tools != [] and all(isinstance(tool, dict) for tool in tools)


def _tools_in(cell: Any) -> list[Any]:
    value = read_if_text(cell)
    return [read_if_text(tool) for tool in (value if isinstance(value, list) else [value])]


def is_kwargs(cell: Any) -> bool:
    """An object, or the text of one."""
    value = read_if_text(cell)
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def is_history(cell: Any) -> bool:
    """Earlier rounds as pairs of question and answer, or as messages; or the text of that."""
    value = read_if_text(cell)
    if not isinstance(value, list) or not value:
        return False
    return is_turns(value) or all(isinstance(item, list | tuple) and len(item) == 2 for item in value)


def read_if_text(cell: Any) -> Any:
    """A cell, or what its text says where it says something."""
    value = read_written(cell) if isinstance(cell, str) else cell
    return cell if value is MISSING else value


def template_kwargs(tools: Any, kwargs: Any, where: tuple[str, str]) -> dict[str, Any]:
    """What a row gives to the chat template beside its messages. Raises Unfit: a cell is not what it should be."""
    tools, kwargs = ([] if is_empty(cell) else read_if_text(cell) for cell in (tools, kwargs))
    if not is_empty(tools) and not is_tools(tools):
        raise Unfit("bad_message", f"{where[0]} is no list of tools")
    if is_empty(kwargs):
        return {} if is_empty(tools) else {"tools": _tools_in(tools)}
    if not is_kwargs(kwargs):
        raise Unfit("bad_message", f"{where[1]} is no object")
    if taken := sorted(kwargs.keys() & _NOT_OF_A_ROW):
        raise Unfit("bad_message", f"{where[1]} has `{taken[0]}`, which is not for a row to say")
    return {**kwargs, **({} if is_empty(tools) else {"tools": _tools_in(tools)})}


_NOT_OF_A_ROW = {"conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"}
_NOT_OF_A_ROW |= {"continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors"}
_NOT_OF_A_ROW |= {"return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"}
