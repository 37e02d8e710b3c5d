"""How far a server's log-probs of the tokens that it sampled are from the policy's, and whether it sampled as
requested.

Both are of the distribution that is sampled from: at the sampling temperature, after `top_k`, `top_p` and `min_p`. The
policy's are computed by the engine that trains it, from whole distributions, a few hundred tokens at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prefold.generation.sampling import Completion, Sampling
from prefold.generation.sequences import truncated
from prefold.trees.packing import TokenTree, pack
from prefold.trees.scorer import Scorer

TOKENS = 256
"""Scored tokens whose distributions are in memory at a time."""
NEAR = 0.25
"""Nats by which rounding may put a token outside what truncation keeps."""
FEW, SHARE = 2, 0.02
"""Number and share of tokens that prove nothing: rounding decides whether truncation keeps a token that is about as
likely as the last one that it keeps."""
CERTAIN = 25.0
"""Nats: an event whose probability is below exp(-25) is no chance."""

Drawn = tuple[tuple[int, ...], Sequence[Completion]]
"""A prompt, and completions of it."""


class Positions(NamedTuple):
    """Statistics of `S` tokens, `[S]` each, float32 on the CPU, in nats.

    `given`: the log-probs that came with the completions. `logprobs`: of the policy, at the sampling temperature;
    `plain`: at temperature 1. `kept`: the log of the probability mass that truncation keeps, at most 0. `luck`: the
    token's log-prob minus the expected one of a token sampled from what is kept, and `variance`, its variance.
    `outside`: whether truncation rules the token out.
    """

    given: Tensor
    logprobs: Tensor
    plain: Tensor
    kept: Tensor
    luck: Tensor
    variance: Tensor
    outside: Tensor


@torch.no_grad()
def positions_of(scorer: Scorer, drawn: Sequence[Drawn], sampling: Sampling) -> Positions:
    """Statistics of the tokens of completions, one after the other."""
    parts: list[Positions] = []
    for prompt, completions in drawn:
        rows: list[list[Completion]] = []
        for completion in completions:
            if rows and sum(len(each.token_ids) for each in rows[-1]) + len(completion.token_ids) <= TOKENS:
                rows[-1].append(completion)
            else:
                rows.append([completion])
        parts += [_positions(scorer, prompt, row, sampling) for row in rows]
    return Positions(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _positions(
    scorer: Scorer, prompt: tuple[int, ...], completions: Sequence[Completion], sampling: Sampling
) -> Positions:
    given = torch.tensor([value for completion in completions for value in completion.logprobs])
    tree = TokenTree(prompt, tuple(completion.token_ids for completion in completions))
    logits = _logits(scorer, tree).float()
    targets = torch.tensor([[token] for ids in tree.completions for token in ids], device=logits.device)
    plain = logits.log_softmax(-1).gather(-1, targets).squeeze(-1)
    # A greedy server gives the log-probs of the model as it is.
    full = (logits / (sampling.temperature or 1.0)).log_softmax(-1)
    greedy = sampling.temperature == 0
    # vLLM applies `min_p` first; transformers and our own engine apply it last.
    cut = truncated(full, 0, 1.0, sampling.min_p)
    cut = truncated(cut, 1 if greedy else sampling.top_k, sampling.top_p, 0.0)
    kept = cut.logsumexp(-1)
    logs = cut - kept[:, None]
    probabilities = logs.exp()
    logs = logs.where(probabilities > 0, 0.0)
    expected = (probabilities * logs).sum(-1)
    variance = (probabilities * logs.square()).sum(-1) - expected.square()
    logprobs, inside = full.gather(-1, targets).squeeze(-1), cut.gather(-1, targets).squeeze(-1).isfinite()
    outside = logprobs < cut.where(cut.isfinite(), math.inf).amin(-1) - NEAR
    luck = (logprobs - kept - expected).where(inside, 0.0)
    kept = torch.zeros_like(kept) if greedy else kept
    statistics = (logprobs, plain, kept, luck, variance.clamp(min=0), outside)
    return Positions(given, *(values.cpu() for values in statistics))


def _logits(scorer: Scorer, tree: TokenTree) -> Tensor:
    """`[S, V]`: the logits that the tokens of a tree's completions are sampled from."""
    model, device = scorer.model, next(scorer.model.parameters()).device
    if scorer.packed:
        row = pack([tree], device)
        with scorer.in_place():
            output = model(
                input_ids=row.input_ids,
                position_ids=row.positions,
                logits_to_keep=row.predictors,
                use_cache=False,
                trees=row,
            )
        return output.logits[0]  # type: ignore[no-any-return]
    start = len(tree.prompt) - 1
    whole = [torch.tensor([[*tree.prompt, *ids]], device=device) for ids in tree.completions]
    return torch.cat([model(input_ids=ids, use_cache=False).logits[0, start:-1] for ids in whole])


def some_of(drawn: Sequence[Drawn], tokens: int) -> list[Drawn]:
    """Completions of about so many tokens in all, the same number of each prompt."""
    chosen: list[list[Completion]] = [[] for _ in drawn]
    for number in range(max(len(group) for _, group in drawn)):
        for (_, group), own in zip(drawn, chosen, strict=True):
            if number < len(group) and tokens > 0:
                own.append(group[number])
                tokens -= len(group[number].token_ids)
    return [(prompt, own) for (prompt, _), own in zip(drawn, chosen, strict=True) if own]


def difference(positions: Positions, sampling: Sampling) -> float:
    """Mean absolute difference in nats of a server's log-probs and the policy's. With truncation, the largest few are
    left out: a token that only one of two engines keeps changes the log-probs of all."""
    differences = (positions.given + positions.kept - positions.logprobs).abs()
    tokens = len(differences)
    few = min(max(FEW, int(SHARE * tokens)), tokens // 2) if sampling.truncates else 0
    return float(differences.sort().values[: tokens - few].mean()) if differences.isfinite().all() else math.nan


def why_not_as_told(positions: Positions, sampling: Sampling) -> str | None:
    """Why the tokens cannot have been sampled as requested; None if they may have been.

    By how much they are likelier than expected, all together, is a sum of differences with mean 0 and a known variance;
    Bernstein's inequality bounds the probability that it is so large.
    """
    tokens, outside = len(positions.luck), int(positions.outside.sum())
    names = [name for name, off in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)) if getattr(sampling, name) != off]
    if outside > max(FEW, SHARE * tokens):
        settings = f"`{'`, `'.join(names)}`" if names else "`temperature: 0`"
        return f"ignores {settings}: it draws {outside} of {tokens} tokens that are ruled out"
    total, variance = float(positions.luck.double().sum()), float(positions.variance.double().sum())
    bound = variance + float(positions.luck.abs().max()) * abs(total) / 3
    if bound <= 0 or total**2 / (2 * bound) < CERTAIN:
        return None
    how = "more" if total > 0 else "less"
    settings = ", ".join(f"`{name}`" for name in ["temperature", *names])
    return (
        f"does not sample as requested ({settings}): its {tokens} tokens are on average {abs(total) / tokens:.2g} nats "
        f"{how} likely than sampled tokens are"
    )
