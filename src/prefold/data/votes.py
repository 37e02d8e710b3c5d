"""Cells that say which answer is better, by how much, or whether one is wanted.

A vote is a number: 1 for the first answer, 2 for the second, 0 for a tie. Between 1 and 2 it is for the nearer one, and
1.5 is a tie. A flag is true or false. Both are also taken from the strings that .csv files make of them.
"""

from __future__ import annotations

import math
import re
from typing import Any

_ANNOTATOR = re.compile(r"annotator_?\d+")
_FLAGS = {"true": True, "false": False, "1": True, "0": False}
_LONGEST_NUMBER = 24


def as_vote(value: Any) -> int | None:
    """1 or 2 for the better answer, 0 for a tie, None for what is no vote."""
    # bool is an int to Python, but `true` says nothing about which of two.
    number = as_number(value)
    if number in (0, 1.5):
        return 0
    return None if number is None or not 1 <= number <= 2 else 1 if number < 1.5 else 2


def as_flag(value: Any) -> bool | None:
    """True or false, also from 1 and 0; None for what is neither."""
    if isinstance(value, str) and len(value) <= _LONGEST_NUMBER:
        return _FLAGS.get(value.strip().lower())
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    return None


def is_first_annotator(column: str) -> bool:
    """Whether a column stands for those of all annotators."""
    return column in ("annotator1", "annotator_1")


def vote_columns(column: str, value: dict[str, Any]) -> list[str]:
    """The columns of a row that hold its votes: `column`, or every annotator's."""
    if not is_first_annotator(column):
        return [column]
    return [name for name in value if _ANNOTATOR.fullmatch(name)] or [column]


_RATING = re.compile(r"(?:(chosen|rejected)_(?:score|rating)|(?:score|rating)_(chosen|rejected))")


def ratings(value: dict[str, Any]) -> tuple[float, float] | None:
    """The numbers that a row gives to chosen and rejected, in columns such as `chosen-rating` or `score_chosen` of its
    own or of an object in it (`metadata`); None if it does not rate both."""
    rated: dict[str, float] = {}
    nested = [cell for cell in value.values() if isinstance(cell, dict)]
    for cells in (value, *nested):
        for name, cell in cells.items():
            match = _RATING.fullmatch(str(name).lower().replace("-", "_"))
            if match and (number := as_number(cell)) is not None:
                rated.setdefault(match[1] or match[2], number)
    return (rated["chosen"], rated["rejected"]) if len(rated) == 2 else None


def as_number(value: Any) -> float | None:
    """A finite number, also from a string that holds one; None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number and not (isinstance(value, str) and len(value) <= _LONGEST_NUMBER):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
