"""The records that rows become, and the cleaning of single cells: what is text, what is a message, what is a prompt.

Which columns hold what is known to `shapes` alone.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from prefold.errors import json_type

Message = dict[str, Any]
"""`role`, `content` (text), and what else the file gives to a turn, such as `reasoning_content` and `tool_calls`."""


@dataclass(frozen=True)
class RowId:
    """Where a row came from: the source as the recipe names it, and its 1-based row (for JSON lines: its line)."""

    source: str
    row: int

    def __str__(self) -> str:
        return f"{self.source}, row {self.row}"


Messages = tuple[Message, ...]


@dataclass(frozen=True)
class Preference:
    """One pair: a prompt (messages, the last one not the assistant's) and two answers (messages that follow it).

    `ratings` are the numbers that the row gives to chosen and rejected, where it gives any.
    """

    prompt: Messages
    chosen: Messages
    rejected: Messages
    origin: RowId
    ratings: tuple[float, float] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """What the row gives to the chat template beside its messages: `tools`, and its `chat_template_kwargs`."""

    @property
    def answers(self) -> tuple[Messages, ...]:
        return self.chosen, self.rejected


@dataclass(frozen=True)
class Unpaired:
    """One answer and whether it is wanted (`label`)."""

    prompt: Messages
    completion: Messages
    label: bool
    origin: RowId
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def answers(self) -> tuple[Messages, ...]:
        return (self.completion,)


@dataclass(frozen=True)
class Prompt:
    """A prompt without an answer. `columns` are those of its row that the prompt was not made of, as they were read."""

    prompt: Messages
    columns: dict[str, Any]
    origin: RowId
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def answers(self) -> tuple[Messages, ...]:
        return ()


Record = Preference | Unpaired | Prompt


def messages_key(*parts: Sequence[Message]) -> str:
    """A text that is the same for equal messages, whatever the order of their fields, and for nothing else."""
    return json.dumps([[(message["role"], message["content"]) for message in part] for part in parts])


@dataclass(frozen=True)
class Problem:
    """Why a row cannot be used, or what is odd about one that is. `kind` is that of the finding that counts it."""

    kind: str
    message: str
    origin: RowId


ROLES = ("system", "user", "assistant")
_TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}

Writing = Literal["plain", "ShareGPT", "ChatML", "transcripts"]
"""How turns are written: {role, content} and bare text; {from, value}; or strings that hold whole dialogues."""


class Unfit(Exception):
    """Leaves a conversion at the first thing that makes the row unfit."""

    def __init__(self, kind: str, message: str):
        self.kind, self.message = kind, message


def messages(value: Any, where: str, writing: Writing = "plain") -> list[Message]:
    """A list of turns as messages. Raises Unfit: it is no list, has no turns, or a turn cannot be used."""
    if not isinstance(value, list):
        raise Unfit("bad_message", f"{where} is {json_type(value)}, not a list of messages")
    if not value:
        raise Unfit("empty_text", f"{where} has no messages")
    return [_turn(item, f"{where}, message {number}", writing) for number, item in enumerate(value, start=1)]


def message(role: str, text: Any, where: str, may_be_empty: bool = False) -> Message:
    """One message of a text. Raises Unfit: it is no text, is empty, or cannot be written as UTF-8."""
    if not isinstance(text, str):
        raise Unfit("not_text", f"{where} is {json_type(text)}, not text")
    if not text.strip() and not may_be_empty:
        raise Unfit("empty_text", f"{where} is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Unfit("not_text", f"{where} has half a character (a lone surrogate)") from None
    return {"role": role, "content": text}


def _turn(item: Any, where: str, writing: Writing) -> Message:
    speaker, words = ("from", "value") if writing == "ShareGPT" else ("role", "content")
    if not isinstance(item, dict):
        raise Unfit("bad_message", f"{where} is {json_type(item)}, not {{{speaker}, {words}}}")
    if speaker not in item:
        raise Unfit("bad_message", f"{where} has no `{speaker}`")
    known = _SHAREGPT_ROLES if writing == "ShareGPT" else dict(zip(ROLES, ROLES, strict=True))
    name = item[speaker]
    if name in _TOOL_ROLES:
        raise Unfit("bad_message", f"{where} is a tool's turn (`{name}`); tool turns are not supported")
    if not (isinstance(name, str) and name in known):
        raise Unfit("bad_message", f"{where} has the role `{short(name)}`, not one of {', '.join(known)}")
    if item.get("tool_calls") or item.get("function_call"):
        raise Unfit("bad_message", f"{where} calls a tool; tool turns are not supported")
    if words not in item:
        raise Unfit("bad_message", f"{where} has no `{words}`")
    if item[words] is None:
        raise Unfit("null_field", f"{where}: `{words}` is null")
    # An empty system message has a meaning: it keeps the chat template from writing its default one.
    return message(known[name], item[words], where, may_be_empty=known[name] == "system")


def with_system(system: Any, prompt: list[Message], where: str = "`system`") -> list[Message]:
    """Put the text of a system column first; an empty one is the same as none."""
    if system is None or system == "":
        return prompt
    first = message("system", system, where, may_be_empty=True)
    if not first["content"].strip() or prompt[:1] == [first]:
        return prompt
    if any(other["role"] == "system" for other in prompt):
        raise Unfit("bad_message", f"the prompt has a system message of its own beside {where}")
    return [first, *prompt]


def check_prompt(prompt: list[Message], where: str) -> None:
    if not prompt:
        raise Unfit("bad_message", f"there is no prompt before the answer in {where}")
    if prompt[-1]["role"] == "assistant":
        raise Unfit("bad_message", f"the last message of {where} is the assistant's")


def check_answer(answer: list[Message], where: str) -> None:
    if not answer:
        raise Unfit("empty_text", f"{where} has no answer")
    strangers = [turn["role"] for turn in answer if turn["role"] != "assistant"]
    if strangers:
        raise Unfit("bad_message", f"the answer in {where} has a message of the role {strangers[0]}")


def short(value: Any) -> str:
    """`value` as a few characters that any terminal can show."""
    text = repr(value[:40] if isinstance(value, str) else reprlib.repr(value))[1:-1]
    return text if len(text) <= 30 else text[:27] + "..."
