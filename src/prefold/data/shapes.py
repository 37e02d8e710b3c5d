"""The shape of a source, recognised by the columns of its first rows and by what is in them.

A shape is a layout (which columns hold what) in one of the ways in which turns are written (`preference.Writing`). The
layouts are the table `_LAYOUTS`; a new one is an entry there and a conversion in `conversion`.
"""

from __future__ import annotations

import itertools
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from prefold.data import dialogues, rankings
from prefold.data.formats import RawRow
from prefold.data.preference import Writing, short
from prefold.data.votes import as_flag, as_vote, is_first_annotator
from prefold.errors import UserError, did_you_mean, json_type

Kind = Literal["pairs", "unpaired", "prompts"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_ROWS_LOOKED_AT = 20
_VOTES_TO_JUDGE = 10


Columns = tuple[tuple[str, str], ...]
"""Pairs of (our role, the file's column)."""


@dataclass(frozen=True)
class Shape:
    """What a source's columns hold."""

    layout: str
    kind: Kind
    columns: Columns = ()
    writing: Writing = "plain"

    @property
    def name(self) -> str:
        return self.layout if self.writing == "plain" else f"{self.layout}, {self.writing}"


@dataclass(frozen=True)
class _Layout:
    """`cells`: the form that each role's cell must have; `aside`: roles that may be named, but are not used."""

    name: str
    kind: Kind
    cells: Mapping[str, Callable[[Any], bool]]
    meaning: str
    aside: tuple[str, ...] = ()

    @property
    def roles(self) -> set[str]:
        extra = {"system", "input"} if "prompt" in self.cells else {"system"}
        return {*self.cells, *self.aside} | extra


def _speaker(turn: Any) -> Any:
    """Who speaks in a turn; None if it is none."""
    return turn.get("role", turn.get("from")) if isinstance(turn, dict) else None


def _assistant_speaks(turn: Any) -> bool:
    return _speaker(turn) in ("assistant", "gpt")


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


def _is_bare_text(value: Any) -> bool:
    return isinstance(value, str) and not dialogues.holds_dialogue(value)


def _is_turn_list(value: Any) -> bool:
    return isinstance(value, list) and value != [] and bool(_speaker(value[0]))


def _is_opening(value: Any) -> bool:
    """Turns that wait for an answer."""
    return isinstance(value, list) and value != [] and bool(_speaker(value[-1])) and not _assistant_speaks(value[-1])


def _is_answer(value: Any) -> bool:
    return _is_bare_text(value) or _assistant_speaks(value[0] if isinstance(value, list) and value else value)


def is_dialogue(value: Any) -> bool:
    """A dialogue with its prompt."""
    if isinstance(value, str):
        return dialogues.holds_dialogue(value)
    return _is_turn_list(value) and not _assistant_speaks(value[0])


_PROMPT = {"prompt": lambda value: _is_string(value) or _is_opening(value)}
_OPENING = {"messages": _is_opening}
_SENTENCES = {"sentences": lambda value: isinstance(value, list) and value != [] and all(map(_is_string, value))}
_TEXTS = {"chosen": _is_bare_text, "rejected": _is_bare_text}
_ANSWERS = {"chosen": _is_answer, "rejected": _is_answer}
_DIALOGUES = {"chosen": is_dialogue, "rejected": is_dialogue}
_OUTPUTS = {"output_1": _is_answer, "output_2": _is_answer, "vote": lambda value: as_vote(value) is not None}
_COMPLETION = {"completion": _is_answer, "label": lambda value: as_flag(value) is not None}
_TURNS = {"messages": _is_turn_list, "label": _COMPLETION["label"]}
# The first layout that fits wins among those of the same columns.
_LAYOUTS = (
    _Layout("text", "pairs", {"prompt": _is_string, **_TEXTS}, "strings `prompt`, `chosen`, `rejected` (and `system`)"),
    _Layout("messages", "pairs", _PROMPT | _ANSWERS, "`prompt`: list of {role, content}; answers: text or list"),
    _Layout("conversations", "pairs", _DIALOGUES, "`chosen`, `rejected`: lists of messages, prompt first", ("prompt",)),
    _Layout("turns", "pairs", _OPENING | _ANSWERS, "`conversations`: list of turns; answers: one turn each"),
    _Layout("votes", "pairs", _PROMPT | _OUTPUTS, "`instruction`, `output_1`, `output_2`, `label` (1 or 2)"),
    _Layout("labelled text", "unpaired", _PROMPT | _COMPLETION, "`prompt`, `completion`, `label` (true or false)"),
    _Layout("labelled messages", "unpaired", _TURNS, "`messages`: list, answer last; `label` (true or false)"),
    _Layout("prompts", "prompts", _PROMPT, "`prompt` or `question`, and columns for rewards"),
    _Layout("sentences", "prompts", _SENTENCES, "`source`: a list of sentences, and columns for rewards"),
    _Layout("opening messages", "prompts", _OPENING, "`messages`: a list that waits for an answer"),
)
_LIST = {"answers": rankings.is_list_of_answers}
_SIDES = dict.fromkeys(("chosen", "rejected"), lambda value: _is_answer(value) or rankings.is_list_of_answers(value))
_ITEMS = {"answers": rankings.is_list_of_objects}
_CHOICE = {
    "answers": lambda value: rankings.is_list_of_objects(value) or rankings.is_list_of_answers(value),
    "choice": rankings.is_index,
}
_NUMBERS = rankings.is_list_of_numbers
# Come into question where no other layout fits: what is chosen already is not chosen again.
_RANKINGS = (
    _Layout(
        "rated answers",
        "pairs",
        _PROMPT | _ITEMS,
        "`answers`: [{answer, rating | rank}]; or with a list `scores`",
        rankings.ITEM_ROLES,
    ),
    _Layout("answers and ratings", "pairs", _PROMPT | _LIST | {"rating": _NUMBERS}, "lists `responses`, `scores`"),
    _Layout("answers and ranks", "pairs", _PROMPT | _LIST | {"rank": _NUMBERS}, "lists `responses`, `ranks`"),
    _Layout(
        "better and worse", "pairs", _PROMPT | {"better_worse": rankings.is_pair_of_texts}, "`output`: [better, worse]"
    ),
    _Layout("best first", "pairs", _PROMPT | {"best_first": rankings.is_list_of_answers}, "`best_first`: list"),
    _Layout("lists of chosen and rejected", "pairs", _PROMPT | _SIDES, "one a text, one a list"),
    _Layout("answers and choice", "pairs", _PROMPT | _CHOICE, "`answers`, `choice`: an index", ("answer",)),
    _Layout("summaries and choice", "pairs", {"post": rankings.is_post} | _CHOICE, "`info`, `summaries`, `choice`"),
    _Layout("tree", "pairs", {"tree": rankings.is_tree}, "`prompt`: {text, replies: [{text, rank, replies}]}"),
)
_RANKINGS += tuple(replace(layout, kind="prompts") for layout in _RANKINGS if "prompt" not in layout.cells)
# Role -> columns that are taken for it by themselves; the first is what messages call it.
_KNOWN_COLUMNS = {
    "prompt": ("prompt", "question", "instruction", "input"),
    "chosen": ("chosen", "chosen_response", "chatgpt"),
    "rejected": ("rejected", "rejected_response", "llama2-13b-chat"),
    "messages": ("messages", "conversations"),
    "sentences": ("source",),
    "output_1": ("output_1", "output1", "response_1", "response1"),
    "output_2": ("output_2", "output2", "response_2", "response2"),
    "vote": ("label", "preference", "annotator1", "annotator_1"),
    "completion": ("completion", "response", "output"),
    "label": ("label", "kto_tag"),
    "answers": (
        "answers",
        "completions",
        "responses",
        "generations",
        "candidates",
        "candidates_completions",
        "summaries",
        "all_generated_responses",
    ),
    "answer": ("answer",),
    "rating": ("ratings", "scores", "rewards", "rating", "all_rm_scores"),
    "rank": ("ranks", "rank"),
    "better_worse": ("output",),
    "best_first": ("best_first",),
    "choice": ("choice",),
    "post": ("info",),
    "tree": ("prompt",),
}
ROLES = (*_KNOWN_COLUMNS, "system", "input")


def find_shape(
    rows: Sequence[RawRow], source: str, columns: Mapping[str, str] | None = None, kinds: Sequence[Kind] = KINDS
) -> Shape:
    """The shape of a source by its first rows that are objects; layout `unknown` if no row is one.

    Pairs go before unpaired answers, and these before prompts: what a row has besides its prompt is not overlooked.

    Args:
        rows: the first ones will do.
        columns: our role -> the file's column, where it is not to be guessed.
        kinds: those that come into question; with `prompts` alone, the prompts of pairs are found too.

    Raises:
        UserError: `columns` names a role or a column that is not there, no shape fits, or several fit equally.
    """
    values = [row.value for row in rows if row.value is not None]
    named = dict(columns or {})
    _check_named(named, values, source)
    if not values:
        return Shape("unknown", kinds[0])
    first = values[:_ROWS_LOOKED_AT]
    for kind, forgiving in itertools.product([kind for kind in KINDS if kind in kinds], (False, True)):
        fitting = [_fitting(value, kind, named, forgiving) for value in first]
        if any(fitting):
            shape = _most_frequent(fitting, source)
            _check_votes(shape, values, source)
            rankings.require_sure(shape.layout, dict(shape.columns), shape.writing, values, source)
            return shape
    rankings.require_whole_rows([column for value in first for column in value], source)
    raise _no_shape(first, source, named, kinds)


def _fitting(value: dict[str, Any], kind: Kind, named: Mapping[str, str], forgiving: bool) -> list[Shape]:
    """The shapes that fit a row, at most one for the same columns."""
    shapes: dict[Columns, Shape] = {}
    for layout in (*_LAYOUTS, *_RANKINGS):
        if shapes and layout in _RANKINGS:
            break
        if layout.kind == kind and named.keys() <= layout.roles:
            for columns in _assignments(layout, value, named):
                if _fits(layout, value, columns, forgiving):
                    shapes.setdefault(columns, Shape(layout.name, kind, columns, _writing(value, columns)))
    return list(shapes.values())


def _assignments(layout: _Layout, value: dict[str, Any], named: Mapping[str, str]) -> Iterator[Columns]:
    """Every way to find the roles of a layout among a row's columns."""
    for chosen in itertools.product(*_choices(layout, value, named).values()):
        columns = dict(zip(layout.cells, chosen, strict=True))
        extra = {"system": named.get("system", "system")}
        # `input` is more of an instruction; beside another prompt it may be anything.
        if columns.get("prompt") == "instruction" or "input" in named:
            extra["input"] = named.get("input", "input")
        extra |= {role: named[role] for role in rankings.ITEM_ROLES if role in named and role in layout.aside}
        yield tuple((columns | extra).items())


def _choices(layout: _Layout, value: dict[str, Any], named: Mapping[str, str]) -> dict[str, list[str]]:
    """Columns of a row by the roles of a layout that they may have."""
    names = {role: [named[role]] if role in named else [*_KNOWN_COLUMNS[role]] for role in layout.cells}
    if "prompt" in names.keys() - named and (layout.kind == "prompts" or "instruction" in value or "input" in named):
        names["prompt"].remove("input")
    return {role: [name for name in columns if name in value] for role, columns in names.items()}


def _fits(layout: _Layout, value: dict[str, Any], columns: Columns, forgiving: bool) -> bool:
    """Whether the cells have their forms; if forgiving, empty ones may be of any, but not all besides the prompt."""
    cells = {role: value[column] for role, column in columns if role in layout.cells}
    if not forgiving:
        return all(layout.cells[role](cell) for role, cell in cells.items())
    telling = [cell for role, cell in cells.items() if role not in ("prompt", "messages")]
    return any(cell not in (None, []) for cell in telling) and all(
        cell in (None, []) or layout.cells[role](cell) for role, cell in cells.items()
    )


def _writing(value: dict[str, Any], columns: Columns) -> Writing:
    """How turns are written in the cells that could be dialogues."""
    roles = dict(columns)
    for role in ("prompt", "messages", "chosen"):
        cell = value.get(roles.get(role, ""))
        first = cell[0] if isinstance(cell, list) and cell else cell
        if isinstance(first, dict) and "from" in first and "role" not in first:
            return "ShareGPT"
        if isinstance(cell, str) and (role == "prompt" or "prompt" not in roles):
            return dialogues.string_writing(cell)
    return "plain"


def _most_frequent(fitting: Sequence[list[Shape]], source: str) -> Shape:
    counts = Counter(itertools.chain.from_iterable(fitting))
    best = max(counts, key=lambda shape: counts[shape])
    for shapes in fitting:
        rivals = [shape for shape in shapes if counts[shape] == counts[best] and shape.columns != best.columns]
        if best in shapes and rivals:
            raise _ambiguous(best, rivals[0], source)
    return best


def _check_named(named: Mapping[str, str], values: Sequence[dict[str, Any]], source: str) -> None:
    where = f"{source}, `columns`"
    for role in named:
        if role not in ROLES:
            expected = "one of" + "".join(f"\n    {line}" for line in textwrap.wrap(", ".join(ROLES), 70))
            what, advice = f"there is no role `{short(role)}`", did_you_mean(role, ROLES)
            raise UserError(what, where=where, expected=expected, advice=advice)
    present = dict.fromkeys(column for value in values for column in value)
    for role, column in named.items():
        if values and column not in present and role not in rankings.ITEM_ROLES:
            what = f"`{role}: {short(column)}`, but there is no such column"
            advice = did_you_mean(column, map(short, present))
            raise UserError(what, where=where, expected=_shown(present), advice=advice)


def _check_votes(shape: Shape, values: Sequence[dict[str, Any]], source: str) -> None:
    """Refuse votes that count from 0, which would be read as ties."""
    column = dict(shape.columns).get("vote")
    if column is None or is_first_annotator(column):
        return
    votes = [vote for value in values if (vote := as_vote(value.get(column))) is not None]
    # In a few rows there may be ties and no vote for the second by chance.
    if len(votes) >= _VOTES_TO_JUDGE and set(votes) == {0, 1}:
        what = f"`{short(column)}` holds 0 and 1 only: which output does 0 stand for?"
        expected = "1: the first output is better, 2: the second, 0: a tie"
        raise UserError(what, where=source, expected=expected, advice="write 1 and 2 instead of 0 and 1")


def _ambiguous(first: Shape, second: Shape, source: str) -> UserError:
    ways = ""
    for shape in (first, second):
        columns = [column for role, column in shape.columns if role not in ("system", "input")]
        ways += f"\n    {shape.name}: {_listed(columns)}"
    pair = {role: column for role, column in first.columns if (role, column) not in second.columns}
    example = ", ".join(f"{role}: {short(column)}" for role, column in pair.items())
    advice = f"say which by `columns:`, such as {{{example}}}"
    return UserError(f"its columns can be read in more than one way{ways}", where=source, advice=advice)


def _no_shape(
    values: Sequence[dict[str, Any]], source: str, named: Mapping[str, str], kinds: Sequence[Kind]
) -> UserError:
    columns = list(dict.fromkeys(name for value in values for name in value))
    of_kinds = "" if len(kinds) == len(KINDS) else f" of {' or '.join(kinds)}"
    what = f"its columns are no known shape{of_kinds}: {_shown(columns)}" if columns else "its rows have no columns"
    advice = "rename its columns, or say by `columns:` which is what"
    layouts = [layout for layout in (*_LAYOUTS, *_RANKINGS) if layout.kind in kinds]
    layouts = [layout for layout in layouts if named.keys() <= layout.roles] or layouts
    merged = {name: value[name] for value in reversed(values) for name in value}
    choices = [_choices(layout, merged, named) for layout in layouts]
    present = [{role: names[0] for role, names in of_layout.items() if names} for of_layout in choices]
    # A prompt alone is near to no ranking.
    present = [
        {} if layout in _RANKINGS and not roles.keys() - {"prompt", "tree"} else roles
        for layout, roles in zip(layouts, present, strict=True)
    ]
    share = [(len(roles) / len(layout.cells), len(roles)) for layout, roles in zip(layouts, present, strict=True)]
    best = share.index(max(share))
    if present[best]:
        nearest = layouts[best]
        amiss = _amiss(nearest, present[best], merged, named)
        expected = f"nearest is {nearest.name}:\n    {nearest.meaning}\n    {amiss}"
    else:
        expected = "one of" + "".join(f"\n    {layout.name}: {layout.meaning}" for layout in layouts)
    return UserError(what, where=source, expected=expected, advice=advice)


def _amiss(layout: _Layout, present: Mapping[str, str], value: dict[str, Any], named: Mapping[str, str]) -> str:
    """What keeps a row from having a layout, of whose roles it has the `present` ones."""
    if unknown := [role for role in named if role not in layout.roles]:
        return f"but it has no {_listed(unknown)}, which `columns` names"
    if missing := [_KNOWN_COLUMNS[role][0] for role in layout.cells if role not in present]:
        return f"but there is no {_listed(missing)}"
    misfits = [column for role, column in present.items() if not layout.cells[role](value[column])]
    if not misfits:
        return "but no row has all of it"
    return f"but `{short(misfits[0])}` is {json_type(value[misfits[0]])} that does not fit"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{short(name)}`" for name in names)


def _shown(columns: Sequence[str] | Mapping[str, Any]) -> str:
    names = list(columns)
    return _listed(names[:8]) + (", ..." if len(names) > 8 else "")
