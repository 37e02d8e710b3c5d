"""Every held-out pair, or prompt, before and after training: the distribution, and a list with the worst first."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from prefold.reports.numbers import MINUS, finite
from prefold.reports.run_files import RunRecord, Values, objects, turns

BINS = 12
MOST_SHOWN = 2000
MOST_CHARACTERS = 2_000_000
"""Of all texts together, about: a report should be small enough to mail."""
FEWEST_CHARACTERS = 300
"""Kept of each text, however many there are."""

Text = tuple[str, bool]
"""A text, and whether it was cut."""


@dataclass(frozen=True)
class Entry:
    """A pair with its margins, or a prompt with its rewards. `answers` by label."""

    row: str
    before: float | None
    after: float | None
    prompt: list[tuple[str, str]]
    answers: dict[str, Text]

    @property
    def change(self) -> float | None:
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def rank(self) -> tuple[float, float]:
        change = self.after if self.change is None else self.change
        return (float("inf"), 0.0) if change is None else (change, self.after or 0.0)


@dataclass(frozen=True)
class EachPair:
    """`bins`: range of each, and the counts by side; `sides`: before and after, or after alone. `left_out`: how many
    are not shown."""

    measured: str
    bins: list[tuple[str, list[int]]]
    sides: list[str]
    shown: list[Entry]
    left_out: int
    got_worse: int | None


def each_pair(run: RunRecord) -> EachPair | None:
    """None if the run has no held-out lines with texts, which earlier versions did not write."""
    if not (lines := [line for line in run.held_out_lines if "prompt" in line]):
        return None
    pairs = [entry_of(line, max(FEWEST_CHARACTERS, MOST_CHARACTERS // (3 * len(lines)))) for line in lines]
    sides = ["after"] if run.scores else ["before", "after"]
    changes = [pair.change for pair in pairs if pair.change is not None]
    return EachPair(
        measured="reward" if run.rewards else "margin",
        bins=_bins([[getattr(pair, side) for pair in pairs] for side in sides]),
        sides=sides,
        shown=sorted(pairs, key=lambda pair: pair.rank)[:MOST_SHOWN],
        left_out=max(len(pairs) - MOST_SHOWN, 0),
        got_worse=None if run.scores else sum(change < 0 for change in changes),
    )


def entry_of(line: Values, characters: int = FEWEST_CHARACTERS) -> Entry:
    """A line of evaluation/heldout.jsonl, each of its texts cut to `characters`."""
    kind = "margin_" if "chosen" in line else ""
    before, after = (finite(line.get(f"{kind}{when}")) for when in ("before", "after"))
    if kind:
        texts = {"Chosen": joined(line["chosen"]), "Rejected": joined(line.get("rejected"))}
    else:
        texts = {when.capitalize(): str(line.get(f"answer_{when}", "")) for when in ("before", "after")}
    answers = {name: (text[:characters], len(text) > characters) for name, text in texts.items()}
    prompt = [
        (role, text if len(text) <= characters else f"{text[:characters]} …") for role, text in turns(line["prompt"])
    ]
    return Entry(str(line.get("row", "")), before, after, prompt, answers)


def joined(messages: Any) -> str:
    """Messages as one text: each with its role unless that is the assistant's, and with its further fields."""
    texts = []
    for message in objects(messages):
        role, text = str(message.get("role", "")), str(message.get("content", ""))
        more = {name: value for name, value in message.items() if name not in ("role", "content", "weight")}
        parts = [text if role == "assistant" else f"{role}: {text}"]
        parts += [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in more.items()]
        texts.append("\n".join(filter(None, parts)))
    return "\n\n".join(texts)


def _bins(sides: Sequence[Sequence[float | None]]) -> list[tuple[str, list[int]]]:
    """About `BINS` bins of equal width, 1, 2 or 5 times a power of 10, from the lowest to the highest value; 0 lies
    between two of them."""
    known = [[value for value in side if value is not None] for side in sides]
    every = [value for side in known for value in side]
    if not every or min(every) == max(every):
        return [(f"{value:g}", [len(side) for side in known]) for value in every[:1]]
    width = (max(every) - min(every)) / BINS
    power = 10.0 ** math.floor(math.log10(width))
    width = power * next(step for step in (1, 2, 5, 10) if step * power >= width * (1 - 1e-9))
    counts = [Counter(math.floor(value / width) for value in side) for side in known]
    first, last = (math.floor(end(every) / width) for end in (min, max))
    edges = [f"{round(number * width, 12):g}".replace("-", MINUS) for number in range(first, last + 2)]
    return [
        (f"{low} to {high}", [of_side[number] for of_side in counts])
        for number, (low, high) in enumerate(pairwise(edges), first)
    ]
