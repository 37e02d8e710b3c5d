"""One row in a known shape -> its records (a ranking gives several), or the first thing that is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

from prefold.data import rankings
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
    check_pair,
    check_prompt,
    message,
    messages,
    short,
    with_system,
    without_nulls,
)
from prefold.data.shapes import Shape, is_dialogue
from prefold.data.votes import as_flag, as_vote, margin_of, ratings, vote_columns
from prefold.errors import json_type
from prefold.recipe.values import Values, as_number


def to_records(
    row: RawRow,
    shape: Shape,
    system: str | None = None,
    where_system: str = "`data.system`",
    rule: rankings.Rule = rankings.BY_DEFAULT,
) -> list[Record | Problem]:
    """Convert a row; whatever is wrong with it comes back as the first `Problem` found, never as an exception. A
    ranking gives a record or problem for each pair, and a problem for each answer that cannot be used; any other row
    gives one.

    Args:
        system: a system message for all rows, from the setting that `where_system` names.
        rule: for rankings.
    """
    try:
        if row.value is None:
            raise Unfit("broken_row", row.problem or "not a JSON object")
        if media := next((name for name in shape.media if not is_empty(read_if_text(row.value.get(name)))), None):
            raise Unfit("media", f"`{media}` is filled, and only text is trained on")
        cells = _Cells(row.value, shape, dict(shape.columns), row.origin, row.pads_with_nulls)
        if shape.layout in rankings.LAYOUTS:
            made = _of_rankings(cells, rule)
        elif shape.layout in _CONVERSIONS:
            made = [_CONVERSIONS[shape.layout](cells)]
        else:
            raise Unfit("broken_row", "the shape of its source is not known")
        more = cells.template_kwargs()
        return [
            result
            if isinstance(result, Problem)
            else replace(
                result, prompt=tuple(with_system(system, list(result.prompt), where_system)), template_kwargs=more
            )
            for result in made
        ]
    except Unfit as unfit:
        return [Problem(unfit.kind, unfit.message, row.origin)]


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
        return role in self.columns and has_cell(self.value, self.columns[role])

    def find(self, role: str) -> Any:
        """The cell, or None where there is none."""
        column = self.columns.get(role)
        if column is None or (cell := cell_at(self.value, column)) is MISSING:
            return None
        cell = need_list(cell, self.where(role)) if column in self.shape.parsed and isinstance(cell, str) else cell
        return without_nulls(cell) if self.pads_with_nulls else cell

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
    given = {name: cell for name in names if not is_empty(cell := cell_at(cells.value, name))}
    if not given:
        cells.need("vote")
        raise Unfit("null_field", f"{cells.where('vote')} is empty")
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
    found = [cells.need(role) for role in ("score_1", "score_2")]
    scores = [float(score) if isinstance(score, bool) else as_number(score) for score in found]
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
        prompt, *answers = part(_alternating(cells, order[0]), _alternating(cells, order[1]), where)
    elif cells.shape.layout == "two conversations":
        prompt, *answers = part(cells.dialogue(order[0]), cells.dialogue(order[1]), where)
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
    check_pair(answers, where)
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


def _shared_opening(cells: _Cells) -> Prompt:
    where = (cells.where("output_1"), cells.where("output_2"))
    read = cells.dialogue if cells.shape.layout == "opening of two conversations" else partial(_alternating, cells)
    prompt = cells.with_system(part(read("output_1"), read("output_2"), where)[0])
    check_prompt(prompt, where[0])
    return Prompt(tuple(prompt), cells.others(), cells.origin)


def _sentences(cells: _Cells) -> Prompt:
    sentences, where = cells.need("sentences"), cells.where("sentences")
    if not isinstance(sentences, list):
        raise Unfit("not_text", f"{where} is {json_type(sentences)}, not a list of sentences")
    texts = [message("user", sentence, where, may_be_empty=True)["content"].strip() for sentence in sentences]
    prompt = cells.with_system([message("user", " ".join(text for text in texts if text), where)])
    return Prompt(tuple(prompt), cells.others(), cells.origin)


def _of_rankings(cells: _Cells, rule: rankings.Rule) -> list[Record | Problem]:
    layout, made = cells.shape.layout, list[Record | Problem]()
    given = {role: cells.need(role) for role in rankings.LAYOUTS[layout].roles}
    for ranking in rankings.read(layout, rankings.Row(given, cells.columns, cells.shape.writing)):
        prompt = cells.prompt() if ranking.prompt is None else ranking.prompt
        where = cells.where("prompt") if ranking.prompt is None else f"the prompt of {ranking.where}"
        records: list[Record] = []
        problems = list(ranking.unfit)
        try:
            if cells.shape.kind == "prompts":
                check_prompt(cells.with_system(prompt), where)
                records, problems = [Prompt(tuple(cells.with_system(prompt)), cells.others(), cells.origin)], []
            elif rule.values is not None:
                records = _labelled(cells, prompt, where, ranking, rule.values)
            else:
                couples = rankings.pairs(ranking, rule, layout)
                pairs = [_ranked_pair(cells, prompt, where, *couple) for couple in couples]
                problems += [pair for pair in pairs if isinstance(pair, Unfit)]
                found = [pair for pair in pairs if isinstance(pair, Preference)]
                records = _unpaired_of(found) if rule.unpaired else [*found]
        except Unfit as unfit:
            problems += [] if unfit in problems else [unfit]
        made += [*records, *(Problem(unfit.kind, unfit.message, cells.origin) for unfit in problems)]
    return made


def _ranked_pair(
    cells: _Cells, prompt: list[Message], where: str, better: rankings.Answer, worse: rankings.Answer
) -> Preference | Unfit:
    try:
        pair = _checked_pair(cells, prompt, (better.turns, worse.turns), (better.where, worse.where, where))
    except Unfit as unfit:
        return unfit
    is_rated = rankings.LAYOUTS[cells.shape.layout].is_rated
    return replace(pair, ratings=(better.level, worse.level) if is_rated else None)


def _labelled(
    cells: _Cells, prompt: list[Message], where: str, ranking: rankings.Ranking, values: Values
) -> list[Record]:
    """Each answer whose rating is wanted or unwanted. Raises Unfit: there is none, or the prompt is not fit."""
    prompt = cells.with_system(prompt)
    check_prompt(prompt, where)
    meanings = [(answer, values.meaning_of(answer.given)) for answer in ranking.answers]
    labelled = [(answer, meaning == "desirable") for answer, meaning in meanings if meaning not in (None, "tie")]
    if not labelled:
        raise Unfit("tie", f"the ratings in {ranking.where} say neither wanted nor unwanted")
    for answer, _ in labelled:
        check_answer(answer.turns, answer.where)
    return [Unpaired(tuple(prompt), tuple(answer.turns), label, cells.origin) for answer, label in labelled]


def _unpaired_of(pairs: Sequence[Preference]) -> list[Record]:
    """Each answer of the pairs once."""
    sides = [(pair, answer, label) for pair in pairs for answer, label in zip(pair.answers, (True, False), strict=True)]
    records = [Unpaired(pair.prompt, answer, label, pair.origin) for pair, answer, label in sides]
    return [record for number, record in enumerate(records) if record not in records[:number]]


def _value_text(value: Any) -> str:
    """A value as a message shows it: numbers and strings as they are, of others what they are."""
    if isinstance(value, str | float) or (type(value) is int and abs(value) < 10**9):
        return f"`{short(value)}`"
    return json_type(value)


_CONVERSIONS: dict[str, Callable[[_Cells], Record]] = {
    **dict.fromkeys(("text", "messages", "conversations", "turns"), _pair),
    **dict.fromkeys(("votes", "two conversations", "parallel lists, votes"), _voted),
    **dict.fromkeys(("scores", "parallel lists, scores"), _scored),
    "answered messages": _answered,
    "answered text": _answered_text,
    **dict.fromkeys(("labelled text", "labelled messages"), _unpaired),
    **dict.fromkeys(("prompts", "opening messages"), _prompt),
    **dict.fromkeys(("opening of two conversations", "opening of parallel lists"), _shared_opening),
    "sentences": _sentences,
}
