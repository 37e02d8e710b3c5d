"""The two errors that end prefold: the user can correct it (exit code 2), or a stage failed (exit code 1)."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any


class Explained(Exception):
    """An error whose message says everything: no traceback is needed."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows."""
        return [f"{type(self).__name__}: {self}"]


class UserError(Explained):
    """Wrong use: a recipe, file, row or model that cannot be used as it is. Exit code 2, one message, no traceback.

    Args:
        what: what is wrong, in one sentence without a full stop.
        where: file, 1-based row or line, field; whatever applies, already put together ("pairs.jsonl, row 3,
            `chosen`").
        expected: what would have been right.
        advice: what to do now.
    """

    def __init__(self, what: str, *, where: str = "", expected: str = "", advice: str = ""):
        self.what, self.where, self.expected, self.advice = what, where, expected, advice
        lines = [f"{where}: {what}" if where else what]
        lines += [f"  expected: {expected}"] if expected else []
        lines += [f"  to do: {advice}"] if advice else []
        super().__init__("\n".join(lines))


class StageError(Explained):
    """A stage failed although it was used correctly. Exit code 1, one message, no traceback."""


def did_you_mean(name: object, known: Iterable[str], most: int = 1) -> str:
    """The known names nearest to a wrong one, as a question; empty if none is near."""
    near = difflib.get_close_matches(str(name), list(known), n=most)
    return f"did you mean {' or '.join(f'`{match}`' for match in near)}?" if near else ""


def json_type(value: Any) -> str:
    """A value's JSON type in words, with its article."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def joined(names: Sequence[str], most: int, separator: str = ", ") -> str:
    """Names in a sentence, the first `most` of them, and how many more there are."""
    more = [f"{len(names) - most} more"] if len(names) > most else []
    *first, last = [*names[:most], *more]
    return f"{separator.join(first)} and {last}" if first else last


def unique(names: Iterable[str]) -> list[str]:
    """The names, with a number behind the second and further occurrences of one."""
    seen: Counter[str] = Counter()
    made = []
    for name in names:
        seen[name] += 1
        made.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return made


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
