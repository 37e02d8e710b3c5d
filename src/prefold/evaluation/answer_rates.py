"""How often the answers after training are preferred to those before, by whoever judges. A tie counts one half.

Judges like length. So the rate is given a second time, as it would be if both answers were equally long: a logistic
regression of the win on tanh(d / s), where d is how many characters longer the answer became and s the standard
deviation of d, read at d = 0. That is the length-controlled win rate of AlpacaEval 2 (Dubois et al., arXiv 2404.04475,
equation 1) without its term for the difficulty of each instruction, which needs the answers of many models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit

from prefold.data.preference import Message
from prefold.evaluation.paired import LEVEL, Floats, rate

LEAST_PROMPTS = 20
"""Fewest prompts for the length-controlled rate: fewer do not support a second coefficient."""


@dataclass(frozen=True)
class AnswerPair:
    """An answer of each model to the prompt of index `number`."""

    number: int
    prompt: list[Message]
    before: str
    after: str


def answer_pairs(samples: Sequence[Mapping[str, Any]]) -> list[AnswerPair]:
    """Pairs from samples `{"prompt", "before": [...], "after": [...]}`: the first answer before with the first one
    after, and so on."""
    return [
        AnswerPair(number, list(sample["prompt"]), before, after)
        for number, sample in enumerate(samples)
        for before, after in zip(sample["before"], sample["after"], strict=False)
    ]


def by_sample(
    samples: Sequence[Any], pairs: Sequence[AnswerPair], outcomes: Sequence[float | None]
) -> list[list[float | None]]:
    """The outcomes of each sample's answers."""
    own: list[list[float | None]] = [[] for _ in samples]
    for pair, outcome in zip(pairs, outcomes, strict=True):
        own[pair.number].append(outcome)
    return own


def rate_of_answers(
    pairs: Sequence[AnswerPair], outcomes: Sequence[float | None], at_equal_lengths: bool = True
) -> dict[str, Any]:
    """The facts of a win rate. `outcomes`: 1 where the answer after training is preferred, 0 where the one before is,
    values between where judges differ, None where none judged."""
    judged = [(pair, outcome) for pair, outcome in zip(pairs, outcomes, strict=True) if outcome is not None]
    if not judged:
        return {"prompts": 0, "comparisons": 0}
    wins = np.array([outcome for _, outcome in judged])
    lengths = np.array([(len(pair.before), len(pair.after)) for pair, _ in judged], dtype=float)
    prompts = [str(pair.number) for pair, _ in judged]
    against_even = rate(wins, prompts)
    del against_even["difference"]
    _, groups = np.unique(np.asarray(prompts), return_inverse=True)
    sizes, longer = np.bincount(groups), np.bincount(groups, lengths[:, 1] - lengths[:, 0])
    at_equal = length_controlled(np.bincount(groups, wins) / sizes, longer / sizes) if at_equal_lengths else None
    return {
        "prompts": len(set(prompts)),
        "comparisons": len(judged),
        "wins": int((wins > 0.5).sum()),
        "ties": int((wins == 0.5).sum()),
        "losses": int((wins < 0.5).sum()),
        "win_rate": float(wins.mean()),
        **against_even,
        "length_controlled": at_equal,
        "characters": {"before": float(lengths[:, 0].mean()), "after": float(lengths[:, 1].mean())},
    }


def length_controlled(wins: Floats, longer: Floats) -> dict[str, Any] | None:
    """The rate at equal lengths, with Wald's 95 % interval and p-value; None for fewer than `LEAST_PROMPTS`. Means over
    each prompt's answers: `wins` `[n]`, shares from 0 to 1, and `longer` `[n]`, the characters that the answer after
    training has more."""
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
