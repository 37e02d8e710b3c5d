"""Cells of a row: access by column or path, lists that files store as text, and tests of what a cell holds.

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

from prefold.data.dialogues import holds_dialogue
from prefold.data.preference import Unfit, role_of, short
from prefold.recipe.values import as_number

Form = Callable[[Any], bool]
"""A test of what a cell holds."""
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


def is_turn(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    speaks = isinstance(value.get("role"), str) and ("content" in value or "tool_calls" in value)
    return speaks or (isinstance(value.get("from"), str) and "value" in value)


def is_turns(value: Any) -> bool:
    """A list of messages, or a single one."""
    return is_turn(value) or (isinstance(value, list) and value != [] and all(map(is_turn, value)))


def holds_turns(value: Any) -> bool:
    """Messages, or an object that holds some."""
    return is_turns(value) or (isinstance(value, dict) and any(map(is_turns, value.values())))


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


def need_list(text: str, where: str) -> Any:
    """The list in a cell of a column that stores lists as text; None if blank. Raises Unfit: it cannot be parsed."""
    if not text.strip():
        return None
    if (value := read_written(text)) is MISSING:
        raise Unfit("bad_message", f"{where} is text but not a list, unlike in other rows")
    return value


def is_empty(cell: Any) -> bool:
    return cell is MISSING or cell is None or cell == "" or cell == [] or cell == {}


def is_tools(cell: Any) -> bool:
    """An object or a list of them; the whole, or each object, may be stored as text."""
    tools = _tools_in(cell)
    return tools != [] and all(isinstance(tool, dict) for tool in tools)


def _tools_in(cell: Any) -> list[Any]:
    value = read_if_text(cell)
    return [read_if_text(tool) for tool in (value if isinstance(value, list) else [value])]


def is_kwargs(cell: Any) -> bool:
    """An object, which may be stored as text."""
    value = read_if_text(cell)
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def is_history(cell: Any) -> bool:
    """Earlier turns, as (question, answer) pairs or as messages; they may be stored as text."""
    value = read_if_text(cell)
    if not isinstance(value, list) or not value:
        return False
    return is_turns(value) or all(isinstance(item, list | tuple) and len(item) == 2 for item in value)


def read_if_text(cell: Any) -> Any:
    """The list, object or null that a text cell holds; any other cell as it is."""
    value = read_written(cell) if isinstance(cell, str) else cell
    return cell if value is MISSING else value


def template_kwargs(tools: Any, kwargs: Any, where_tools: str, where_kwargs: str) -> dict[str, Any]:
    """The keywords that a row passes to the chat template. Raises Unfit: a cell has another form or a reserved key."""
    tools, kwargs = ([] if is_empty(cell) else read_if_text(cell) for cell in (tools, kwargs))
    if not is_empty(tools) and not is_tools(tools):
        raise Unfit("bad_message", f"{where_tools} is not a list of tools")
    given = {} if is_empty(kwargs) else kwargs
    if not is_kwargs(given):
        raise Unfit("bad_message", f"{where_kwargs} is not an object")
    if taken := sorted(given.keys() & _RESERVED_KEYWORDS):
        raise Unfit("bad_message", f"{where_kwargs} sets `{taken[0]}`, which a row may not set")
    return given if is_empty(tools) else {**given, "tools": _tools_in(tools)}


_RESERVED_KEYWORDS = {"conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"}
_RESERVED_KEYWORDS |= {"continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors"}
_RESERVED_KEYWORDS |= {"return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"}


# ---- forms ------------------------------------------------------------------------------------------------------


def _speaker(turn: Any) -> Any:
    """The speaker of a turn; None if the value is not a turn."""
    return turn.get("role", turn.get("from")) if isinstance(turn, dict) else None


def _assistant_speaks(turn: Any) -> bool:
    return role_of(_speaker(turn)) == "assistant"


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_bare_text(value: Any) -> bool:
    return isinstance(value, str) and not holds_dialogue(value)


def is_texts(value: Any) -> bool:
    """A list of strings; any but the first may be null."""
    return _is_filled(value) and is_text(value[0]) and all(item is None or is_text(item) for item in value)


def is_sentences(value: Any) -> bool:
    return _is_filled(value) and all(map(is_text, value))


def is_opening(value: Any) -> bool:
    """A list of turns of which the last is not the assistant's."""
    return _is_filled(value) and bool(_speaker(value[-1])) and not _assistant_speaks(value[-1])


def is_answer(value: Any) -> bool:
    return is_bare_text(value) or _assistant_speaks(value[0] if _is_filled(value) else value)


def is_answered(value: Any) -> bool:
    """A list of turns of which the last is the assistant's."""
    return _is_filled(value) and bool(_speaker(value[0])) and _assistant_speaks(value[-1])


def is_dialogue(value: Any) -> bool:
    """A dialogue that begins with its prompt."""
    if isinstance(value, str):
        return holds_dialogue(value)
    return _is_filled(value) and bool(_speaker(value[0])) and not _assistant_speaks(value[0])


def is_number(value: Any) -> bool:
    return as_number(value) is not None or isinstance(value, bool)


def is_scalar(value: Any) -> bool:
    """Whether a cell could be a vote or a label at all."""
    is_word = isinstance(value, str) and len(value) <= 40 and value.strip() != ""
    return is_word or (isinstance(value, bool | int | float) and value == value)


def _is_filled(value: Any) -> bool:
    return isinstance(value, list) and value != []


def listed(names: Iterable[str]) -> str:
    """Names as a message shows them."""
    return ", ".join(f"`{short(name)}`" for name in names)
