"""Win rate by people's votes, and how far people agree.

Each pair of answers counts once, by the mean of its votes: 1 for the answer after training, 0 for the one before, one
half for neither. Votes on answers other than the run's do not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from itertools import chain, combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from prefold.data.formats import reader_for
from prefold.data.vote_file import compared_key, holds_votes, key_of, preference_for, read_votes
from prefold.errors import UserError
from prefold.evaluation.answer_rates import answer_pairs, by_sample, rate_of_answers
from prefold.files import without_home
from prefold.terminal import say


def require_votes(file: str) -> Path:
    """The file that a recipe names. Raises UserError: there is none, or it holds no votes."""
    path, where = Path(file).expanduser(), f"`evaluate.win_rate.votes`, {without_home(file)}"
    advice = "vote by `prefold ui` once the run has answered its prompts, then give the file that holds the votes"
    if not path.is_file():
        raise UserError("no such file of votes", where=where, advice=advice)
    if reader_for(path.name) is None or not holds_votes(path):
        raise UserError("no line of it is a vote", where=where, expected="a votes.jsonl of `prefold ui`", advice=advice)
    return path


def measure_by_votes(file: str, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The content of `evaluation/win_rate.json`; see `measure_win_rate`. Raises UserError: the file cannot be read."""
    facts = rate_by_votes(read_votes(require_votes(file)), samples)
    if not facts["comparisons"]:
        say(f"  no vote in {without_home(file)} is on the answers of this run: `prefold ui` shows them for voting")
    return facts


def rate_by_votes(
    votes: Iterable[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]], at_equal_lengths: bool = True
) -> dict[str, Any]:
    """The content of `evaluation/win_rate.json`, from the votes that count."""
    by_key: dict[str, list[Mapping[str, Any]]] = {}
    for vote in votes:
        by_key.setdefault(key_of(vote), []).append(vote)
    pairs = answer_pairs(samples)
    cast: list[list[Mapping[str, Any]]] = []
    for pair in pairs:  # votes on answers that occur twice count once
        answers = (pair.before, pair.after)
        cast.append([] if pair.before == pair.after else by_key.pop(compared_key(pair.prompt, answers), []))
    preferred = [[preference_for(pair.after, vote) for vote in own] for pair, own in zip(pairs, cast, strict=True)]
    outcomes = [fmean(of_pair) if of_pair else None for of_pair in preferred]
    people = sorted({vote["voter"].strip() for vote in chain.from_iterable(cast)})
    # The voters are not named in the report; the key tells whether two runs were judged by the same.
    key = blake2b("\n".join(people).encode("utf-8", "backslashreplace"), digest_size=8).hexdigest()
    same = sum(pair.before == pair.after for pair in pairs)
    return {
        "judge": {"kind": "people", "name": f"{len(people)} {'person' if len(people) == 1 else 'people'}", "key": key},
        **rate_of_answers(pairs, outcomes, at_equal_lengths),
        "left_out": {"same_answers": same, "not_voted": outcomes.count(None) - same, "of_other_answers": len(by_key)},
        "votes": sum(map(len, cast)),
        "both_bad": sum(vote["winner"] == "both bad" for vote in chain.from_iterable(cast)),
        "agreement": agreement(preferred),
        "outcomes": by_sample(samples, pairs, outcomes),
    }


def agreement(rated: Iterable[Sequence[float]]) -> dict[str, Any] | None:
    """How far people agree, from the votes on each pair of answers; None if no pair has several. `share`: the share of
    the pairs of votes on the same answers that agree. `alpha`: Krippendorff's for nominal data, which corrects for
    chance and allows for missing votes (Content Analysis, 2nd edition, section 11.3); None if all votes are the
    same."""
    shared = [votes for votes in rated if len(votes) > 1]
    if not shared:
        return None
    pairs = [first == second for votes in shared for first, second in combinations(votes, 2)]
    # Of m votes each pair counts in both orders, by 1 / (m - 1).
    observed = sum(2 * sum(a != b for a, b in combinations(votes, 2)) / (len(votes) - 1) for votes in shared)
    counts = Counter(chain.from_iterable(shared))
    number = counts.total()
    by_chance = number**2 - sum(count**2 for count in counts.values())
    alpha = 1 - (number - 1) * observed / by_chance if by_chance else None
    return {"compared": len(shared), "pairs": len(pairs), "share": sum(pairs) / len(pairs), "alpha": alpha}
