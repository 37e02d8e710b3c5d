"""Win rate: how often a judge prefers the answer of the trained model to that of the model before training.

A judge is a reward, which prefers the answer that it gives more, or a chat model behind an endpoint, which is shown
both orders (`prefold.rewards.judge`). A tie counts one half.

Judges like length. So the rate is given a second time, as it would be if both answers were equally long: a logistic
regression of the win on tanh(d / s), where d is how many characters longer the answer became and s the standard
deviation of d, read at d = 0. That is the length-controlled win rate of AlpacaEval 2 (Dubois et al., arXiv 2404.04475,
equation 1) without its term for the difficulty of each instruction, which needs the answers of many models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit

from prefold.data.preference import Message
from prefold.errors import StageError
from prefold.evaluation.paired import LEVEL, Floats, rate
from prefold.files import cache_folder
from prefold.generation.endpoint import Endpoint
from prefold.generation.http import Refused
from prefold.recipe import EndpointJudge, RewardBase
from prefold.rewards.judge import Judge, NoVerdict
from prefold.rewards.load import load_rewards
from prefold.rewards.scoring import LoadedReward, score, weighted
from prefold.terminal import progress_bar

FAILURES_IN_A_ROW = 10
"""Answers without a verdict after which nothing more is expected."""
LEAST_PROMPTS = 20
"""For the length-controlled rate: fewer do not bear a second coefficient."""
REPLIES_SHOWN = 3
_SHOWN_CHARACTERS = 120


@dataclass(frozen=True)
class AnswerPair:
    """An answer of each model to the prompt of that number."""

    number: int
    prompt: list[Message]
    before: str
    after: str


Outcome = float | NoVerdict | Refused | None
"""1 where the answer after training is preferred, 0 where the one before is, 0.5 where they are even; or why the judge
says nothing. None: a reward that has no number for one of them."""
TokenIds = Callable[[Sequence[str]], list[list[int]]]


def measure_win_rate(judge: Compares, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The content of `evaluation/win_rate.json`; `outcomes` has for each sample those of its answers.

    Args:
        samples: `{"prompt", "before": [...], "after": [...]}`, as in `samples.jsonl`; the first answer before is
            compared with the first one after, and so on.

    Raises:
        UserError: the endpoint cannot be reached or refuses all; a reward of the user's fails.
        StageError: the judge gives no verdict for many answers in a row, or for none.
    """
    pairs = [
        AnswerPair(number, list(sample["prompt"]), before, after)
        for number, sample in enumerate(samples)
        for before, after in zip(sample["before"], sample["after"], strict=False)
    ]
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
    by_sample: list[list[float | None]] = [[] for _ in samples]
    for pair, outcome in zip(pairs, outcomes, strict=True):
        by_sample[pair.number].append(outcome if isinstance(outcome, float) else None)
    return {"judge": judge.facts(), **win_rate(pairs, outcomes), "outcomes": by_sample}


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
    """The judge that a recipe names; a reward model or endpoint is first used when it judges. Raises UserError: a
    reward cannot be loaded or needs what answers do not have; an address is none."""
    if isinstance(spec, EndpointJudge):
        endpoint = Endpoint(spec.endpoint, spec.model, spec.timeout)
        return EndpointCompares(Judge.at(endpoint, cache_folder()), spec.concurrency)
    [reward] = load_rewards([spec], ["prompts", "completions", "completion_ids"])
    return _RewardCompares(reward, spec.settings.get("model"), token_ids)


@dataclass(frozen=True)
class _RewardCompares:
    """`facts` say who judges, and what that took so far; `outcomes` are with the indices of their pairs."""

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
    """The same; its outcomes come in any order."""

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
    judged = [(pair, outcome) for pair, outcome in zip(pairs, outcomes, strict=True) if isinstance(outcome, float)]
    replies = [_shortened(outcome) for outcome in outcomes if isinstance(outcome, NoVerdict)]
    left_out = {
        "no_verdict": len(replies),
        "refused": sum(isinstance(outcome, Refused) for outcome in outcomes),
        "no_score": outcomes.count(None),
    }
    facts: dict[str, Any] = {"comparisons": len(judged), "left_out": left_out}
    if replies:
        facts["replies_without_verdict"] = replies[:REPLIES_SHOWN]
    if not judged:
        return {"prompts": 0, **facts}
    wins = np.array([outcome for _, outcome in judged])
    lengths = np.array([(len(pair.before), len(pair.after)) for pair, _ in judged], dtype=float)
    prompts = [str(pair.number) for pair, _ in judged]
    against_even = rate(wins, prompts)
    del against_even["difference"]
    return {
        "prompts": len(set(prompts)),
        **facts,
        "wins": int((wins > 0.5).sum()),
        "ties": int((wins == 0.5).sum()),
        "losses": int((wins < 0.5).sum()),
        "win_rate": float(wins.mean()),
        **against_even,
        "length_controlled": _of_prompts(wins, lengths, prompts),
        "characters": {"before": float(lengths[:, 0].mean()), "after": float(lengths[:, 1].mean())},
    }


def _of_prompts(wins: Floats, lengths: Floats, prompts: Sequence[str]) -> dict[str, Any] | None:
    """The length-controlled rate, by the means over each prompt's answers."""
    _, groups = np.unique(np.asarray(prompts), return_inverse=True)
    sizes = np.bincount(groups)
    longer = np.bincount(groups, lengths[:, 1] - lengths[:, 0]) / sizes
    return length_controlled(np.bincount(groups, wins) / sizes, longer)


def length_controlled(wins: Floats, longer: Floats) -> dict[str, Any] | None:
    """The rate at equal lengths, with Wald's 95 % interval and p-value; None for fewer than `LEAST_PROMPTS`. `wins`
    `[n]` are shares from 0 to 1, `longer` `[n]` the characters that the answer after training has more."""
    if len(wins) < LEAST_PROMPTS:
        return None
    spread = float(longer.std())
    gap = np.tanh(longer / spread) if spread else np.zeros(len(longer))
    # A win and a loss at either end, a quarter of an answer each: there is an estimate for any data, perfectly
    # separated ones included.
    ends = np.array([-1.0, -1.0, 1.0, 1.0])
    design = np.column_stack([np.ones(len(gap) + 4), np.concatenate([gap, ends])])
    won = np.concatenate([wins, [0.0, 1.0, 0.0, 1.0]])
    weights = np.concatenate([np.ones(len(wins)), np.full(4, 0.25)])
    from statsmodels.genmod.families import Binomial
    from statsmodels.genmod.generalized_linear_model import GLM

    fitted = GLM(won, design, family=Binomial(), freq_weights=weights).fit()
    low, high = fitted.conf_int()[0]
    shared, p_value = float(expit(fitted.params[0])), float(fitted.pvalues[0])
    verdict = "no difference" if p_value >= LEVEL else "better" if shared > 0.5 else "worse"
    return {"win_rate": shared, "ci": [float(expit(low)), float(expit(high))], "p_value": p_value, "verdict": verdict}
