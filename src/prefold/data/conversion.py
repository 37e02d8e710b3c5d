"""One row in a known shape -> a record, or the first thing that is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from prefold.data.cells import (
    MISSING,
    cell_at,
    has_cell,
    is_empty,
    is_history,
    is_texts,
    is_turns,
    need_list,
    read_if_text,
    template_kwargs,
)
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
    check_prompt,
    message,
    messages,
    short,
    with_system,
)
from prefold.data.shapes import Shape, is_dialogue
from prefold.data.votes import as_flag, as_vote, margin_of, ratings, vote_columns
from prefold.errors import json_type
from prefold.recipe.values import as_number


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
        if media := next((name for name in shape.media if not is_empty(read_if_text(row.value.get(name)))), None):
            raise Unfit("media", f"`{media}` is filled, and only text is trained on")
        cells = _Cells(row.value, shape, dict(shape.columns), row.origin)
        record = _CONVERSIONS[shape.layout](cells)
        prompt = tuple(with_system(system, list(record.prompt), where_system))
        return replace(record, prompt=prompt, template_kwargs=cells.template_kwargs())
    except Unfit as unfit:
        return Problem(unfit.kind, unfit.message, row.origin)


@dataclass(frozen=True)
class _Cells:
    """A row's cells by role."""

    value: dict[str, Any]
    shape: Shape
    columns: dict[str, str]
    origin: RowId

    def where(self, role: str) -> str:
        return f"`{short(self.columns.get(role, role))}`"

    def has(self, role: str) -> bool:
        return role in self.columns and has_cell(self.value, self.columns[role])

    def find(self, role: str) -> Any:
        """The cell, or None where there is none."""
        column = self.columns.get(role)
        if column is None or (cell := cell_at(self.value, column)) is MISSING:
            return None
        return need_list(cell, self.where(role)) if column in self.shape.parsed and isinstance(cell, str) else cell

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
        """The prompt with the rounds before it, without the text of a system column."""
        prompt, where = self._last_prompt(), self.where("history")
        if is_empty(rounds := read_if_text(self.find("history"))):
            return prompt
        if not is_history(rounds):
            raise Unfit("bad_message", f"{where} is no list of earlier rounds")
        if is_turns(rounds):
            earlier = messages(rounds, where, "ShareGPT" if "from" in rounds[0] else "plain")
        else:
            said = zip(("user", "assistant") * len(rounds), chain.from_iterable(rounds), strict=True)
            earlier = [message(role, text, where) for role, text in said]
        start = 1 if prompt[0]["role"] == "system" else 0
        return [*prompt[:start], *earlier, *prompt[start:]]

    def _last_prompt(self) -> list[Message]:
        value, where = self.need("prompt"), self.where("prompt")
        if isinstance(value, list):
            return messages(value, where, self.shape.writing)
        if not isinstance(value, str):
            return [message("user", value, where)]
        more = self.find("input")
        if more is None or more == "":
            return read_prompt(value, where, self.shape.writing)
        parts = [message("user", value, where), message("user", more, self.where("input"), may_be_empty=True)]
        return [message("user", "\n\n".join(part["content"] for part in parts if part["content"].strip()), where)]

    def template_kwargs(self) -> dict[str, Any]:
        where = (self.where("tools"), self.where("chat_template_kwargs"))
        return template_kwargs(self.find("tools"), self.find("chat_template_kwargs"), where)

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
        if cells.shape.repeats_prompt:
            start = cells.need("prompt")
            answers = [_behind_prompt(answer, start, name) for answer, name in zip(answers, where, strict=True)]
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


def _behind_prompt(answer: list[Message], prompt: str, where: str) -> list[Message]:
    text = answer[0]["content"]
    if not text.startswith(prompt):
        raise Unfit("prompts_differ", f"{where} does not begin with the prompt, as those of other rows do")
    return [message("assistant", text[len(prompt) :], f"what follows the prompt in {where}")]


def _voted(cells: _Cells) -> Preference:
    """The better answer is that of the majority of the votes that were given."""
    names = vote_columns(cells.columns["vote"], cells.value)
    given = {name: cell for name in names if (cell := cell_at(cells.value, name)) not in (None, MISSING)}
    if not given:
        cells.need("vote")
    values = cells.shape.values
    votes = {name: as_vote(cell, values) for name, cell in given.items()}
    for name, vote in votes.items():
        if vote is None:
            expected = "1 or 2 (0: a tie)" if values is None else "a value that stands for an answer"
            raise Unfit("bad_label", f"`{short(name)}` is {_value_text(given[name])}, not {expected}")
    for_first, for_second = (list(votes.values()).count(answer) for answer in (1, 2))
    if for_first == for_second:
        raise Unfit("tie", "the votes do not prefer one answer")
    order = ("output_1", "output_2") if for_first > for_second else ("output_2", "output_1")
    scores = [as_number(cells.find(role.replace("output", "score"))) for role in order]
    if None not in scores:
        return _of_two(cells, order, (scores[0] or 0.0, scores[1] or 0.0))
    margins = [margin for cell in given.values() if (margin := margin_of(cell, values)) is not None]
    return _of_two(cells, order, (margins[0], 0.0) if len(margins) == 1 else None)


def _scored(cells: _Cells) -> Preference:
    """The better answer is that of the higher score."""
    scores = [as_number(cells.need(role)) for role in ("score_1", "score_2")]
    for role, score in zip(("score_1", "score_2"), scores, strict=True):
        if score is None:
            raise Unfit("bad_label", f"{cells.where(role)} is {_value_text(cells.need(role))}, not a number")
    first, second = (score or 0.0 for score in scores)
    if first == second:
        raise Unfit("tie", f"{cells.where('score_1')} and {cells.where('score_2')} are the same")
    order = ("output_1", "output_2") if first > second else ("output_2", "output_1")
    # Of winners it is said that they won, not by how much.
    is_winner = cells.columns["score_1"].startswith("winner")
    return _of_two(cells, order, None if is_winner else (max(first, second), min(first, second)))


def _of_two(cells: _Cells, order: tuple[str, str], rated: tuple[float, float] | None) -> Preference:
    """The pair of two outputs, the better one first."""
    where = (cells.where(order[0]), cells.where(order[1]))
    if cells.shape.layout.startswith("parallel"):
        chosen, rejected = (_alternating(cells, role) for role in order)
        prompt, *answers = part_transcripts(chosen, rejected, where)
    else:
        prompt, answers = cells.prompt(), [cells.answer(role) for role in order]
    pair = _checked_pair(cells, prompt, answers, (*where, cells.where("prompt")))
    return replace(pair, ratings=pair.ratings or rated)


def _alternating(cells: _Cells, role: str) -> list[Message]:
    """Prompts and as many answers as a dialogue."""
    lists = [cells.need("prompt"), cells.need(role)]
    for texts, name in zip(lists, ("prompt", role), strict=True):
        if not is_texts(texts):
            raise Unfit("bad_message", f"{cells.where(name)} is {json_type(texts)}, not a list of texts")
    if len(lists[0]) != len(lists[1]):
        raise Unfit("bad_message", f"{cells.where(role)} has not one answer to each prompt")
    return [
        message(speaker, text, cells.where(name))
        for texts in zip(*lists, strict=True)
        for speaker, name, text in zip(("user", "assistant"), ("prompt", role), texts, strict=True)
    ]


def _answered(cells: _Cells) -> Preference:
    """The answer that a dialogue ends with is chosen; the rejected one stands beside it, alone or in a dialogue."""
    where = (cells.where("messages"), cells.where("rejected"))
    dialogue = cells.dialogue("messages")
    if is_dialogue(cells.need("rejected")):
        prompt, *answers = part(dialogue, cells.dialogue("rejected"), where)
    else:
        rejected = cells.answer("rejected")
        # A lone answer stands for the last one; one that calls tools, for all that follows the question.
        prompt, chosen = part_answer(dialogue, ("assistant",) if len(rejected) == 1 else ("assistant", "tool"))
        answers = [chosen, rejected]
    return _checked_pair(cells, prompt, answers, (*where, where[0]))


def _answered_text(cells: _Cells) -> Preference:
    answers = [cells.answer("completion"), cells.answer("rejected")]
    where = (cells.where("completion"), cells.where("rejected"), cells.where("prompt"))
    return _checked_pair(cells, cells.prompt(), answers, where)


def _checked_pair(
    cells: _Cells, prompt: list[Message], answers: Sequence[list[Message]], where: tuple[str, str, str]
) -> Preference:
    """The pair; `where` names chosen, rejected and prompt."""
    prompt = cells.with_system(prompt)
    bare = [[turn | {"content": turn["content"].strip()} for turn in answer] for answer in answers]
    if bare[0] == bare[1]:
        raise Unfit("identical", f"{where[0]} and {where[1]} are the same")
    check_answer(answers[0], where[0])
    check_answer(answers[1], where[1])
    check_prompt(prompt, where[2])
    chosen, rejected = map(tuple, answers)
    return Preference(tuple(prompt), chosen, rejected, cells.origin, ratings(cells.value))


def _unpaired(cells: _Cells) -> Unpaired:
    label = _label(cells)
    if cells.shape.layout == "labelled messages":
        where = cells.where("messages")
        prompt, completion = part_answer(cells.dialogue("messages"), ("assistant", "tool"))
    else:
        where = cells.where("completion")
        prompt, completion = cells.prompt(), cells.answer("completion")
        check_prompt(prompt, cells.where("prompt"))
    check_answer(completion, where)
    prompt = cells.with_system(prompt)
    check_prompt(prompt, where)
    return Unpaired(tuple(prompt), tuple(completion), label, cells.origin)


def _label(cells: _Cells) -> bool:
    cell, values = cells.need("label"), cells.shape.values
    if values is None:
        label, expected = as_flag(cell), "true or false"
    else:
        meaning, expected = values.meaning_of(cell), "a value that stands for wanted or not"
        # What lies between wanted and unwanted on a scale of numbers says nothing.
        if meaning == "tie" or (meaning is None and as_number(cell) is not None):
            raise Unfit("tie", f"{cells.where('label')} says neither wanted nor unwanted")
        label = None if meaning is None else meaning == "desirable"
    if label is None:
        raise Unfit("bad_label", f"{cells.where('label')} is {_value_text(cell)}, not {expected}")
    return label


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
    **dict.fromkeys(("votes", "parallel lists, votes"), _voted),
    **dict.fromkeys(("scores", "parallel lists, scores"), _scored),
    "answered messages": _answered,
    "answered text": _answered_text,
    **dict.fromkeys(("labelled text", "labelled messages"), _unpaired),
    **dict.fromkeys(("prompts", "opening messages"), _prompt),
    "sentences": _sentences,
}
