"""A judge: a chat model that says which of two answers is better (RLAIF, arXiv 2309.00267).

Models favour the first answer, or the second, by its position (section 2.1.1 there). So every two answers are shown in
both orders, and the verdict counts only if it is for the same answer both times; else it is a tie. Left out: asking the
judge for its reasons first, and its token probabilities, which few endpoints give.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from prefold.data.preference import Message
from prefold.generation.endpoint import Endpoint, as_text
from prefold.generation.http import Refused, in_parallel
from prefold.generation.journal import Journal, key_of

_QUESTION = """\
Below is a conversation, and two answers that could follow it. Which answer is better: more correct, more helpful, \
clearer? Length alone is no merit.

[Conversation]
{conversation}

[Answer 1]
{first}

[Answer 2]
{second}

[End] Reply with the number of the better answer, 1 or 2, and nothing else."""
# Reasoning models may write their thoughts before the verdict.
_THOUGHTS = re.compile(r"\A.*</think>", re.DOTALL)
_VERDICT = re.compile(r"\W*(?:the )?(?:better )?(?:answer|response)?(?: is)?\W*([12])\W*", re.IGNORECASE)


class NoVerdict(Exception):
    """The judge's reply names neither answer."""


@dataclass(frozen=True)
class Judge:
    """A chat model at an endpoint. Every reply is kept in a file, so that no question is asked twice."""

    endpoint: Endpoint
    replies: Journal

    @classmethod
    def at(cls, endpoint: Endpoint, cache: Path) -> Judge:
        return cls(endpoint, endpoint.replies(cache / "judge"))

    def all_shares(
        self, groups: Sequence[tuple[Sequence[Message], Sequence[str]]], workers: int
    ) -> Iterator[tuple[int, list[float] | NoVerdict | Refused]]:
        """For each prompt with its completions, in any order: its index, and their `shares` or why there are none.

        Raises:
            UserError: the endpoint fails.
        """

        def shares(index: int) -> list[float] | NoVerdict | Refused:
            try:
                return self.shares(*groups[index])
            except (NoVerdict, Refused) as failure:
                return failure

        return in_parallel(shares, range(len(groups)), workers)

    def shares(self, prompt: Sequence[Message], completions: Sequence[str]) -> list[float]:
        """For each completion the share of the others that it was preferred to; a tie counts one half.

        Raises:
            NoVerdict: a reply names neither answer.
            UserError: the endpoint fails.
        """
        won = [0.0] * len(completions)
        for i, j in combinations(range(len(completions)), 2):
            first, second = completions[i], completions[j]
            share = 0.5
            if first != second:
                share = ((self._verdict(prompt, first, second) == 1) + (self._verdict(prompt, second, first) == 2)) / 2
            won[i] += share
            won[j] += 1 - share
        return [count / (len(completions) - 1) for count in won]

    def _verdict(self, prompt: Sequence[Message], first: str, second: str) -> int:
        question = _QUESTION.format(conversation=as_text(prompt), first=first, second=second)
        key = key_of(question)
        if key not in self.replies:
            messages = [Message(role="user", content=question)]
            self.replies.add(key, self.endpoint.ask(messages, temperature=0.0).text)
        reply = str(self.replies[key])
        match = _VERDICT.fullmatch(_THOUGHTS.sub("", reply))
        if match is None:
            raise NoVerdict(reply)
        return int(match[1])
