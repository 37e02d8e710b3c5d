"""Held-out pairs before and after: how often, and by how much, the chosen completion is the likelier one.

`accuracy` and `margin` compare the mean log-prob per token, which has a meaning before training and for every method.
Unpaired completions are matched, a desirable one with an undesirable one, of the same prompt where that is possible.
`reward` is the implicit reward against the model before training, scaled as in the training curves. Ties count one
half.

A reward model has scores instead of log-probs. It is compared with chance, as there is no head before training.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prefold.evaluation.paired import Floats, estimate, rate, wilson, won
from prefold.terminal import progress_bar
from prefold.trees.packing import TokenTree
from prefold.trees.scorer import Scorer

CHANCE = 0.5


@dataclass(frozen=True)
class PairScores:
    """Log-probs in nats of `n` pairs under one model: `sums` and `means` (per token) are `[n, 2]`, chosen first."""

    sums: Floats
    means: Floats


@torch.no_grad()
def score_pairs(
    scorer: Scorer, trees: Sequence[TokenTree], label: str, matches: Sequence[tuple[int, int]] | None = None
) -> PairScores:
    """Score trees of two completions each; or trees of one each, as pairs of the indices in `matches`."""
    scorer.model.eval()
    shape = (len(trees), len(trees[0].completions))
    sums, means = np.zeros(shape), np.zeros(shape)
    with progress_bar(label, len(trees)) as advance:
        for row, logprobs in scorer.scored(trees):
            sums[row] = logprobs.sums().view(-1, shape[1]).cpu().numpy()
            means[row] = logprobs.means().view(-1, shape[1]).cpu().numpy()
            advance(advance=len(row))
    if matches is None:
        return PairScores(sums, means)
    indices = np.array(matches)
    return PairScores(sums[indices, 0], means[indices, 0])


def match(prompts: Sequence[bytes], labels: Sequence[bool]) -> list[tuple[int, int]]:
    """Indices of pairs of a desirable and an undesirable completion: first those of the same prompt, then the rest in
    order.

    Each completion is used once at most, so that the pairs are independent.
    """
    by_prompt: dict[bytes, tuple[list[int], list[int]]] = {}
    for index, (prompt, label) in enumerate(zip(prompts, labels, strict=True)):
        by_prompt.setdefault(prompt, ([], []))[0 if label else 1].append(index)
    together: list[tuple[int, int]] = []
    rest: tuple[list[int], list[int]] = ([], [])
    for desirable, undesirable in by_prompt.values():
        together += zip(desirable, undesirable, strict=False)
        shared = min(len(desirable), len(undesirable))
        rest[0].extend(desirable[shared:])
        rest[1].extend(undesirable[shared:])
    return together + list(zip(sorted(rest[0]), sorted(rest[1]), strict=False))


def compare_pairs(before: PairScores, after: PairScores, reward_scale: float) -> dict[str, Any]:
    """The content of `evaluation/heldout.json`.

    Intervals are 95 %: Wilson's for an accuracy, that of `paired` for the difference.
    """
    first, second = _wins(before.means), _wins(after.means)
    rewards, facts = reward_scale * (after.sums - before.sums), estimate(first, second).facts(len(first), "pair")
    return {
        "pairs": len(first),
        "before": _one_model(first, before.means),
        "after": _one_model(second, after.means),
        "difference": {"accuracy": facts.pop("difference"), **facts},
        "reward": {"accuracy": float(_wins(rewards).mean()), "margin": float((rewards[:, 0] - rewards[:, 1]).mean())},
    }


def by_pair(
    keys: Sequence[str], texts: Iterable[dict[str, Any]], after: Floats, before: Floats | None = None
) -> list[dict[str, Any]]:
    """The lines of `evaluation/heldout.jsonl`: whether the chosen completion of each pair is the higher one (1, 0, or
    0.5 for a tie), by how much, and the pair. `keys`: the same for the same pair in every run."""
    sides = {when: values for when, values in (("before", before), ("after", after)) if values is not None}
    columns: dict[str, Any] = {"key": keys} | {when: _wins(values).tolist() for when, values in sides.items()}
    for when, values in sides.items():
        margins = (values[:, 0] - values[:, 1]).tolist()
        columns[f"margin_{when}"] = [margin if math.isfinite(margin) else None for margin in margins]
    lines = (dict(zip(columns, pair, strict=True)) for pair in zip(*columns.values(), strict=True))
    return [line | text for line, text in zip(lines, texts, strict=True)]


def against_chance(scores: PairScores) -> dict[str, Any]:
    """The content of `evaluation/heldout.json` for scores of conversations: the accuracy against chance."""
    wins = _wins(scores.sums)
    facts = rate(wins, of="pair")
    after = _one_model(wins, scores.sums) | {"accuracy_ci": facts.pop("ci")}
    return {"pairs": len(wins), "after": after, "chance": {"accuracy": CHANCE, **facts}}


def _wins(values: Floats) -> Floats:
    """`[n]`: 1 where the chosen side is higher, one half where both are equal, else 0."""
    return won(values[:, 0] - values[:, 1])


def _one_model(wins: Floats, means: Floats) -> dict[str, Any]:
    return {
        "accuracy": float(wins.mean()),
        "accuracy_ci": wilson(wins),
        "margin": float((means[:, 0] - means[:, 1]).mean()),
    }
