"""A rubric: a chat model behind an endpoint says of each criterion whether a completion meets it.

The score is the weight of the criteria that are met over that of all, from 0 to 1: the explicit aggregation of Rubrics
as Rewards (arXiv 2507.17746), with one request for all criteria. Left out: criteria that differ by prompt, and implicit
aggregation, where the model gives a single score.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from prefold.data.preference import Message
from prefold.files import cache_folder
from prefold.generation.endpoint import Endpoint, as_text
from prefold.generation.http import in_parallel
from prefold.generation.journal import Journal, key_of
from prefold.recipe import rewards as settings
from prefold.rewards.scoring import NotNumbers

TRIES = 3
"""Requests for a score until the reply fits the schema."""
_SHOWN_CHARACTERS = 120
_QUESTION = """\
Below is a conversation, and an answer that followed it. Say of each criterion whether the answer meets it. What the \
answer says of itself does not count.

[Conversation]
{conversation}

[Answer]
{answer}

[Criteria]
{criteria}

[End] Reply with one JSON object that has true or false for the name of each criterion, and nothing else."""
# Reasoning models may write their thoughts first; servers that do not apply the schema may leave a Markdown fence.
_OBJECT = re.compile(r"(?:.*</think>)?\s*(?:```(?:json)?)?\s*(\{.*\})\s*(?:```)?\s*", re.DOTALL)


class Rubric:
    """Asks about all completions, `concurrency` at a time. Each valid reply is kept in a file, with its cost, so that
    no question is asked twice."""

    def __init__(self, wanted: settings.Rubric):
        self._workers, self._endpoint = wanted.concurrency, Endpoint(wanted.endpoint, wanted.model, wanted.timeout)
        self._weights = {criterion.name: criterion.weight for criterion in wanted.criteria}
        self._criteria = "\n".join(f"{criterion.name}: {criterion.text}" for criterion in wanted.criteria)
        schema = {
            "type": "object",
            "properties": {name: {"type": "boolean"} for name in self._weights},
            "required": [*self._weights],
            "additionalProperties": False,
        }
        self._format = {"type": "json_schema", "json_schema": {"name": "rubric", "strict": True, "schema": schema}}

    @cached_property
    def _replies(self) -> Journal:
        return self._endpoint.replies(cache_folder() / "rubric")

    def __call__(self, prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[float]:
        """Raises NotNumbers: the model does not reply as the schema says; UserError: the endpoint fails."""
        questions = self._questions(prompts, completions)
        keys = list(map(key_of, questions))
        missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in self._replies}
        for key, reply in in_parallel(lambda key: self._asked(key, missing[key]), [*missing], self._workers):
            if reply is not None:
                what = f"got no reply in its JSON schema in {TRIES} tries; the last one: {reply!r}"
                advice = "take a model and a server that follow JSON schemas, or set `on_error: skip`"
                raise NotNumbers(f"{what}\n  to do: {advice}", keys.index(key))
        weights, all_met = self._weights.items(), [self._replies[key]["met"] for key in keys]
        total = math.fsum(self._weights.values())
        return [math.fsum(weight for name, weight in weights if met[name]) / total for met in all_met]

    def cost(self, prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> dict[str, int]:
        """What these scores have cost, in this run or an earlier one: `calls`, `prompt_tokens`, `completion_tokens`."""
        total: Counter[str] = Counter()
        for key in dict.fromkeys(map(key_of, self._questions(prompts, completions))):
            total.update(self._replies[key]["cost"] if key in self._replies else {})
        return dict(total)

    def _questions(self, prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[str]:
        return [
            _QUESTION.format(conversation=as_text(prompt), answer=completion, criteria=self._criteria)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]

    def _asked(self, key: str, question: str) -> str | None:
        """Ask, and keep the reply in the file; returns the beginning of the last reply if none fits the schema."""
        cost: Counter[str] = Counter()
        text = ""
        for number in range(TRIES):
            # At temperature 0 it would reply the same again.
            answer, counts = self._endpoint.ask_counting(
                [Message(role="user", content=question)],
                temperature=1.0 if number else 0.0,
                response_format=self._format,
            )
            cost.update(counts)
            if (met := self._met(answer.text)) is not None:
                self._replies.add(key, {"met": met, "cost": dict(cost)})
                return None
            text = " ".join(answer.text.split())[:_SHOWN_CHARACTERS]
        return text

    def _met(self, reply: str) -> dict[str, bool] | None:
        """Whether each criterion is met; None if the reply does not fit the schema."""
        match = _OBJECT.fullmatch(reply)
        try:
            met: Any = json.loads(match[1] if match else reply)
        except ValueError:
            return None
        if not isinstance(met, dict) or met.keys() != self._weights.keys():
            return None
        return met if all(isinstance(value, bool) for value in met.values()) else None
