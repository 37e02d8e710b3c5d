"""What a layout, a shape and a row are, for those that recognise sources and those that read rows.

A layout says which roles the columns of a row have, and reads it. A source has a shape: a layout, its columns by role,
and the way in which turns are written. The layouts are the tables in `conversion` and `rankings`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, Literal, get_args

from prefold.data.cells import (
    MISSING,
    Form,
    cell_at,
    has_cell,
    is_empty,
    is_history,
    is_turns,
    need_list,
    read_if_text,
    template_kwargs,
)
from prefold.data.dialogues import read_answer, read_dialogue, read_prompt
from prefold.data.preference import (
    Message,
    Record,
    RowId,
    Unfit,
    Writing,
    message,
    messages,
    short,
    with_system,
    without_nulls,
)
from prefold.recipe.values import Values

Kind = Literal["pairs", "unpaired", "prompts"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PairsFrom = Literal["best_worst", "adjacent", "all"]
Columns = tuple[tuple[str, str], ...]
"""Pairs of (our role, the file's column, or a path into one)."""


@dataclass(frozen=True)
class Answer:
    """`given` is the number that the file has; `level` orders the answers, the best highest: a rating, or minus a
    rank."""

    turns: list[Message]
    given: float
    level: float
    where: str


@dataclass(frozen=True)
class Ranking:
    """Answers to a prompt (None: that of the row's prompt column); `unfit` says what is wrong with those left out."""

    answers: list[Answer]
    where: str
    prompt: list[Message] | None = None
    unfit: list[Unfit] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Layout:
    """`forms`: what each role's cell must be; `meaning`: what a message shows; `read` raises Unfit. `aside`: roles that
    may be named, but are not used; `absent`: roles that a row of this layout does not have.

    For rankings: `pairs_from`, where the recipe says nothing; `is_rated`: the numbers that order the answers are the
    row's, not an order alone.
    """

    name: str
    kind: Kind
    read: Callable[[Row], Record | list[Ranking]]
    forms: Mapping[str, Form]
    meaning: str
    aside: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    pairs_from: PairsFrom = "best_worst"
    is_rated: bool = False


@dataclass(frozen=True)
class Shape:
    """What a source's columns hold.

    `parsed` are columns with lists that are written as text; `repeats_prompt`: both answers begin with the prompt's
    text; `values`: what votes or labels mean, where they are not 1 and 2 or true and false; `media`: columns that make
    a row unfit where they are filled; `unused`: columns that nothing is made of; `not_understood`: those of `tools`,
    `history` and the like that hold something else.
    """

    layout: Layout
    columns: Columns = ()
    writing: Writing = "plain"
    parsed: tuple[str, ...] = ()
    repeats_prompt: bool = False
    values: Values | None = field(default=None, hash=False)
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

    # Every row asks for these.
    @cached_property
    def column_of(self) -> dict[str, str]:
        """The columns by role."""
        return dict(self.columns)

    @cached_property
    def name_of(self) -> dict[str, str]:
        """What messages call the columns, by role."""
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
            cell = need_list(cell, self.where(role))
        return without_nulls(cell) if self.pads_with_nulls else cell

    def find(self, role: str) -> Any:
        """The cell, or None where there is none."""
        cell = self._cell(role)
        return None if cell is MISSING else cell

    def need(self, role: str) -> Any:
        if (cell := self._cell(role)) is MISSING:
            raise Unfit("missing_field", f"{self.where(role)} is missing")
        if cell is None:
            raise Unfit("null_field", f"{self.where(role)} is null")
        return cell

    def without_role(self) -> dict[str, Any]:
        """The cells that have no role, by their columns."""
        used = self.shape.column_of.values()
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
            turns = zip(("user", "assistant") * len(rounds), chain.from_iterable(rounds), strict=True)
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
        tools, kwargs = self.find("tools"), self.find("chat_template_kwargs")
        if tools is None and kwargs is None:
            return {}
        return template_kwargs(tools, kwargs, self.where("tools"), self.where("chat_template_kwargs"))

    def with_system(self, prompt: list[Message]) -> list[Message]:
        return with_system(self.find("system"), prompt, self.where("system"))
