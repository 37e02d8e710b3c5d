"""One row in a known shape -> its records (a ranking gives several), or the first thing that is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from prefold.data import rankings
from prefold.data.cells import cell_at, is_empty, read_if_text
from prefold.data.dialogues import part, part_answer, part_transcripts, read_dialogue
from prefold.data.formats import RawRow
from prefold.data.forms import is_answer, is_dialogue, is_texts
from prefold.data.layouts import Answer, Layout, Ranking, Row, Shape
from prefold.data.preference import (
    Message,
    Messages,
    Preference,
    Problem,
    Prompt,
    Record,
    Unfit,
    Unpaired,
    check_answer,
    check_pair,
    check_prompt,
    message,
    short,
    with_system,
)
from prefold.data.votes import as_flag, as_vote, margin_of, ratings, vote_columns
from prefold.errors import json_type
from prefold.recipe.values import Values, as_number


def to_records(
    row: RawRow,
    shape: Shape,
    system: str | None = None,
    where_system: str = "`data.system`",
) -> list[Record | Problem]:
    """Convert a row. What is wrong with it is returned as a `Problem`, the first one, and never raised. A ranking gives
    a record or problem for each pair, and a problem for each answer that cannot be used; any other row gives one.

    Args:
        system: a system message for all rows; `where_system` is what messages call the setting.
    """
    try:
        if row.value is None:
            raise Unfit(row.kind or "broken_row", row.problem or "not a JSON object")
        for column in shape.media:
            if not is_empty(read_if_text(row.value.get(column))):
                raise Unfit("media", f"`{column}` is filled, and only text is trained on")
        cells = Row(row.value, shape, row.origin, row.pads_with_nulls)
        made = shape.layout.read(cells)
        results: list[Record | Problem] = _of_rankings(made, cells) if isinstance(made, list) else [made]
        given = cells.template_kwargs()
        for index, result in enumerate(results if system or given else ()):
            if not isinstance(result, Problem):
                prompt = tuple(with_system(system, list(result.prompt), where_system))
                results[index] = replace(result, prompt=prompt, template_kwargs=given)
        return results
    except Unfit as unfit:
        return [unfit.at(row.origin)]


# ---- pairs ------------------------------------------------------------------------------------------------------


def _pair(row: Row) -> Preference:
    chosen, rejected = row.need("chosen"), row.need("rejected")
    where = (row.where("chosen"), row.where("rejected"))
    are_turns = isinstance(chosen, list) or isinstance(rejected, list)
    may_be_whole = are_turns and "messages" not in row.shape.column_of
    # Answers that are whole dialogues contain their prompt; a prompt column is not put before them again.
    if may_be_whole and (not row.has("prompt") or (is_dialogue(chosen) and is_dialogue(rejected))):
        return _of_dialogues(row)
    prompt, where_prompt = row.opening()
    answers = [row.answer("chosen"), row.answer("rejected")]
    if row.shape.repeats_prompt:
        start = row.need("prompt")
        answers = [_without_prompt(answer, start, name) for answer, name in zip(answers, where, strict=True)]
    return _checked_pair(row, prompt, answers, (*where, where_prompt))


def _of_dialogues(row: Row) -> Preference:
    cells, where = [row.need(role) for role in ("chosen", "rejected")], (row.where("chosen"), row.where("rejected"))
    chosen, rejected = (read_dialogue(cell, name, row.shape.writing) for cell, name in zip(cells, where, strict=True))
    prompt, *answers = (part_transcripts if isinstance(cells[0], str) else part)(chosen, rejected, where)
    return _checked_pair(row, prompt, answers, (*where, f"the prompt in {where[0]}"))


def _without_prompt(answer: list[Message], prompt: str, where: str) -> list[Message]:
    text = answer[0]["content"]
    if not text.startswith(prompt):
        raise Unfit("prompts_differ", f"{where} does not begin with the prompt, as those of other rows do")
    return [message("assistant", text[len(prompt) :], f"what follows the prompt in {where}")]


def _voted(row: Row) -> Preference:
    """The answer that most votes prefer is chosen; empty votes and ties do not count."""
    values = row.shape.values
    cells = {name: cell_at(row.value, name) for name in vote_columns(row.shape.column_of["vote"], row.value)}
    given = {name: cell for name, cell in cells.items() if not is_empty(cell)}
    if not given:
        row.need("vote")
        raise Unfit("null_field", f"{row.where('vote')} is empty")
    votes = {name: as_vote(cell, values) for name, cell in given.items()}
    for name, vote in votes.items():
        if vote is None:
            expected = "1 or 2 (0: a tie)" if values is None else "a value that stands for an answer"
            raise Unfit("bad_label", f"`{short(name)}` is {_value_text(given[name])}, not {expected}")
    for_first, for_second = (list(votes.values()).count(answer) for answer in (1, 2))
    if for_first == for_second:
        raise Unfit("tie", "the votes do not prefer one answer")
    better, worse = (1, 2) if for_first > for_second else (2, 1)
    scores = [as_number(row.find(f"score_{number}")) for number in (better, worse)]
    margins = [(margin, 0.0) for cell in given.values() if (margin := margin_of(cell, values)) is not None]
    rated = margins[0] if len(margins) == 1 else None
    if scores[0] is not None and scores[1] is not None:
        rated = scores[0], scores[1]
    return _of_two(row, better, rated)


def _scored(row: Row) -> Preference:
    """The answer with the higher score is chosen."""
    cells = {role: row.need(role) for role in ("score_1", "score_2")}
    scores = []
    for role, cell in cells.items():
        if (score := float(cell) if isinstance(cell, bool) else as_number(cell)) is None:
            raise Unfit("bad_label", f"{row.where(role)} is {_value_text(cell)}, not a number")
        scores.append(score)
    if scores[0] == scores[1]:
        raise Unfit("tie", f"{row.where('score_1')} and {row.where('score_2')} are the same")
    # Columns of winners say who won, not by how much.
    is_winner = row.shape.column_of["score_1"].startswith("winner")
    better = 1 if scores[0] > scores[1] else 2
    return _of_two(row, better, None if is_winner else (max(scores), min(scores)))


def _of_two(row: Row, better: int, rated: tuple[float, float] | None) -> Preference:
    """The pair of the two outputs, with output `better` (1 or 2) as chosen."""
    roles = (f"output_{better}", f"output_{3 - better}")
    where = (row.where(roles[0]), row.where(roles[1]))
    if row.shape.layout.forms["output_1"] is is_answer:
        prompt, answers = row.prompt(), list(map(row.answer, roles))
    else:
        prompt, *answers = part(_output_dialogue(row, roles[0]), _output_dialogue(row, roles[1]), where)
    pair = _checked_pair(row, prompt, answers, (*where, row.where("prompt")))
    return replace(pair, ratings=pair.ratings or rated)


def _output_dialogue(row: Row, role: str) -> list[Message]:
    """An output as a dialogue: a whole one, or the list of prompts and its list of answers, interleaved."""
    if "prompt" not in row.shape.column_of:
        return row.dialogue(role)
    lists = [row.need("prompt"), row.need(role)]
    for texts, name in zip(lists, ("prompt", role), strict=True):
        if not is_texts(texts):
            raise Unfit("bad_message", f"{row.where(name)} is {json_type(texts)}, not a list of texts")
    if len(lists[0]) != len(lists[1]):
        raise Unfit("bad_message", f"{row.where(role)} does not have one answer for each prompt")
    return [
        message(speaker, text, row.where(name))
        for texts in zip(*lists, strict=True)
        for speaker, name, text in zip(("user", "assistant"), ("prompt", role), texts, strict=True)
    ]


def _answered(row: Row) -> Preference:
    """The answer at the end of a dialogue is chosen; the rejected one is in another column, alone or in a dialogue."""
    where = (row.where("messages"), row.where("rejected"))
    dialogue = row.dialogue("messages")
    if is_dialogue(row.need("rejected")):
        prompt, *answers = part(dialogue, row.dialogue("rejected"), where)
    else:
        rejected = row.answer("rejected")
        # A rejected answer of one turn replaces the last turn; one with tool calls, all that follows the question.
        prompt, chosen = part_answer(dialogue, ("assistant",) if len(rejected) == 1 else ("assistant", "tool"))
        answers = [chosen, rejected]
    return _checked_pair(row, prompt, answers, (*where, where[0]))


def _answered_text(row: Row) -> Preference:
    answers = [row.answer("completion"), row.answer("rejected")]
    where = (row.where("completion"), row.where("rejected"), row.where("prompt"))
    return _checked_pair(row, row.prompt(), answers, where)


def _checked_pair(
    row: Row, prompt: list[Message], answers: Sequence[list[Message]], where: tuple[str, str, str]
) -> Preference:
    """The pair, if it is valid; `where`: what messages call chosen, rejected and prompt."""
    prompt = with_system(row.find("system"), prompt, row.where("system"))
    check_pair(answers, where)
    check_prompt(prompt, where[2])
    return Preference(tuple(prompt), tuple(answers[0]), tuple(answers[1]), row.origin, ratings(row.value))


# ---- answers with a label, and prompts --------------------------------------------------------------------------


def _unpaired(row: Row) -> Unpaired:
    label = _label(row)
    if "messages" in row.shape.column_of:
        where = row.where("messages")
        prompt, completion = part_answer(row.dialogue("messages"), ("assistant", "tool"))
    else:
        where = row.where("completion")
        prompt, completion = row.prompt(), row.answer("completion")
        check_prompt(prompt, row.where("prompt"))
    check_answer(completion, where)
    return Unpaired(_checked_prompt(row, prompt, where), tuple(completion), label, row.origin)


def _label(row: Row) -> bool:
    cell, values = row.need("label"), row.shape.values
    if values is None:
        label, expected = as_flag(cell), "true or false"
    else:
        meaning, expected = values.meaning_of(cell), "a value that stands for wanted or not"
        # A number between those for wanted and unwanted is neither.
        if meaning == "tie" or (meaning is None and as_number(cell) is not None):
            raise Unfit("tie", f"{row.where('label')} says neither wanted nor unwanted")
        label = None if meaning is None else meaning == "desirable"
    if label is None:
        raise Unfit("bad_label", f"{row.where('label')} is {_value_text(cell)}, not {expected}")
    return label


def _prompt(row: Row) -> Prompt:
    return _prompt_of(row, *row.opening())


def _shared_opening(row: Row) -> Prompt:
    where = (row.where("output_1"), row.where("output_2"))
    prompt, *_ = part(_output_dialogue(row, "output_1"), _output_dialogue(row, "output_2"), where)
    return _prompt_of(row, prompt, where[0])


def _sentences(row: Row) -> Prompt:
    sentences, where = row.need("sentences"), row.where("sentences")
    if not isinstance(sentences, list):
        raise Unfit("not_text", f"{where} is {json_type(sentences)}, not a list of sentences")
    texts = [message("user", sentence, where, may_be_empty=True)["content"].strip() for sentence in sentences]
    return _prompt_of(row, [message("user", " ".join(filter(None, texts)), where)], where)


def _prompt_of(row: Row, prompt: list[Message], where: str) -> Prompt:
    return Prompt(_checked_prompt(row, prompt, where), row.without_role(), row.origin)


def _checked_prompt(row: Row, prompt: list[Message], where: str) -> Messages:
    prompt = with_system(row.find("system"), prompt, row.where("system"))
    check_prompt(prompt, where)
    return tuple(prompt)


# ---- rankings ---------------------------------------------------------------------------------------------------


def _of_rankings(made: Sequence[Ranking], row: Row) -> list[Record | Problem]:
    results: list[Record | Unfit] = []
    rule = row.shape.rule
    for ranking in made:
        prompt = row.prompt() if ranking.prompt is None else ranking.prompt
        where = row.where("prompt") if ranking.prompt is None else f"the prompt of {ranking.where}"
        try:
            if row.shape.kind == "prompts":
                results.append(_prompt_of(row, prompt, where))
            elif rule.values is not None:
                results += [*_labelled(row, prompt, where, ranking, rule.values), *ranking.unfit]
            else:
                pairs = [_ranked_pair(row, prompt, where, *couple) for couple in rankings.pairs(ranking, row.shape)]
                usable = [pair for pair in pairs if isinstance(pair, Preference)]
                results += [*(_unpaired_of(usable) if rule.unpaired else usable), *ranking.unfit]
                results += [pair for pair in pairs if isinstance(pair, Unfit)]
        except Unfit as unfit:
            results += [*ranking.unfit, *([] if unfit in ranking.unfit else [unfit])]
    return [result.at(row.origin) if isinstance(result, Unfit) else result for result in results]


def _ranked_pair(row: Row, prompt: list[Message], where: str, better: Answer, worse: Answer) -> Preference | Unfit:
    try:
        pair = _checked_pair(row, prompt, (better.turns, worse.turns), (better.where, worse.where, where))
    except Unfit as unfit:
        return unfit
    return replace(pair, ratings=(better.level, worse.level) if row.shape.layout.is_rated else None)


def _labelled(row: Row, prompt: list[Message], where: str, ranking: Ranking, values: Values) -> list[Record]:
    """A record for each answer whose rating means wanted or unwanted. Raises Unfit: there is none, or the prompt or
    one of these answers cannot be used."""
    checked = _checked_prompt(row, prompt, where)
    meanings = [(answer, values.meaning_of(answer.given)) for answer in ranking.answers]
    labelled = [(answer, meaning == "desirable") for answer, meaning in meanings if meaning not in (None, "tie")]
    if not labelled:
        raise Unfit("tie", f"the ratings in {ranking.where} say neither wanted nor unwanted")
    for answer, _ in labelled:
        check_answer(answer.turns, answer.where)
    return [Unpaired(checked, tuple(answer.turns), label, row.origin) for answer, label in labelled]


def _unpaired_of(pairs: Sequence[Preference]) -> list[Record]:
    """The answers of the pairs with their labels, each once."""
    records: list[Record] = []
    for pair in pairs:
        sides = [Unpaired(pair.prompt, pair.answers[i], label, pair.origin) for i, label in enumerate((True, False))]
        records += [side for side in sides if side not in records]
    return records


def _unknown(row: Row) -> Record:
    raise Unfit("broken_row", "the shape of its source is not known")


def _value_text(value: Any) -> str:
    """A value as messages show it: a string or number itself, of anything else the type."""
    if isinstance(value, str | float) or (type(value) is int and abs(value) < 10**9):
        return f"`{short(value)}`"
    return json_type(value)


# ---- layouts ----------------------------------------------------------------------------------------------------

# Of the layouts that fit the same columns, the first wins.
LAYOUTS = (
    Layout("text", "pairs", _pair, "prompt:text chosen:bare rejected:bare",
           "strings `prompt`, `chosen`, `rejected` (and `system`)"),
    Layout("messages", "pairs", _pair, "prompt chosen rejected",
           "`prompt`: list of {role, content}; answers: text or list"),
    Layout("conversations", "pairs", _of_dialogues, "chosen:dialogue rejected:dialogue",
           "`chosen`, `rejected`: lists of messages, prompt first", ("prompt",)),
    Layout("turns", "pairs", _pair, "messages:opening chosen rejected",
           "`conversations`: list of turns; answers: one turn each"),
    Layout("votes", "pairs", _voted, "prompt output_1 output_2 vote",
           "`instruction`, `output_1`, `output_2`, `label` (1 or 2)"),
    Layout("scores", "pairs", _scored, "prompt output_1 output_2 score_1 score_2",
           "a prompt, two answers, and a score of each"),
    Layout("parallel lists, votes", "pairs", _voted, "prompt:texts output_1:texts output_2:texts vote",
           "lists of prompts and of answers, and a vote"),
    Layout("parallel lists, scores", "pairs", _scored, "prompt:texts output_1:texts output_2:texts score_1 score_2",
           "lists of prompts and of answers, and scores"),
    Layout("answered messages", "pairs", _answered, "messages:answered rejected:answer_or_dialogue",
           "`messages`, `rejected_response`", absent=("chosen",)),
    Layout("answered text", "pairs", _answered_text, "prompt completion rejected",
           "`query`, `response`, `rejected_response`", absent=("chosen", "messages")),
    Layout("labelled text", "unpaired", _unpaired, "prompt completion label", "`prompt`, `completion`, `label`"),
    Layout("labelled messages", "unpaired", _unpaired, "messages:answered label",
           "`messages`: list, answer last; `label`"),
    Layout("prompts", "prompts", _prompt, "prompt", "`prompt` or `question`, and columns for rewards"),
    Layout("sentences", "prompts", _sentences, "sentences", "`source`: a list of sentences, and columns"),
    Layout("opening messages", "prompts", _prompt, "messages:opening",
           "`messages`: a list that ends before the answer"),
    Layout("two conversations", "pairs", _voted, "output_1:dialogue output_2:dialogue vote",
           "`conversation_a`, `conversation_b`, and a vote"),
    Layout("opening of two conversations", "prompts", _shared_opening, "output_1:dialogue output_2:dialogue vote",
           "`conversation_a`, `conversation_b`, a vote"),
    Layout("opening of parallel lists", "prompts", _shared_opening, "prompt:texts output_1:texts output_2:texts",
           "lists of prompts and of answers"),
)  # fmt: skip
UNKNOWN = Layout("unknown", "pairs", _unknown, "", "")
