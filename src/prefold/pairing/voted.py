"""People's votes: two answers to each prompt that are offered to vote on, and the pairs that the votes make of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from prefold.data.conversion import to_records
from prefold.data.preference import Preference, Problem, Prompt, messages_key
from prefold.data.shapes import find_shape
from prefold.data.sources import read_rows
from prefold.errors import UserError
from prefold.files import write_jsonl
from prefold.generation.endpoint import beside_messages
from prefold.pairing.make import Chosen
from prefold.pairing.scores import Candidate, Candidates
from prefold.recipe import Source, Values, make_section

_VOTES = Values(first=1, second=2, tie=0)


def offer(path: Path, prompts: Sequence[Prompt], candidates: Sequence[Candidates]) -> int:
    """Write two answers to each prompt, to be voted on, and return the number of prompts that have two."""
    rows = [
        {
            "prompt": list(prompt.prompt),
            "output_1": answers[0].text,
            "output_2": answers[1].text,
            "vote": None,
            **beside_messages(prompt),
        }
        for prompt, answers in zip(prompts, map(_offered, candidates), strict=True)
        if answers
    ]
    write_jsonl(path, rows)
    return len(rows)


def voted_pairs(
    votes: Path, prompts: Sequence[Prompt], candidates: Sequence[Candidates]
) -> tuple[list[Chosen], Counter[str]]:
    """The pairs of a file of votes, in the order of the prompts, and why the other prompts have none.

    Raises:
        UserError: it cannot be read, has votes on answers that were not offered, or two votes on the same answers.
    """
    offered = {
        (messages_key(prompt.prompt), frozenset(answer.text for answer in answers)): (index, answers)
        for index, (prompt, answers) in enumerate(zip(prompts, map(_offered, candidates), strict=True))
        if answers
    }
    rows = list(read_rows(make_section(Source, {"path": str(votes)}, "votes")))
    # The file that `offer` wrote has numbers for votes; any other layout of pairs or votes explains itself.
    is_offer = any("vote" in (row.value or {}) for row in rows)
    shape = find_shape(rows, votes.name, kinds=("pairs",), values=_VOTES if is_offer else None)
    records = [record for row in rows for record in to_records(row, shape)]
    kinds = [record.kind for record in records if isinstance(record, Problem)]
    left_out = Counter("no_vote" if kind == "null_field" else kind for kind in kinds)
    chosen: dict[int, Chosen] = {}
    for record in records:
        if not isinstance(record, Preference):
            continue
        texts = [str(answer[-1]["content"]) for answer in record.answers]
        index, answers = offered.get((messages_key(record.prompt), frozenset(texts)), (-1, ()))
        where = str(record.origin)
        if index < 0:
            expected = "votes on the file that this round has written, in which nothing but the votes is changed"
            raise UserError("is a vote on answers that were not offered", where=where, expected=expected)
        if index in chosen:
            raise UserError("is a second vote on the same answers", where=where, advice="decide for one of them")
        by_text = {answer.text: answer for answer in answers}
        chosen[index] = (prompts[index], (by_text[texts[0]], by_text[texts[1]]))
    left_out["too_few_answers"] += len(prompts) - len(offered)
    left_out["no_vote"] += max(0, len(prompts) - len(chosen) - left_out.total())
    return [chosen[index] for index in sorted(chosen)], +left_out


def _offered(candidates: Candidates) -> tuple[Candidate, Candidate] | None:
    """The first two different answers that are not empty and were not cut off."""
    if isinstance(candidates, str):
        return None
    usable = [answer for answer in candidates if answer.text and answer.finished]
    different = list({answer.text: answer for answer in reversed(usable)}.values())[::-1]
    return (different[0], different[1]) if len(different) > 1 else None
