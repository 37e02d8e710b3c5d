"""Rows in any known shape -> `Preference` records. The only module that knows shapes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, TypedDict

from prefold.errors import UserError

if TYPE_CHECKING:
    from prefold.data.sources import RawRow


class Message(TypedDict):
    role: str
    content: str


@dataclass(frozen=True)
class RowId:
    """Where a row came from: the source as the recipe names it, and its 1-based row (for JSON lines: its line)."""

    source: str
    row: int


@dataclass(frozen=True)
class Preference:
    """One pair: a prompt (messages, the last one not the assistant's) and two answers (messages that follow it)."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    origin: RowId


def messages_key(*parts: Sequence[Message]) -> str:
    """A text that is the same for equal messages, whatever the order of their fields, and for nothing else."""
    return json.dumps([[(message["role"], message["content"]) for message in part] for part in parts])


@dataclass(frozen=True)
class Problem:
    """Why a row cannot be trained on. `kind` is that of the finding that counts it."""

    kind: str
    message: str
    origin: RowId


SHAPES = {
    "text": "strings `prompt`, `chosen`, `rejected` (and `system`)",
    "messages": "`prompt`: list of {role, content}; answers: text or list",
    "conversations": "`chosen`, `rejected`: lists of messages, prompt first",
}
ROLES = ("system", "user", "assistant")
_ROWS_LOOKED_AT = 20


class _Unfit(Exception):
    """Leaves a conversion at the first thing that makes the row unfit."""

    def __init__(self, kind: str, message: str):
        self.kind, self.message = kind, message


# ---- shapes -----------------------------------------------------------------------------------------------------


def shape_of(value: dict[str, Any]) -> str | None:
    """The shape that a row's columns have, by a key of `SHAPES`; None if they have none."""
    if not {"chosen", "rejected"} <= value.keys():
        return None
    any_list = isinstance(value["chosen"], list) or isinstance(value["rejected"], list)
    if "prompt" in value:
        return "messages" if any_list or isinstance(value["prompt"], list) else "text"
    return "conversations" if any_list else None


def find_shape(rows: Sequence[RawRow], source: str) -> str:
    """The shape of a source by its first rows, by a key of `SHAPES`; `unknown` if none of them is an object.

    Raises:
        UserError: there are objects, but none with known columns.
    """
    values = [row.value for row in rows[:_ROWS_LOOKED_AT] if row.value is not None]
    shapes = [shape for value in values if (shape := shape_of(value))]
    if shapes:
        return shapes[0]
    if not values:
        return "unknown"
    columns = list(dict.fromkeys(name for value in values for name in value))
    shown = ", ".join(f"`{_short(name)}`" for name in columns[:8]) + (", ..." if len(columns) > 8 else "")
    raise UserError(
        f"its columns are no known shape of pairs: {shown}" if columns else "its rows have no columns",
        where=source,
        expected="one of" + "".join(f"\n    {name}: {meaning}" for name, meaning in SHAPES.items()),
        advice="rename or complete its columns",
    )


# ---- one row ----------------------------------------------------------------------------------------------------


def to_preference(row: RawRow) -> Preference | Problem:
    """Convert a row; whatever is wrong with it comes back as the first `Problem` found, never as an exception."""
    try:
        if row.value is None:
            raise _Unfit("broken_row", row.problem or "not a JSON object")
        prompt, chosen, rejected = _parts(row.value)
        prompt = _with_system(row.value.get("system"), prompt)
        _check_answers(chosen, rejected)
        _check_prompt(prompt)
    except _Unfit as unfit:
        return Problem(unfit.kind, unfit.message, row.origin)
    return Preference(tuple(prompt), tuple(chosen), tuple(rejected), row.origin)


def _parts(value: dict[str, Any]) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt, chosen and rejected as messages."""
    chosen, rejected = _field(value, "chosen"), _field(value, "rejected")
    if shape_of(value) == "conversations":
        return _split_conversations(_messages(chosen, "`chosen`"), _messages(rejected, "`rejected`"))
    prompt = _field(value, "prompt")
    return (
        _messages(prompt, "`prompt`") if isinstance(prompt, list) else [_message("user", prompt, "`prompt`")],
        _answer(chosen, "`chosen`"),
        _answer(rejected, "`rejected`"),
    )


def _split_conversations(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Cut two conversations where they part, or before: an answer begins with the assistant's own words."""
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    while common and chosen[common - 1]["role"] == "assistant":
        common -= 1
    if not common and chosen != rejected:
        raise _Unfit("bad_message", "`chosen` and `rejected` do not begin with the same prompt")
    return chosen[:common], chosen[common:], rejected[common:]


def _answer(value: Any, where: str) -> list[Message]:
    return _messages(value, where) if isinstance(value, list) else [_message("assistant", value, where)]


def _field(value: dict[str, Any], name: str) -> Any:
    if name not in value:
        raise _Unfit("missing_field", f"`{name}` is missing")
    if value[name] is None:
        raise _Unfit("null_field", f"`{name}` is null")
    return value[name]


def _messages(value: Any, where: str) -> list[Message]:
    if not isinstance(value, list):
        raise _Unfit("bad_message", f"{where} is {json_type(value)}, not a list of messages")
    if not value:
        raise _Unfit("empty_text", f"{where} has no messages")
    return [_checked_message(item, f"{where}, message {place}") for place, item in enumerate(value, start=1)]


def _checked_message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise _Unfit("bad_message", f"{where} is {json_type(item)}, not {{role, content}}")
    for name in ("role", "content"):
        if name not in item:
            raise _Unfit("bad_message", f"{where} has no `{name}`")
    if item["role"] not in ROLES:
        raise _Unfit("bad_message", f"{where} has the role `{_short(item['role'])}`, not one of {', '.join(ROLES)}")
    if item["content"] is None:
        raise _Unfit("null_field", f"{where}: `content` is null")
    # An empty system message has a meaning: it keeps the chat template from writing its default one.
    return _message(item["role"], item["content"], where, may_be_empty=item["role"] == "system")


def _message(role: str, text: Any, where: str, may_be_empty: bool = False) -> Message:
    if not isinstance(text, str):
        raise _Unfit("not_text", f"{where} is {json_type(text)}, not text")
    if not text.strip() and not may_be_empty:
        raise _Unfit("empty_text", f"{where} is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _Unfit("not_text", f"{where} has half a character (a lone surrogate)") from None
    return {"role": role, "content": text}


def _with_system(system: Any, prompt: list[Message]) -> list[Message]:
    """Put the text of a `system` column first; an empty one is the same as none."""
    if system is None or system == "":
        return prompt
    message = _message("system", system, "`system`", may_be_empty=True)
    if not message["content"].strip() or prompt[:1] == [message]:
        return prompt
    if any(other["role"] == "system" for other in prompt):
        raise _Unfit("bad_message", "the prompt has a system message of its own beside `system`")
    return [message, *prompt]


def _check_prompt(prompt: list[Message]) -> None:
    if prompt[-1]["role"] == "assistant":
        raise _Unfit("bad_message", "the last message of `prompt` is the assistant's")


def _check_answers(chosen: list[Message], rejected: list[Message]) -> None:
    texts = [[message["content"].strip() for message in answer] for answer in (chosen, rejected)]
    if texts[0] == texts[1]:
        raise _Unfit("identical", "`chosen` and `rejected` are the same")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer:
            raise _Unfit("empty_text", f"`{name}` has no answer")
        strangers = [message["role"] for message in answer if message["role"] != "assistant"]
        if strangers:
            raise _Unfit("bad_message", f"the answer in `{name}` has a message of the role {strangers[0]}")


def json_type(value: Any) -> str:
    """What JSON calls a value's type, with its article."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a string"
    return "a list" if isinstance(value, list) else "an object"


def _short(value: Any) -> str:
    """`value` as a few characters that any terminal can show."""
    text = repr(str(value))[1:-1]
    return text if len(text) <= 30 else text[:27] + "..."
