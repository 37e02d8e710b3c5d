"""One row in a known shape -> a record, or the first thing that is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefold.data.dialogues import part, part_answer, part_transcripts, read_answer, read_dialogue, read_prompt
from prefold.data.formats import RawRow
from prefold.data.preference import (
    Message,
    Preference,
    Problem,
    Prompt,
    Record,
    RowId,
    Unfit,
    Unpaired,
    check_answer,
    check_pair,
    check_prompt,
    message,
    messages,
    short,
    with_system,
    without_nulls,
)
from prefold.data.shapes import Shape, is_dialogue
from prefold.data.votes import as_flag, as_vote, ratings, vote_columns
from prefold.errors import json_type


def to_record(
    row: RawRow, shape: Shape, system: str | None = None, where_system: str = "`data.system`"
) -> Record | Problem:
    """Convert a row; whatever is wrong with it comes back as the first `Problem` found, never as an exception.

    Args:
        system: a system message for all rows, from the setting that `where_system` names.
    """
    try:
        if row.value is None:
            raise Unfit("broken_row", row.problem or "not a JSON object")
        if shape.layout not in _CONVERSIONS:
            raise Unfit("broken_row", "the shape of its source is not known")
        cells = _Cells(row.value, shape, dict(shape.columns), row.origin, row.pads_with_nulls)
        record = _CONVERSIONS[shape.layout](cells)
        return replace(record, prompt=tuple(with_system(system, list(record.prompt), where_system)))
    except Unfit as unfit:
        return Problem(unfit.kind, unfit.message, row.origin)


@dataclass(frozen=True)
class _Cells:
    """A row's cells by role."""

    value: dict[str, Any]
    shape: Shape
    columns: dict[str, str]
    origin: RowId
    pads_with_nulls: bool = False

    def where(self, role: str) -> str:
        return f"`{short(self.columns.get(role, role))}`"

    def has(self, role: str) -> bool:
        return self.columns.get(role) in self.value

    def find(self, role: str) -> Any:
        """The cell, or None where there is none."""
        value = self.value.get(self.columns.get(role, role))
        return without_nulls(value) if self.pads_with_nulls else value

    def need(self, role: str) -> Any:
        if not self.has(role):
            raise Unfit("missing_field", f"{self.where(role)} is missing")
        if (value := self.find(role)) is None:
            raise Unfit("null_field", f"{self.where(role)} is null")
        return value

    def others(self) -> dict[str, Any]:
        """The cells that have no role, by their columns."""
        used = set(self.columns.values())
        return {name: value for name, value in self.value.items() if name not in used}

    def dialogue(self, role: str) -> list[Message]:
        return read_dialogue(self.need(role), self.where(role), self.shape.writing)

    def answer(self, role: str) -> list[Message]:
        return read_answer(self.need(role), self.where(role), self.shape.writing)

    def prompt(self) -> list[Message]:
        """The prompt without the text of a system column."""
        value, where = self.need("prompt"), self.where("prompt")
        if isinstance(value, list):
            return messages(value, where, self.shape.writing)
        if not isinstance(value, str):
            return [message("user", value, where)]
        more = self.find("input") if "input" in self.columns else None
        if more is None or more == "":
            return read_prompt(value, where, self.shape.writing)
        parts = [message("user", value, where), message("user", more, self.where("input"), may_be_empty=True)]
        return [message("user", "\n\n".join(part["content"] for part in parts if part["content"].strip()), where)]

    def with_system(self, prompt: list[Message]) -> list[Message]:
        return with_system(self.find("system"), prompt, self.where("system"))


def _pair(cells: _Cells) -> Preference:
    chosen, rejected = cells.need("chosen"), cells.need("rejected")
    where = (cells.where("chosen"), cells.where("rejected"))
    if _brings_its_prompt(cells, chosen, rejected):
        split = part_transcripts if isinstance(chosen, str) else part
        prompt, *answers = split(cells.dialogue("chosen"), cells.dialogue("rejected"), where)
        where_prompt = f"the prompt in {where[0]}"
    else:
        role = "messages" if cells.shape.layout == "turns" else "prompt"
        prompt = cells.dialogue(role) if role == "messages" else cells.prompt()
        answers = [cells.answer("chosen"), cells.answer("rejected")]
        where_prompt = cells.where(role)
    return _checked_pair(cells, prompt, answers, (*where, where_prompt))


def _brings_its_prompt(cells: _Cells, chosen: Any, rejected: Any) -> bool:
    """Whether the answers are whole conversations; what stands in a prompt column then is not put before them again."""
    if cells.shape.layout == "conversations":
        return True
    any_list = isinstance(chosen, list) or isinstance(rejected, list)
    if cells.shape.layout == "turns" or not any_list:
        return False
    return not cells.has("prompt") or (is_dialogue(chosen) and is_dialogue(rejected))


def _voted(cells: _Cells) -> Preference:
    """The better answer is that of the majority of the votes that were given."""
    names = vote_columns(cells.columns["vote"], cells.value)
    given = {name: cells.value[name] for name in names if cells.value.get(name) is not None}
    if not given:
        cells.need("vote")
    votes = {name: as_vote(value) for name, value in given.items()}
    for name, vote in votes.items():
        if vote is None:
            raise Unfit("bad_label", f"`{short(name)}` is {_value_text(given[name])}, not 1 or 2 (0: a tie)")
    for_first, for_second = (list(votes.values()).count(answer) for answer in (1, 2))
    if for_first == for_second:
        raise Unfit("tie", "the votes do not prefer one answer")
    first, second = ("output_1", "output_2") if for_first > for_second else ("output_2", "output_1")
    where = (cells.where(first), cells.where(second), cells.where("prompt"))
    answers = [cells.answer(first), cells.answer(second)]
    return _checked_pair(cells, cells.prompt(), answers, where)


def _checked_pair(
    cells: _Cells, prompt: list[Message], answers: Sequence[list[Message]], where: tuple[str, str, str]
) -> Preference:
    """The pair; `where` names chosen, rejected and prompt."""
    prompt = cells.with_system(prompt)
    check_pair(answers, where)
    check_prompt(prompt, where[2])
    chosen, rejected = map(tuple, answers)
    return Preference(tuple(prompt), chosen, rejected, cells.origin, ratings(cells.value))


def _unpaired(cells: _Cells) -> Unpaired:
    if (label := as_flag(cells.need("label"))) is None:
        shown = _value_text(cells.need("label"))
        raise Unfit("bad_label", f"{cells.where('label')} is {shown}, not true or false")
    if cells.shape.layout == "labelled messages":
        where = cells.where("messages")
        prompt, completion = part_answer(cells.dialogue("messages"))
    else:
        where = cells.where("completion")
        prompt, completion = cells.prompt(), cells.answer("completion")
        check_prompt(prompt, cells.where("prompt"))
    check_answer(completion, where)
    prompt = cells.with_system(prompt)
    check_prompt(prompt, where)
    return Unpaired(tuple(prompt), tuple(completion), label, cells.origin)


def _prompt(cells: _Cells) -> Prompt:
    role = "messages" if cells.shape.layout == "opening messages" else "prompt"
    prompt = cells.with_system(cells.dialogue(role) if role == "messages" else cells.prompt())
    check_prompt(prompt, cells.where(role))
    return Prompt(tuple(prompt), cells.others(), cells.origin)


def _sentences(cells: _Cells) -> Prompt:
    sentences, where = cells.need("sentences"), cells.where("sentences")
    if not isinstance(sentences, list):
        raise Unfit("not_text", f"{where} is {json_type(sentences)}, not a list of sentences")
    texts = [message("user", sentence, where, may_be_empty=True)["content"].strip() for sentence in sentences]
    prompt = cells.with_system([message("user", " ".join(text for text in texts if text), where)])
    return Prompt(tuple(prompt), cells.others(), cells.origin)


def _value_text(value: Any) -> str:
    """A value as a message shows it: numbers and strings as they are, of others what they are."""
    if isinstance(value, str | float) or (type(value) is int and abs(value) < 10**9):
        return f"`{short(value)}`"
    return json_type(value)


_CONVERSIONS: dict[str, Callable[[_Cells], Record]] = {
    **dict.fromkeys(("text", "messages", "conversations", "turns"), _pair),
    "votes": _voted,
    **dict.fromkeys(("labelled text", "labelled messages"), _unpaired),
    **dict.fromkeys(("prompts", "opening messages"), _prompt),
    "sentences": _sentences,
}
