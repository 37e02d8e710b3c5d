"""Dialogues in one cell (ChatML strings, transcripts, lists of turns), and their split into prompt and answers.

ChatML        "<|im_start|>user\\nWhy?<|im_end|>\\n<|im_start|>assistant\\nSo.<|im_end|>\\n"
transcript    "\\n\\nHuman: Why?\\n\\nAssistant: So."
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from prefold.data.preference import ROLES, Message, Unfit, Writing, message, messages, said, short

_TURN_START, _TURN_END = "<|im_start|>", "<|im_end|>"
_TRANSCRIPT_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}
Parted = tuple[list[Message], list[Message], list[Message]]
"""A prompt (the turns in common) and the two answers."""


def string_writing(text: str) -> Writing:
    """The format of a string, by its first characters."""
    start = text[:200].lstrip()
    if start.startswith(_TURN_START):
        return "ChatML"
    return "transcripts" if start.startswith("Human:") else "plain"


def holds_dialogue(text: str) -> bool:
    """Whether a string is a dialogue that does not begin with the assistant."""
    return string_writing(text) != "plain" and not text[:200].lstrip().startswith(f"{_TURN_START}assistant")


def speaks(value: Any) -> bool:
    """Whether a value is a turn, sound or not."""
    return isinstance(value, dict) and ("role" in value or "from" in value)


def read_dialogue(value: Any, where: str, writing: Writing) -> list[Message]:
    """The messages of a cell that holds a whole dialogue. Raises Unfit: it has another format, or an unusable turn."""
    if isinstance(value, str) and writing in _STRING_READERS:
        return _read_string(value, where, writing)
    return messages(value, where, writing)


def read_prompt(text: str, where: str, writing: Writing) -> list[Message]:
    """The messages of a prompt in a string; an empty turn of the assistant at its end is left out."""
    if writing in _STRING_READERS:
        return _read_string(text, where, writing, may_stay_open=True)
    return [message("user", text, where)]


def read_answer(value: Any, where: str, writing: Writing) -> list[Message]:
    """An answer: bare text, one turn, or a list of turns."""
    if speaks(value):
        return messages([value], where, writing)
    if isinstance(value, list):
        return messages(value, where, writing)
    if writing == "ChatML" and isinstance(value, str):
        value = _without_end(value.removeprefix(f"{_TURN_START}assistant\n"))
        if _TURN_START in value or _TURN_END in value:
            raise Unfit("bad_message", f"{where} has more than one turn")
    if writing == "transcripts" and isinstance(value, str):
        value = value.strip()
    return [message("assistant", value, where)]


def part(chosen: list[Message], rejected: list[Message], where: tuple[str, str]) -> Parted:
    """Split two dialogues into the prompt, which ends before the assistant speaks, and two answers. Raises Unfit: they
    have no prompt in common."""
    common = sum(1 for _ in takewhile(lambda pair: said(pair[0]) == said(pair[1]), zip(chosen, rejected, strict=False)))
    while common and chosen[common - 1]["role"] == "assistant":
        common -= 1
    if not common and chosen != rejected:
        raise Unfit("bad_message", f"{where[0]} and {where[1]} do not begin with the same prompt")
    return chosen[:common], chosen[common:], rejected[common:]


def part_transcripts(chosen: list[Message], rejected: list[Message], where: tuple[str, str]) -> Parted:
    """`part` for dialogues that may differ only in the assistant's last turns. Raises Unfit: they differ before."""
    try:
        prompt, *answers = part(chosen, rejected, where)
    except Unfit as unfit:
        raise Unfit("prompts_differ", unfit.message) from None
    if any(turn["role"] != "assistant" for answer in answers for turn in answer):
        raise Unfit("prompts_differ", f"{where[0]} and {where[1]} part before their last answers")
    return prompt, answers[0], answers[1]


def part_answer(dialogue: list[Message], roles: Sequence[str]) -> tuple[list[Message], list[Message]]:
    """Split off the turns of these roles that a dialogue ends with."""
    length = sum(1 for _ in takewhile(lambda turn: turn["role"] in roles, reversed(dialogue)))
    cut = len(dialogue) - length
    return dialogue[:cut], dialogue[cut:]


def _read_string(text: str, where: str, writing: Writing, may_stay_open: bool = False) -> list[Message]:
    turns = _STRING_READERS[writing](text, where)
    if may_stay_open and turns and turns[-1] == ("assistant", ""):
        turns.pop()
    if not turns:
        raise Unfit("empty_text", f"{where} has no messages")
    return [
        message(role, words, f"{where}, turn {number}", may_be_empty=role == "system")
        for number, (role, words) in enumerate(turns, start=1)
    ]


def _chatml_turns(text: str, where: str) -> list[tuple[str, str]]:
    before, *parts = text.split(_TURN_START)
    if before.strip() or not parts:
        raise Unfit("bad_message", f"{where} does not begin with `{_TURN_START}`")
    turns = []
    for number, written in enumerate(parts, start=1):
        role, _, words = written.partition("\n")
        if role.strip() not in ROLES:
            raise Unfit("bad_message", f"{where}, turn {number} has the role `{short(role)}`")
        is_open = number == len(parts) and not words.strip()
        content = "" if is_open else _without_end(words)
        if _TURN_END in content or (content == words and not is_open):
            raise Unfit("bad_message", f"{where}, turn {number} does not end with its one `{_TURN_END}`")
        turns.append((role.strip(), content))
    return turns


def _without_end(words: str) -> str:
    """`words` without an end token at their end."""
    stripped = words.rstrip()
    return stripped.removesuffix(_TURN_END) if stripped.endswith(_TURN_END) else words


def _transcript_turns(text: str, where: str) -> list[tuple[str, str]]:
    before, *parts = _TRANSCRIPT_TURN.split(text)
    if before.strip() or not parts:
        raise Unfit("bad_message", f"{where} does not begin with `Human:`")
    return [(_TRANSCRIPT_ROLES[name], words.strip()) for name, words in zip(parts[::2], parts[1::2], strict=True)]


_STRING_READERS = {"ChatML": _chatml_turns, "transcripts": _transcript_turns}
