"""How tokens are drawn: settings, what a completion is, and the arithmetic between logits and tokens.

The truncations keep the tokens that those of transformers keep. Tokens are drawn by inverting the cumulative
distribution at one number of a row's own stream, so a completion does not depend on what is drawn beside it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from prefold.recipe import sampling as settings

BLOCK = 256
"""Tokens whose probabilities are added up before the block that holds the drawn token is searched."""
LIKELY = 1024
"""Tokens among which top-p looks first; the whole vocabulary is only sorted where they do not hold enough."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 are
    off.

    Args:
        stop: texts that end a completion; its text ends before them.
        end_tokens: ids that end a completion; None for the model's own.
        with_model_logprobs: whether completions bring the model's own log-probs as well.
    """

    max_new_tokens: int = 256
    num_answers: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 42
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    end_tokens: tuple[int, ...] | None = None
    with_model_logprobs: bool = False

    @classmethod
    def of(cls, wanted: settings.Sampling, num_answers: int = 1) -> Sampling:
        """As a section of a recipe, or a command, says."""
        truncation = wanted.top_p, wanted.top_k, wanted.min_p
        return cls(wanted.max_new_tokens, num_answers, wanted.temperature, *truncation, wanted.seed)


@dataclass(frozen=True)
class Completion:
    """What a model wrote. `token_ids` include the end token; `finished` is False where the length limit cut it off.

    Log-probs in nats, one for each token: `logprobs` of the distribution that it was drawn from (0 where greedy),
    `model_logprobs` of the model's own, at temperature 1, where asked for.
    """

    token_ids: tuple[int, ...]
    text: str
    finished: bool
    logprobs: tuple[float, ...] = ()
    model_logprobs: tuple[float, ...] | None = None


class Chosen(NamedTuple):
    """`[R]` each: token ids, and their log-probs as in `Completion`."""

    tokens: Tensor
    logprobs: Tensor
    model_logprobs: Tensor | None


def seed_of(*parts: int) -> int:
    """A seed below 2^31 for a part of the work."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()
    return int.from_bytes(digest[:4]) >> 1


def stream_of(seed: int, prompt: int, completion: int, length: int) -> list[float]:
    """The numbers in [0, 1) that the tokens of a completion are drawn with."""
    drawn: list[float] = np.random.default_rng([seed, prompt, completion]).random(length).tolist()
    return drawn


def choose(logits: Tensor, settings: Sampling, drawn: Tensor, seen: Tensor | None = None) -> Chosen:
    """The next token of each row.

    Args:
        logits: `[R, V]`.
        drawn: `[R]` float64, a number in [0, 1) for each row.
        seen: `[R, V]`, whether a token stands in the row already; needed for a repetition penalty.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    scores = logits if seen is None else penalised(logits, seen, settings.repetition_penalty)
    if settings.temperature == 0:
        tokens = scores.argmax(-1)
        logprobs = torch.zeros_like(tokens, dtype=logits.dtype)
    else:
        scores = scores if settings.temperature == 1 else scores / settings.temperature
        scores = truncated(scores, settings.top_k, settings.top_p, settings.min_p)
        tokens, logprobs = draw(scores, drawn)
    model_logprobs = None
    if settings.with_model_logprobs:
        model_logprobs = logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)
    return Chosen(tokens, logprobs, model_logprobs)


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits of seen tokens divided by the penalty where positive, multiplied where negative (arXiv 1909.05858,
    section 4.1)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def truncated(scores: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """`[R, V]` scores with minus infinity for the tokens that must not be drawn."""
    if 0 < top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1:
        scores = scores.masked_fill(scores < _least_of_top_p(scores, top_p), float("-inf"))
    if min_p > 0:
        least = scores.amax(-1, keepdim=True) + float(np.log(min_p))
        scores = scores.masked_fill(scores < least, float("-inf"))
    return scores


def _least_of_top_p(scores: Tensor, top_p: float) -> Tensor:
    """`[R, 1]`: the least score of the most likely tokens that together reach `top_p`."""
    normaliser = scores.logsumexp(-1, keepdim=True)
    for count in (min(LIKELY, scores.shape[-1]), scores.shape[-1]):
        likeliest = scores.topk(count).values
        probabilities = (likeliest - normaliser).double().exp()
        mass = probabilities.cumsum(-1)
        if bool((mass[:, -1] >= top_p).all()):
            break
    kept = (mass - probabilities < top_p).sum(-1, keepdim=True)
    return likeliest.gather(-1, kept - 1)


def draw(scores: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens `[R]` by the softmax of the scores `[R, V]`, and their log-probs `[R]`."""
    rows, size = scores.shape
    blocks = -(-size // BLOCK)
    top = scores.amax(-1, keepdim=True)
    weights = scores.new_zeros(rows, blocks * BLOCK)
    torch.exp(scores - top, out=weights[:, :size])
    weights = weights.view(rows, blocks, BLOCK)
    sums = weights.sum(-1).double()
    edges = sums.cumsum(-1)
    target = drawn[:, None] * edges[:, -1:]
    block = torch.searchsorted(edges, target, right=True).clamp_(max=blocks - 1)
    target = target - (edges - sums).gather(-1, block)
    inside = weights[torch.arange(rows, device=scores.device), block.squeeze(-1)].double().cumsum(-1)
    tokens = block * BLOCK + torch.searchsorted(inside, target, right=True).clamp_(max=BLOCK - 1)
    # Where rounding put the number at or beyond the end, the last token may be one that cannot be drawn.
    possible = weights.view(rows, -1).gather(-1, tokens) > 0
    if not bool(possible.all()):
        tokens = torch.where(possible, tokens, scores.argmax(-1, keepdim=True))
    logprobs = scores.gather(-1, tokens) - top - edges[:, -1:].log().to(scores.dtype)
    return tokens.squeeze(-1), logprobs.squeeze(-1)
