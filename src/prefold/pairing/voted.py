"""People's votes: two answers to each prompt as they are offered, and the pairs that the votes make of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from prefold.data.conversion import to_records
from prefold.data.preference import Message, Preference, Problem, Prompt, messages_key
from prefold.data.shapes import find_shape
from prefold.data.sources import read_rows
from prefold.errors import UserError
from prefold.files import write_jsonl
from prefold.pairing.make import Chosen, beside_prompt
from prefold.pairing.scores import Candidate, Candidates
from prefold.recipe import Source, Values, make_section

_VOTES = Values(first=1, second=2, tie=0)


def offer(path: Path, prompts: Sequence[Prompt], candidates: Sequence[Candidates]) -> int:
    """Write what is to be voted on, and return how many prompts that are."""
    rows = [
        {"prompt": list(prompt.prompt), "output_1": two[0].text, "output_2": two[1].text, "vote": None, **more}
        for prompt, two in zip(prompts, map(_offered, candidates), strict=True)
        for more in [beside_prompt(prompt)]
        if two
    ]
    write_jsonl(path, rows)
    return len(rows)


def voted_pairs(
    votes: Path, prompts: Sequence[Prompt], candidates: Sequence[Candidates]
) -> tuple[list[Chosen], Counter[str]]:
    """The pairs of a file of votes, in the order of the prompts, and why the other prompts have none.

    Raises:
        UserError: it cannot be read, holds votes on other answers than were offered, or two on the same.
    """
    offered = {
        (messages_key(prompt.prompt), frozenset(each.text for each in two)): (index, two)
        for index, (prompt, two) in enumerate(zip(prompts, map(_offered, candidates), strict=True))
        if two
    }
    rows = list(read_rows(make_section(Source, {"path": str(votes)}, "votes")))
    # What has become of the file that was offered; any other shape of pairs or votes says itself what it means.
    offers = any("vote" in (row.value or {}) for row in rows)
    shape = find_shape(rows, votes.name, kinds=("pairs",), values=_VOTES if offers else None)
    records = [record for row in rows for record in to_records(row, shape)]
    kinds = [record.kind for record in records if isinstance(record, Problem)]
    left_out = Counter("no_vote" if kind == "null_field" else kind for kind in kinds)
    chosen: dict[int, Chosen] = {}
    for record in records:
        if not isinstance(record, Preference):
            continue
        texts = [_text(answer) for answer in record.answers]
        index, two = offered.get((messages_key(record.prompt), frozenset(texts)), (-1, ()))
        where = str(record.origin)
        if index < 0:
            expected = "votes on the file that this round has written, in which nothing but the votes is changed"
            raise UserError("is a vote on answers that were not offered", where=where, expected=expected)
        if index in chosen:
            raise UserError("is a second vote on the same answers", where=where, advice="decide for one of them")
        by_text = {each.text: each for each in two}
        chosen[index] = (prompts[index], (by_text[texts[0]], by_text[texts[1]]))
    left_out["too_few_answers"] += len(prompts) - len(offered)
    left_out["no_vote"] += max(0, len(prompts) - len(chosen) - left_out.total())
    return [chosen[index] for index in sorted(chosen)], +left_out


def _offered(candidates: Candidates) -> tuple[Candidate, Candidate] | None:
    """The first two answers with words that differ and were not cut off."""
    whole = [] if isinstance(candidates, str) else [each for each in candidates if each.text and each.finished]
    different = list({each.text: each for each in reversed(whole)}.values())[::-1]
    return (different[0], different[1]) if len(different) > 1 else None


def _text(answer: Sequence[Message]) -> str:
    return str(answer[-1]["content"])
