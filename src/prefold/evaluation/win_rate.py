"""Win rate: how often a judge prefers the answer of the trained model to that of the model before training.

A judge is a reward, which prefers the answer with the higher value, or a chat model behind an endpoint, which is shown
both orders (`prefold.rewards.judge`). A tie counts one half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefold.errors import StageError
from prefold.evaluation.answer_rates import AnswerPair, answer_pairs, by_sample, rate_of_answers
from prefold.files import cache_folder
from prefold.generation.endpoint import Endpoint
from prefold.generation.http import Refused
from prefold.recipe import EndpointJudge, RewardBase
from prefold.rewards.judge import Judge, NoVerdict
from prefold.rewards.load import load_rewards
from prefold.rewards.scoring import LoadedReward, score, weighted
from prefold.terminal import progress_bar

FAILURES_IN_A_ROW = 10
"""Pairs without a verdict, one after another, after which judging is given up."""
REPLIES_SHOWN = 3
_SHOWN_CHARACTERS = 120

Outcome = float | NoVerdict | Refused | None
"""1 where the answer after training is preferred, 0 where the one before is, 0.5 where they are even; or why there is
no verdict. None: the reward has no number for one of them."""
TokenIds = Callable[[Sequence[str]], list[list[int]]]


def measure_win_rate(judge: Compares, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The content of `evaluation/win_rate.json`; `outcomes` has for each sample those of its answers.

    Args:
        samples: as in `samples.jsonl`; see `answer_pairs`.

    Raises:
        UserError: the endpoint cannot be reached or refuses all; a reward of the user's fails.
        StageError: the judge gives no verdict for many answers in a row, or for none.
    """
    pairs = answer_pairs(samples)
    by_index: dict[int, Outcome] = {}
    in_a_row = 0
    with progress_bar("answers judged", len(pairs)) as advance:
        for index, outcome in judge.outcomes(pairs):
            by_index[index] = outcome
            in_a_row = 0 if isinstance(outcome, float) else in_a_row + 1
            if isinstance(outcome, NoVerdict | Refused) and in_a_row == FAILURES_IN_A_ROW:
                raise _nothing_said(outcome, f"{in_a_row} pairs of answers in a row")
            advance(advance=1)
    outcomes = [by_index[index] for index in range(len(pairs))]
    if outcomes and not any(isinstance(outcome, float) for outcome in outcomes):
        raise _nothing_said(outcomes[-1], f"any of {len(outcomes)} pairs of answers")
    known = [outcome if isinstance(outcome, float) else None for outcome in outcomes]
    return {"judge": judge.facts(), **win_rate(pairs, outcomes), "outcomes": by_sample(samples, pairs, known)}


def _nothing_said(outcome: Outcome, what: str) -> StageError:
    if outcome is None:
        return StageError(f"the judge of `evaluate.win_rate` has no number for {what}")
    said = "it refuses them" if isinstance(outcome, Refused) else "its last reply"
    return StageError(
        f"the judge of `evaluate.win_rate` names neither answer for {what}; {said}: {_shortened(outcome)!r}\n"
        "  to do: take a model that follows instructions (`evaluate.win_rate.judge.model`)"
    )


def _shortened(reply: object) -> str:
    text = " ".join(str(reply).split())
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def open_judge(spec: EndpointJudge | RewardBase, token_ids: TokenIds) -> Compares:
    """The judge that a recipe names; a reward model or endpoint is not used before it judges. Raises UserError: a
    reward cannot be loaded or needs more than prompts and answers, or an address is invalid."""
    if isinstance(spec, EndpointJudge):
        endpoint = Endpoint(spec.endpoint, spec.model, spec.timeout)
        return EndpointCompares(Judge.at(endpoint, cache_folder()), spec.concurrency)
    [reward] = load_rewards([spec], ["prompts", "completions", "completion_ids"])
    return _RewardCompares(reward, spec.settings.get("model"), token_ids)


@dataclass(frozen=True)
class _RewardCompares:
    """A reward as the judge. `facts`: who judges; `outcomes`: each with the index of its pair."""

    reward: LoadedReward
    model: str | None
    token_ids: TokenIds

    def facts(self) -> dict[str, Any]:
        return {"kind": "reward", "name": self.reward.name, **({"model": self.model} if self.model else {})}

    def outcomes(self, pairs: Sequence[AnswerPair]) -> Iterator[tuple[int, Outcome]]:
        texts = [text for pair in pairs for text in (pair.before, pair.after)]
        prompts = [pair.prompt for pair in pairs for _ in range(2)]
        scores = weighted([self.reward], score([self.reward], prompts, texts, self.token_ids(texts), {}))
        for index, (before, after) in enumerate(zip(scores[::2], scores[1::2], strict=True)):
            yield index, None if before is None or after is None else (float(np.sign(after - before)) + 1) / 2


@dataclass(frozen=True)
class EndpointCompares:
    """A chat model behind an endpoint as the judge; `facts` include its cost, and outcomes come in any order."""

    judge: Judge
    workers: int

    def facts(self) -> dict[str, Any]:
        endpoint = self.judge.endpoint
        return {"kind": "endpoint", "name": endpoint.model, "cost": dict(endpoint.usage)}

    def outcomes(self, pairs: Sequence[AnswerPair]) -> Iterator[tuple[int, Outcome]]:
        groups = [(pair.prompt, [pair.after, pair.before]) for pair in pairs]
        for index, shares in self.judge.all_shares(groups, self.workers):
            yield index, shares[0] if isinstance(shares, list) else shares


Compares = _RewardCompares | EndpointCompares


def win_rate(pairs: Sequence[AnswerPair], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The rate with its interval over prompts, and what was left out of it."""
    replies = [_shortened(outcome) for outcome in outcomes if isinstance(outcome, NoVerdict)]
    left_out = {
        "no_verdict": len(replies),
        "refused": sum(isinstance(outcome, Refused) for outcome in outcomes),
        "no_score": outcomes.count(None),
    }
    shown = {"replies_without_verdict": replies[:REPLIES_SHOWN]} if replies else {}
    known = [outcome if isinstance(outcome, float) else None for outcome in outcomes]
    return {**rate_of_answers(pairs, known), "left_out": left_out, **shown}
