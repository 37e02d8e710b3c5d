"""Completions while they are generated: how their tokens are drawn, when they end, and what becomes of them.

The truncations keep the tokens that those of transformers keep. Tokens are drawn by inverting the cumulative
distribution at one number of a completion's own stream, so it does not depend on what is drawn beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prefold.generation.sampling import Completion, Sampling

BLOCK = 256
"""Tokens whose probabilities are added up before the block that holds the drawn token is searched."""
LIKELY = 1024
"""Tokens among which top-p looks first; the whole vocabulary is only sorted where they do not hold enough."""

OnToken = Callable[[int, int, int], None]
"""Called with the index of a prompt, the number of a completion and its newest token."""


@dataclass
class PartialCompletion:
    """Completion `number` of the prompt at `prompt`, so far. `drawn` are the numbers that its tokens are drawn with,
    `seen` `[V]` the tokens that a repetition penalty counts."""

    prompt: int
    number: int
    drawn: list[float]
    seen: Tensor | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    model_logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    ended: bool = False
    """By an end token or a stop string."""
    over: bool = False
    """Ended, or as long as it may be."""


class GenerationRequest:
    """All completions of a call."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Sampling,
        tokenizer: PreTrainedTokenizerBase,
        end_tokens: Sequence[int],
        numbers: Sequence[int],
        on_token: OnToken | None,
    ):
        self.prompts, self.settings = prompts, settings
        self._tokenizer, self._ends, self._numbers, self._on_token = tokenizer, set(end_tokens), numbers, on_token
        self._unfinished: dict[int, list[PartialCompletion]] = {}
        # A token is a byte or more, so that many tokens hold the longest stop string; some, for half characters.
        self._tail = 4 + max((len(stop.encode()) for stop in settings.stop), default=0)

    def size(self, prompt: int) -> int:
        """Tokens of a prompt with its completions at their longest."""
        return len(self.prompts[prompt]) + self.settings.num_answers * self.settings.max_new_tokens

    def begin(self, prompt: int) -> list[PartialCompletion]:
        """The completions of a prompt, still empty."""
        seed, length = self.settings.seed, self.settings.max_new_tokens
        self._unfinished[prompt] = [
            PartialCompletion(prompt, number, stream_of(seed, self._numbers[prompt], number, length))
            for number in range(self.settings.num_answers)
        ]
        return self._unfinished[prompt]

    def extend(self, completions: Sequence[PartialCompletion], logits: Tensor) -> None:
        """Give each of `R` completions its next token, by logits `[R, V]`."""
        # What is drawn takes float64, which MPS does not have.
        logits = logits.cpu() if logits.device.type == "mps" else logits
        drawn = [sequence.drawn[len(sequence.tokens)] for sequence in completions]
        seen = self._seen(completions, logits) if self.settings.repetition_penalty != 1 else None
        chosen = choose(logits, self.settings, torch.tensor(drawn, dtype=torch.float64, device=logits.device), seen)
        logprobs = chosen.logprobs.tolist()
        model_logprobs = None if chosen.model_logprobs is None else chosen.model_logprobs.tolist()
        entropies = None if chosen.entropies is None else chosen.entropies.tolist()
        for i, (sequence, token) in enumerate(zip(completions, chosen.tokens.tolist(), strict=True)):
            sequence.tokens.append(token)
            sequence.logprobs.append(logprobs[i])
            if model_logprobs is not None:
                sequence.model_logprobs.append(model_logprobs[i])
            if entropies is not None:
                sequence.entropies.append(entropies[i])
            if sequence.seen is not None:
                sequence.seen[token] = True
            sequence.ended = token in self._ends or self._is_stopped(sequence)
            sequence.over = sequence.ended or len(sequence.tokens) == self.settings.max_new_tokens
            if self._on_token is not None:
                self._on_token(sequence.prompt, sequence.number, token)

    def finished(self, completions: Sequence[PartialCompletion]) -> Iterator[tuple[int, list[Completion]]]:
        """The prompts of these completions that are all done, with what was generated."""
        for prompt in dict.fromkeys(sequence.prompt for sequence in completions if sequence.over):
            if all(sequence.over for sequence in self._unfinished[prompt]):
                yield prompt, [self._completion(sequence) for sequence in self._unfinished.pop(prompt)]

    def _seen(self, completions: Sequence[PartialCompletion], logits: Tensor) -> Tensor:
        """`[R, V]`: the tokens of each prompt and completion."""
        for sequence in completions:
            if sequence.seen is None:
                sequence.seen = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
                ids = torch.tensor(self.prompts[sequence.prompt], device=logits.device)
                # Embeddings may have more tokens than the head.
                sequence.seen[ids[ids < logits.shape[-1]]] = True
        return torch.stack([sequence.seen for sequence in completions if sequence.seen is not None])

    def _is_stopped(self, sequence: PartialCompletion) -> bool:
        if not self.settings.stop:
            return False
        text = str(self._tokenizer.decode(sequence.tokens[-self._tail :], skip_special_tokens=False))
        return any(stop in text for stop in self.settings.stop)

    def _completion(self, sequence: PartialCompletion) -> Completion:
        text = str(self._tokenizer.decode(sequence.tokens, skip_special_tokens=True))
        cut = min((text.find(stop) for stop in self.settings.stop if stop in text), default=len(text))
        model_logprobs = tuple(sequence.model_logprobs) if self.settings.with_model_logprobs else None
        entropies = tuple(sequence.entropies) if self.settings.with_entropies else None
        logprobs = tuple(sequence.logprobs)
        return Completion(tuple(sequence.tokens), text[:cut], sequence.ended, logprobs, model_logprobs, entropies)


# ---- from logits to tokens --------------------------------------------------------------------------------------


class Chosen(NamedTuple):
    """`[R]` each: token ids, and their log-probs and entropies as in `Completion`."""

    tokens: Tensor
    logprobs: Tensor
    model_logprobs: Tensor | None
    entropies: Tensor | None


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
        entropies = torch.zeros_like(logprobs) if settings.with_entropies else None
    else:
        scores = scores if settings.temperature == 1 else scores / settings.temperature
        entropies = entropy_of(scores) if settings.with_entropies else None
        scores = truncated(scores, settings.top_k, settings.top_p, settings.min_p)
        tokens, logprobs = draw(scores, drawn)
    model_logprobs = None
    if settings.with_model_logprobs:
        model_logprobs = logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)
    return Chosen(tokens, logprobs, model_logprobs, entropies)


def entropy_of(scores: Tensor) -> Tensor:
    """`[R]`: entropy in nats of the softmax of each row of `[R, V]`."""
    below = scores - scores.amax(-1, keepdim=True)
    weights = below.exp()
    total = weights.sum(-1)
    expected: Tensor = torch.linalg.vecdot(weights, below) / total
    return total.log() - expected


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
