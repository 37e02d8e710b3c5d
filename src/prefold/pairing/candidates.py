"""Answers to a prompt, and the two of them that are a pair."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations


@dataclass(frozen=True)
class Candidate:
    """An answer to a prompt by one of the models; `score` is None where no reward says anything about it."""

    text: str
    model: int
    score: float | None = None
    finished: bool = True


Candidates = list[Candidate] | str
"""The answers to a prompt, or why there are none."""


def best_pair(
    candidates: Candidates, min_margin: float, max_length_ratio: float | None
) -> tuple[Candidate, Candidate] | str:
    """(chosen, rejected): of the pairs within the limits the one with the largest margin; or why there is none.

    Without limits that is the best against the worst. Among equals the first ones are taken. An answer that was cut off
    is in no pair: training on it would teach to stop there.
    """
    if isinstance(candidates, str):
        return candidates
    with_score = [candidate for candidate in candidates if candidate.score is not None]
    usable = [candidate for candidate in with_score if candidate.finished]
    if len(usable) < 2 <= len(with_score):
        return "cut_off"
    pairs = [(better, worse, (better.score or 0.0) - (worse.score or 0.0)) for better, worse in permutations(usable, 2)]
    ratio = max_length_ratio or float("inf")
    for reason, holds in (
        ("too_few_answers", lambda better, worse, margin: True),
        ("identical", lambda better, worse, margin: better.text.strip() != worse.text.strip()),
        ("equal_scores", lambda better, worse, margin: margin > 0),
        ("small_margin", lambda better, worse, margin: margin >= min_margin),
        ("length_ratio", lambda better, worse, margin: _length_ratio(better.text, worse.text) <= ratio),
    ):
        pairs = [pair for pair in pairs if holds(*pair)]
        if not pairs:
            return reason
    better, worse, _ = max(pairs, key=lambda pair: pair[2])
    return better, worse


def _length_ratio(first: str, second: str) -> float:
    shorter, longer = sorted((len(first), len(second)))
    return longer / shorter
