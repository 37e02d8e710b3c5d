"""Short ways to write messages and pairs."""

from __future__ import annotations

from prefold.data.conversion import to_records
from prefold.data.examples import Example, Examples
from prefold.data.formats import RawRow
from prefold.data.preference import Message, Preference, Problem, Record, RowId
from prefold.data.shapes import Shape
from prefold.trees.packing import TokenTree


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def pair(prompt: str = "Why?", chosen: str = "So.", rejected: str = "No.", row: int = 1) -> Preference:
    return Preference((user(prompt),), (assistant(chosen),), (assistant(rejected),), RowId("pairs.jsonl", row))


def to_record(row: RawRow, shape: Shape, system: str | None = None) -> Record | Problem:
    """The one record of a row, or what is wrong with it."""
    [record] = to_records(row, shape, system)
    return record


def example(
    row: int = 1,
    prompt: str = "Why?",
    chosen: str = "So.",
    lengths: tuple[int, int] = (3, 3),
    prompt_length: int = 4,
) -> Example:
    tree = TokenTree(tuple(range(prompt_length)), tuple(tuple(range(length)) for length in lengths))
    return Example(pair(prompt, chosen, row=row), tree)


def examples(*given: Example) -> Examples:
    return Examples.of(given)


def text_rows(number: int, prompt: str = "Question {}") -> list[dict[str, str]]:
    return [
        {"prompt": prompt.format(place), "chosen": f"Good {place}", "rejected": f"Bad {place}"}
        for place in range(number)
    ]
