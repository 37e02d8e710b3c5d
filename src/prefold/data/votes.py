"""Votes, scores and labels: cells that say which answer is better, by how much, or whether one is wanted.

A source is refused if the meaning of its values is uncertain. It is certain for the votes 1 and 2 (0 and 1.5 are ties,
what is between goes to the nearer answer), words that name an answer, columns of well-known sets whose scale is
documented, and the labels true and false. For anything else the source has to set `values`.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from prefold.data.cells import listed
from prefold.data.forms import is_scalar
from prefold.data.preference import short
from prefold.errors import UserError
from prefold.recipe.values import Value, Values, as_number

_ANNOTATOR = re.compile(r"annotator_?\d+")
_FLAGS = {"true": True, "false": False, "1": True, "0": False}
_STEMS = ("", "model", "assistant", "response", "output", "answer", "completion", "option", "candidate")
_TIES: list[Value] = [
    *("tie", "tie (bothbad)", "tie(bothbad)", "tie (both bad)", "both_bad", "bothbad", "both bad", "both", "neither"),
    *("draw", "equal", "same"),
]


def _words(*ends: str) -> list[str]:
    return [f"{stem}{joint}{end}" for stem in _STEMS for joint in ("_", " ", "") for end in ends if stem or not joint]


_BY_LETTER = Values(first=[*_words("a"), "first"], second=[*_words("b"), "second"], tie=_TIES)
_BY_NUMBER = Values(first=[*_words("1"), "first"], second=[*_words("2"), "second"], tie=_TIES)
_LABELS = Values(
    desirable=["desirable", "good", "chosen", "accepted", "preferred", "positive", "yes", "thumbs_up", "thumbs up"],
    undesirable=["undesirable", "bad", "rejected", "dispreferred", "negative", "no", "thumbs_down", "thumbs down"],
)
_SIGNED, _FROM_0 = Values(first="< 0", second="> 0", tie=0), Values(first=0, second=1)
# The two answers and the vote of a well-known set -> a further column of the set, and what its votes mean.
_SETS = {
    ("response1", "response2", "overall_preference"): ("context", _SIGNED),
    ("response_1", "response_2", "preference_strength"): ("prompt", _SIGNED),
    ("response_0", "response_1", "better_response_id"): ("prompt", _FROM_0),
    ("response_0", "response_1", "safer_response_id"): ("prompt", _FROM_0),
    ("human_ref_A", "human_ref_B", "labels"): ("history", Values(first=1, second=0)),
}


def as_vote(value: Any, values: Values | None = None) -> int | None:
    """1 or 2 for the better answer, 0 for a tie, None if the value is not a vote."""
    if values is not None:
        return {"first": 1, "second": 2, "tie": 0}.get(values.meaning_of(value) or "")
    # `as_number` takes no bool: `true` does not say which of the two.
    number = as_number(value)
    if number in (0, 1.5):
        return 0
    return None if number is None or not 1 <= number <= 2 else 1 if number < 1.5 else 2


def as_flag(value: Any) -> bool | None:
    """True or false, also from 1 and 0; None if the value is neither."""
    if isinstance(value, str) and len(value) <= 24:
        return _FLAGS.get(value.strip().lower())
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    return None


def margin_of(vote: Any, values: Values | None) -> float | None:
    """By how much a vote on a signed scale prefers its answer; None on any other scale."""
    number = as_number(vote)
    return abs(number) if values is not None and number is not None and values.signed else None


def vote_columns(column: str, value: Mapping[str, Any]) -> list[str]:
    """The columns of a row with its votes: `column`; if that is the first annotator's, those of all annotators."""
    if column not in ("annotator1", "annotator_1"):
        return [column]
    return [name for name in value if _ANNOTATOR.fullmatch(name)] or [column]


# ---- what the values of a column mean ---------------------------------------------------------------------------


def scale_of_votes(
    votes: Sequence[Any], vote: str, outputs: tuple[str, str], columns: Iterable[str], source: str
) -> Values | None:
    """What the votes of a column mean; None for 1 and 2.

    Args:
        votes: cells of the first rows; those that cannot be votes are ignored (see `is_scalar`).
        outputs: the columns of the two answers.
        columns: all that the source has.

    Raises:
        UserError: it is uncertain which answer the votes mean.
    """
    known = list(filter(is_scalar, votes))
    numbers = [cell for cell in known if as_number(cell) is not None]
    ends = (output[-1:].lower() for output in outputs)
    # How the columns of the two answers are numbered; `plain`: from 1, or not at all.
    order = {"01": "from 0", "10": "crossed", "21": "crossed", "ba": "crossed"}.get("".join(ends), "plain")
    further, documented = _SETS.get((*outputs, vote), ("", None))
    if documented is not None and further in columns:
        if known and all(as_vote(cell, documented) is not None for cell in known):
            return documented
    # A few words among numbers are mistakes in their rows, which are left out.
    elif len(numbers) > len(known) / 2:
        from_1 = list(map(as_vote, numbers))
        # In votes of several people 0 is a tie by convention; elsewhere 0 may be the first answer, and 2 a tie.
        by_convention = _ANNOTATOR.fullmatch(vote) or (2 in from_1 and vote in ("label", "preference"))
        may_count_from_0 = 0 in map(as_number, numbers) and not by_convention
        # The column of a well-known set without that set's other columns is not known to count from 1.
        is_of_set = any(vote == of_set for _, _, of_set in _SETS)
        if None not in from_1 and order == "plain" and not may_count_from_0 and not is_of_set:
            return None
    elif known:
        # Not validated, because columns may have any names.
        named = Values.model_construct(first=outputs[0], second=outputs[1], tie=_TIES)
        words = {"plain": [named, _BY_LETTER, _BY_NUMBER], "from 0": [named, _BY_LETTER], "crossed": [named]}[order]
        for values in words:
            if all(as_vote(cell, values) is not None for cell in known):
                return values
    raise _unclear(known, vote, f"which of {listed(outputs)} is better", source, ("first", "second"))


def scale_of_labels(labels: Sequence[Any], column: str, source: str) -> Values | None:
    """What the labels of a column mean; None for true and false. Raises UserError: it is uncertain."""
    known = list(filter(is_scalar, labels))
    numbers = {number for cell in known if (number := as_number(cell)) is not None}
    # 1 and 0 are true and false alone; on a scale of more numbers 1 may be the lowest.
    is_scale = bool(numbers & {0, 1} and numbers - {0, 1})
    if sum(as_flag(cell) is not None for cell in known) > len(known) / 2 and not is_scale:
        return None
    if known and all(_LABELS.meaning_of(cell) for cell in known):
        return _LABELS
    raise _unclear(known, column, "which answers are wanted", source, ("desirable", "undesirable"))


def require_decided(cells: Sequence[Any], column: str, values: Values, source: str) -> None:
    """Raises UserError: `values` of the recipe names none of a column's values."""
    known = list(filter(is_scalar, cells))
    if known and not any(values.meaning_of(cell) not in (None, "tie") for cell in known):
        what = f"`{short(column)}` holds {_counts(known)}\n    and `values` names none of them"
        raise UserError(what, where=source, advice="write the values as the file has them")


def _unclear(known: Sequence[Any], column: str, question: str, source: str, sides: tuple[str, str]) -> UserError:
    numbers = [number for cell in known if (number := as_number(cell)) is not None]
    if numbers and min(numbers) < 0 < max(numbers):
        example = (['"< 0"', '"> 0"'] if sides[0] == "first" else ['"> 0"', '"< 0"']) + ["0"] * (0 in numbers)
    elif len(set(numbers)) > 2:
        example = [f'">= {max(numbers):g}"', f'"<= {min(numbers):g}"']
    else:
        seen = [short(json.dumps(cell, ensure_ascii=False)) for cell in dict.fromkeys(known)]
        example = [*sorted(seen[:2]), "ANOTHER"][:2]
    line = ", ".join(f"{name}: {value}" for name, value in zip((*sides, "tie"), example, strict=False))
    what = f"`{short(column)}` holds {_counts(known)}\n    which does not say for sure {question}"
    advice = f"say it beside `path`, such as (or the other way round)\n    values: {{{line}}}"
    return UserError(what, where=source, advice=advice)


def _counts(cells: Sequence[Any]) -> str:
    if not cells:
        return "nothing in the first rows,"
    counted = Counter(short(str(cell)) for cell in cells)
    shown = [f"{value} ({count})" for value, count in counted.most_common(6)]
    shown[0] = shown[0][:-1] + (" row)" if counted.most_common(1)[0][1] == 1 else " rows)")
    lines = textwrap.wrap(", ".join(shown) + (", ..." if len(counted) > 6 else ""), 60)
    return "\n    ".join(lines)


# ---- ratings ----------------------------------------------------------------------------------------------------

_RATING = re.compile(r"(?:(chosen|rejected)_(?:score|rating|reward)|(?:score|rating|reward)_(chosen|rejected))")


def ratings(value: Mapping[str, Any]) -> tuple[float, float] | None:
    """A row's ratings of chosen and rejected, in columns such as `chosen-rating` or `score_chosen`, its own or those of
    an object in it (`metadata`); None if it does not rate both. A `margin` alone is the rating of chosen, with 0 for
    rejected."""
    rated: dict[str, float] = {}
    for cells in (value, *(cell for cell in value.values() if isinstance(cell, dict))):
        for name, cell in cells.items():
            if (side := _rated_side(name)) and (number := as_number(cell)) is not None:
                rated.setdefault(side, number)
    if len(rated) == 2:
        return rated["chosen"], rated["rejected"]
    margin = as_number(value.get("margin"))
    return None if margin is None else (margin, 0.0)


def is_rating(column: str, cell: Any) -> bool:
    """Whether a column, or a field of an object in it, is a rating."""
    return column == "margin" or any(map(_rated_side, (column, *(cell if isinstance(cell, dict) else ()))))


# Cached, because it is called for every column of every row.
@lru_cache(maxsize=1000)
def _rated_side(column: Any) -> str:
    """Which answer a column rates, `chosen` or `rejected`; empty for none."""
    match = _RATING.fullmatch(str(column).lower().replace("-", "_"))
    return (match[1] or match[2]) if match else ""
