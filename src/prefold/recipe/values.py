"""`values:` of a source: what the cells of its vote or label column mean.

A meaning is given by a value, a list of values, or a condition in text: `-1`, `[A, model_a]`, `"< 0"`. A number equals
the text that a .csv file has for it, and texts are compared without regard to case.
"""

from __future__ import annotations

import math
import operator
import re
from functools import cache
from itertools import pairwise
from typing import Any

from pydantic import model_validator

from prefold.recipe.section import Section

Value = bool | int | float | str
_CONDITION = re.compile(r"\s*(<=|>=|<|>)(.*)", re.DOTALL)
_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_LONGEST_NUMBER = 24
"""Characters; a longer text is no number."""


class Values(Section):
    first: Value | list[Value] | None = None
    """Votes for the first answer."""
    second: Value | list[Value] | None = None
    """Votes for the second answer."""
    tie: Value | list[Value] | None = None
    """Votes for neither answer, and labels that say nothing."""
    desirable: Value | list[Value] | None = None
    """Labels of answers that are wanted."""
    undesirable: Value | list[Value] | None = None
    """Labels of answers that are not wanted."""

    @property
    def of_votes(self) -> bool:
        return self.first is not None

    @property
    def signed(self) -> bool:
        """Whether numbers below 0 vote for one answer and those above 0 for the other, so that their size is by how
        much it is preferred."""
        sides = [{self.meaning_of(point) for point in self._points() if sign * point > 0} for sign in (1, -1)]
        sides = [side - {None, "tie"} for side in sides]
        return self.of_votes and len(sides[0]) == len(sides[1]) == 1 and sides[0] != sides[1]

    def meaning_of(self, cell: Any) -> str | None:
        """The name of the field whose values include the cell; None if there is none."""
        return next((name for name, value in self._named() if _is_named(value, cell)), None)

    def _named(self) -> list[tuple[str, Value]]:
        """(field, value) for every value of every field."""
        given = {name: getattr(self, name) for name in type(self).model_fields}
        return [
            (name, value)
            for name, values in given.items()
            if values is not None
            for value in (values if isinstance(values, list) else [values])
        ]

    def _points(self) -> list[float]:
        """Numbers, at least one in each range that the values distinguish."""
        bounds = sorted({bound for _, value in self._named() if (bound := _bound(value)) is not None})
        between = [(low + high) / 2 for low, high in pairwise(bounds)]
        return [*bounds, *between, bounds[0] - 1, bounds[-1] + 1] if bounds else []

    @model_validator(mode="after")
    def each_value_has_one_meaning(self) -> Values:
        given = {name for name in type(self).model_fields if getattr(self, name) not in (None, [])} - {"tie"}
        if given not in ({"first", "second"}, {"desirable", "undesirable"}):
            raise ValueError("give `first` and `second` for votes, or `desirable` and `undesirable` for labels")
        for _, value in self._named():
            if isinstance(value, str) and _CONDITION.fullmatch(value) and _condition(value) is None:
                raise ValueError(f"`{value}` is no condition; write one such as `< 0` or `>= 4`")
        for cell in (*self._points(), *(value for _, value in self._named() if not _is_condition(value))):
            if len(names := list(dict.fromkeys(name for name, value in self._named() if _is_named(value, cell)))) > 1:
                raise ValueError(f"`{cell}` would be both `{names[0]}` and `{names[1]}`")
        return self


def as_number(value: Any) -> float | None:
    """A finite number, also from the text of one; None for anything else, true and false included."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number and not (isinstance(value, str) and len(value) <= _LONGEST_NUMBER):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


@cache
def _condition(text: str) -> tuple[Any, float] | None:
    match = _CONDITION.fullmatch(text)
    bound = as_number(match[2]) if match else None
    return (_COMPARE[match[1]], bound) if match and bound is not None else None


def _is_condition(value: Value) -> bool:
    return isinstance(value, str) and _condition(value) is not None


def _bound(value: Value) -> float | None:
    condition = _condition(value) if isinstance(value, str) else None
    return condition[1] if condition else as_number(value)


def _is_named(value: Value, cell: Any) -> bool:
    number = as_number(cell)
    if isinstance(value, str) and (condition := _condition(value)):
        compare, bound = condition
        return number is not None and compare(number, bound)
    if number is not None:
        return as_number(value) == number
    return isinstance(cell, str | bool) and isinstance(value, str | bool) and _folded(cell) == _folded(value)


def _folded(value: str | bool) -> str:
    return str(value).strip().casefold()
