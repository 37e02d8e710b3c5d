"""Layouts, shapes and rows: what the recognition of sources and the reading of rows share.

A layout says which roles the columns of a row have, and how to read the row. A source has a shape: a layout, its
columns by role, and how its turns are written. The tables of layouts are in `conversion` and `rankings`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, Literal, get_args

from prefold.data.cells import MISSING, cell_at, has_cell, is_empty, read_if_text, read_written
from prefold.data.dialogues import read_answer, read_dialogue, read_prompt
from prefold.data.forms import FORMS, Form, is_history, is_kwargs, is_tools, is_turns, tools_in
from prefold.data.preference import Message, Record, RowId, Unfit, Writing, message, messages, short, without_nulls
from prefold.recipe.values import Values

Kind = Literal["pairs", "unpaired", "prompts"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PairsFrom = Literal["best_worst", "adjacent", "all"]
Columns = tuple[tuple[str, str], ...]
"""Pairs of (role, column of the file or path into one)."""
_RESERVED_KEYWORDS = [
    "conversation",
    "messages",
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
]


@dataclass(frozen=True)
class Answer:
    """`given` is the number in the file; `level` orders the answers, the best highest: a rating, or a negated rank."""

    turns: list[Message]
    given: float
    level: float
    where: str


@dataclass(frozen=True)
class Ranking:
    """Answers to a prompt (None: the one in the row's prompt column); `unfit`: what is wrong with those left out."""

    answers: list[Answer]
    where: str
    prompt: list[Message] | None = None
    unfit: list[Unfit] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Layout:
    """`read` raises Unfit. `roles`: those of its columns; `prompt chosen:dialogue` is a prompt in its usual form, and a
    dialogue as `chosen` (see `FORMS`). `meaning`: the layout in messages. `aside`: further roles that `columns` may
    name: a column that is ignored, or keys in the answers of a ranking; `absent`: roles of which a row of this layout
    has no column.

    For rankings: `pairs_from` if the recipe does not set it; `is_rated`: the answers are ordered by numbers in the row.
    """

    name: str
    kind: Kind
    read: Callable[[Row], Record | list[Ranking]]
    roles: str
    meaning: str
    aside: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    pairs_from: PairsFrom = "best_worst"
    is_rated: bool = False

    @cached_property
    def forms(self) -> dict[str, Form]:
        """A test of the cell of each role."""
        named = [part.partition(":") for part in self.roles.split()]
        return {role: FORMS[form or role] for role, _, form in named}


@dataclass(frozen=True)
class Rule:
    """What to make of a ranking: pairs (see `Source.pairs_from` and `Source.min_margin`), or unpaired answers: those of
    the pairs, or those whose rating `values` calls desirable or undesirable."""

    pairs_from: PairsFrom | None = None
    min_margin: float | None = None
    unpaired: bool = False
    values: Values | None = None


@dataclass(frozen=True)
class Shape:
    """What the columns of a source contain.

    `parsed`: columns that store lists as text; `repeats_prompt`: both answers begin with the prompt's text; `values`:
    what votes or labels mean, if not 1 and 2 or true and false; `rule`: what to make of rankings; `media`: columns that
    make a row unfit unless empty; `unused`: columns that are not used; `not_understood`: columns named `tools`,
    `history` and the like that contain something else.
    """

    layout: Layout
    columns: Columns = ()
    writing: Writing = "plain"
    parsed: tuple[str, ...] = ()
    repeats_prompt: bool = False
    values: Values | None = field(default=None, hash=False)
    rule: Rule = field(default=Rule(), hash=False)
    media: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    not_understood: tuple[str, ...] = ()

    @property
    def kind(self) -> Kind:
        return self.layout.kind

    @property
    def name(self) -> str:
        repeats = "prompt repeated in the answers" if self.repeats_prompt else ""
        how = ("" if self.writing == "plain" else self.writing, "written as text" if self.parsed else "", repeats)
        return ", ".join([self.layout.name, *filter(None, how)])

    # Cached, since every row uses them.
    @cached_property
    def column_of(self) -> dict[str, str]:
        """The column of each role."""
        return dict(self.columns)

    @cached_property
    def name_of(self) -> dict[str, str]:
        """What messages call the column of each role."""
        return {role: f"`{short(column)}`" for role, column in self.columns}


@dataclass(slots=True)
class Row:
    """A row's cells by role."""

    value: dict[str, Any]
    shape: Shape
    origin: RowId
    pads_with_nulls: bool = False

    def where(self, role: str) -> str:
        return self.shape.name_of.get(role) or f"`{role}`"

    def has(self, role: str) -> bool:
        return role in self.shape.column_of and has_cell(self.value, self.shape.column_of[role])

    def _cell(self, role: str) -> Any:
        column = self.shape.column_of.get(role)
        if column is None or (cell := cell_at(self.value, column)) is MISSING:
            return MISSING
        if column in self.shape.parsed and isinstance(cell, str):
            cell = read_written(cell) if cell.strip() else None
            if cell is MISSING:
                raise Unfit("bad_message", f"{self.where(role)} is text but not a list, unlike in other rows")
        return without_nulls(cell) if self.pads_with_nulls else cell

    def find(self, role: str) -> Any:
        """The cell of a role; None if there is none."""
        cell = self._cell(role)
        return None if cell is MISSING else cell

    def need(self, role: str) -> Any:
        if (cell := self._cell(role)) is MISSING:
            raise Unfit("missing_field", f"{self.where(role)} is missing")
        if cell is None:
            raise Unfit("null_field", f"{self.where(role)} is null")
        return cell

    def without_role(self) -> dict[str, Any]:
        """The cells of columns without a role."""
        used = self.shape.column_of.values()
        return {name: value for name, value in self.value.items() if name not in used}

    def dialogue(self, role: str) -> list[Message]:
        return read_dialogue(self.need(role), self.where(role), self.shape.writing)

    def answer(self, role: str) -> list[Message]:
        return read_answer(self.need(role), self.where(role), self.shape.writing)

    def opening(self) -> tuple[list[Message], str]:
        """The messages before the answers, in whichever column they are, and what messages call it."""
        role = "messages" if "messages" in self.shape.column_of else "prompt"
        return self.dialogue(role) if role == "messages" else self.prompt(), self.where(role)

    def prompt(self) -> list[Message]:
        """The prompt after the turns of the `history` column; the `system` column is not part of it."""
        prompt, where = self._last_prompt(), self.where("history")
        if is_empty(history := read_if_text(self.find("history"))):
            return prompt
        if not is_history(history):
            raise Unfit("bad_message", f"{where} is not a list of earlier turns")
        if is_turns(history):
            earlier = messages(history, where, "ShareGPT" if "from" in history[0] else "plain")
        else:
            turns = zip(("user", "assistant") * len(history), chain.from_iterable(history), strict=True)
            earlier = [message(role, text, where) for role, text in turns]
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
        """The keywords for the chat template. Raises Unfit: a cell has another form, or a key that no row may set."""
        roles = ("tools", "chat_template_kwargs")
        tools, kwargs = (None if is_empty(cell := read_if_text(self.find(role))) else cell for role in roles)
        if tools is not None and not is_tools(tools):
            raise Unfit("bad_message", f"{self.where('tools')} is not a list of tools")
        if kwargs is not None and not is_kwargs(kwargs):
            raise Unfit("bad_message", f"{self.where(roles[1])} is not an object")
        if taken := sorted({*(kwargs or {})}.intersection(_RESERVED_KEYWORDS)):
            raise Unfit("bad_message", f"{self.where(roles[1])} sets `{taken[0]}`, which a row may not set")
        return (kwargs or {}) | ({} if tools is None else {"tools": tools_in(tools)})
