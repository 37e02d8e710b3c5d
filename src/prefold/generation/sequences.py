"""Completions during generation: how their tokens are drawn, when they end, and their results.

Truncation keeps the same tokens as that of transformers. Tokens are drawn by inverting the cumulative distribution at a
random number of the completion's own stream, so a completion does not depend on others in its batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prefold.generation.sampling import Completion, Sampling
from prefold.trees.attention import widened

BLOCK = 256
"""Tokens of a block: probabilities are added up by block, and only the block of the drawn token is searched."""
LIKELY = 1024
"""Most likely tokens that top-p tries first; the whole vocabulary is only sorted if their probabilities do not suffice.
"""

OnToken = Callable[[int, int, int], None]
"""Called with the index of a prompt, the number of a completion and its newest token."""


@dataclass
class PartialCompletion:
    """Completion `number` of the prompt at `prompt`, so far."""

    prompt: int
    number: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    model_logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    ended: bool = False
    """Whether an end token or a stop string has ended it."""
    over: bool = False
    """Whether it has ended, or has its maximum length."""


class Drawing:
    """Completions whose tokens are drawn side by side, on the device: `newest` `[R]` are the last tokens, `unread`
    those that `GenerationRequest.read` has not added to the completions yet.

    Args:
        numbers: `[R, max_new_tokens]` float64, the random numbers that the tokens are drawn with.
        prompts: token ids of each completion's prompt, which count for a repetition penalty.
    """

    def __init__(
        self,
        completions: Sequence[PartialCompletion],
        settings: Sampling,
        numbers: Tensor,
        prompts: Sequence[Sequence[int]],
    ):
        self.completions, self.unread = list(completions), list[Chosen]()
        self._settings, self._prompts = settings, prompts
        self._numbers, self._count = numbers, torch.zeros(len(completions), 1, dtype=torch.long)
        self._seen: Tensor | None = None
        self.newest = self._count[:, 0]

    def draw(self, logits: Tensor) -> None:
        """Draw the next token of each completion from logits `[R, V]`."""
        # Drawing needs float64, which MPS does not have.
        logits = logits.cpu() if logits.device.type == "mps" else logits
        if self._numbers.device != logits.device:
            self._numbers, self._count = self._numbers.to(logits.device), self._count.to(logits.device)
        if self._seen is None and self._settings.repetition_penalty != 1:
            self._seen = _in_prompts(self._prompts, logits)
        chosen = choose(logits, self._settings, self._numbers.gather(1, self._count)[:, 0], self._seen)
        if self._seen is not None:
            self._seen.scatter_(1, chosen.tokens[:, None], True)
        self._count += 1
        self.newest = chosen.tokens
        self.unread.append(chosen)

    def keep(self, kept: Sequence[int]) -> None:
        """Drop all completions but these."""
        self.completions = [self.completions[i] for i in kept]
        index = torch.tensor(kept, dtype=torch.long, device=self._count.device)
        tensors = (self._numbers, self._count, self.newest)
        self._numbers, self._count, self.newest = (tensor[index] for tensor in tensors)
        self._seen = None if self._seen is None else self._seen[index]

    def take_over(self, others: Sequence[Drawing]) -> None:
        """Append the completions of others."""
        drawings = [self, *others]
        self.completions = [completion for drawing in drawings for completion in drawing.completions]
        self._numbers = torch.cat([drawing._numbers for drawing in drawings])
        self._count = torch.cat([drawing._count for drawing in drawings])
        self.newest = torch.cat([drawing.newest for drawing in drawings])
        if self._seen is not None:
            self._seen = torch.cat([drawing._seen for drawing in drawings if drawing._seen is not None])


def _in_prompts(prompts: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
    """`[R, V]`: whether each token is in the prompt."""
    rows, size = logits.shape
    seen = torch.zeros(rows, size, dtype=torch.bool)
    for own, prompt in zip(seen, prompts, strict=True):
        # Embeddings may have more tokens than the head.
        own[torch.tensor([token for token in prompt if token < size], dtype=torch.long)] = True
    return seen.to(logits.device)


class GenerationRequest:
    """All completions of a call; `unfinished` are those of the prompts that have begun."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Sampling,
        tokenizer: PreTrainedTokenizerBase,
        end_tokens: Sequence[int],
        numbers: Sequence[int],
        on_token: OnToken | None,
    ):
        self.prompts, self.settings, self.on_token = prompts, settings, on_token
        self._tokenizer, self._ends, self._numbers = tokenizer, set(end_tokens), numbers
        self.unfinished: dict[int, list[PartialCompletion]] = {}
        # A token is at least a byte, so this many tokens contain the longest stop string; 4 more for half characters.
        self._tail = 4 + max((len(stop.encode()) for stop in settings.stop), default=0)

    def size(self, prompt: int) -> int:
        """Tokens of a prompt with its completions at their longest."""
        return len(self.prompts[prompt]) + self.settings.num_answers * self.settings.max_new_tokens

    def begin(self, prompts: Sequence[int]) -> Drawing:
        """Begin the completions of some prompts."""
        numbers, length = range(self.settings.num_answers), self.settings.max_new_tokens
        for prompt in prompts:
            self.unfinished[prompt] = [PartialCompletion(prompt, number) for number in numbers]
        completions = [completion for prompt in prompts for completion in self.unfinished[prompt]]
        streams = [
            stream_of(self.settings.seed, self._numbers[completion.prompt], completion.number, length)
            for completion in completions
        ]
        own = [self.prompts[completion.prompt] for completion in completions]
        return Drawing(completions, self.settings, torch.tensor(streams, dtype=torch.float64), own)

    def read(self, drawing: Drawing) -> list[int]:
        """Add what has been drawn to the completions, up to their ends; returns the indices of those that go on."""
        if drawing.unread:
            # One transfer for all steps.
            of_steps = (
                None if parts[0] is None else torch.stack(parts, 1).tolist()
                for parts in zip(*drawing.unread, strict=True)
            )
            columns = [repeat(None) if values is None else values for values in of_steps]
            drawing.unread = []
            for completion, *drawn in zip(drawing.completions, *columns, strict=False):
                self._extend(completion, *drawn)
        return [i for i, completion in enumerate(drawing.completions) if not completion.over]

    def _extend(
        self,
        completion: PartialCompletion,
        tokens: list[int],
        logprobs: list[float],
        model_logprobs: list[float] | None,
        entropies: list[float] | None,
    ) -> None:
        for step, token in enumerate(tokens):
            completion.tokens.append(token)
            completion.logprobs.append(logprobs[step])
            if model_logprobs is not None:
                completion.model_logprobs.append(model_logprobs[step])
            if entropies is not None:
                completion.entropies.append(entropies[step])
            completion.ended = token in self._ends or self._is_stopped(completion)
            completion.over = completion.ended or len(completion.tokens) == self.settings.max_new_tokens
            if self.on_token is not None:
                self.on_token(completion.prompt, completion.number, token)
            if completion.over:
                break

    def finished(self, completions: Sequence[PartialCompletion]) -> Iterator[tuple[int, list[Completion]]]:
        """Of the prompts of these completions, those that are done, with all their completions."""
        for prompt in dict.fromkeys(completion.prompt for completion in completions if completion.over):
            if all(completion.over for completion in self.unfinished[prompt]):
                yield prompt, [self._completion(completion) for completion in self.unfinished.pop(prompt)]

    def _is_stopped(self, completion: PartialCompletion) -> bool:
        if not self.settings.stop:
            return False
        text = str(self._tokenizer.decode(completion.tokens[-self._tail :], skip_special_tokens=False))
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
    """A seed below 2^31, derived from the parts."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()
    return int.from_bytes(digest[:4]) >> 1


def stream_of(seed: int, prompt: int, completion: int, length: int) -> list[float]:
    """The random numbers in [0, 1) that the tokens of a completion are drawn with."""
    drawn: list[float] = np.random.default_rng([seed, prompt, completion]).random(length).tolist()
    return drawn


def choose(logits: Tensor, settings: Sampling, drawn: Tensor, seen: Tensor | None = None) -> Chosen:
    """The next token of each row.

    Args:
        logits: `[R, V]`.
        drawn: `[R]` float64, a random number in [0, 1) for each row.
        seen: `[R, V]`, whether a token has occurred in the row; needed for a repetition penalty.
    """
    logits = widened(logits)
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
        scores = scores.masked_fill(scores < _least_of_top_p(scores, top_k, top_p), float("-inf"))
    if min_p > 0:
        least = scores.amax(-1, keepdim=True) + float(np.log(min_p))
        scores = scores.masked_fill(scores < least, float("-inf"))
    return scores


def _least_of_top_p(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """`[R, 1]`: the lowest score of the most likely tokens that together reach `top_p`. Without `top_k`, each step
    waits for the device to say whether the first `LIKELY` tokens suffice: sorting the whole vocabulary takes longer."""
    normaliser = scores.logsumexp(-1, keepdim=True)
    for count in (min(LIKELY, scores.shape[-1]), scores.shape[-1]):
        likeliest = scores.topk(count).values
        probabilities = (likeliest - normaliser).double().exp()
        mass = probabilities.cumsum(-1)
        if 0 < top_k <= count or bool((mass[:, -1] >= top_p).all()):
            break
    kept = (mass - probabilities < top_p).sum(-1, keepdim=True)
    return likeliest.gather(-1, kept - 1)


def draw(scores: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens `[R]` drawn from the softmax of the scores `[R, V]`, and their log-probs `[R]`."""
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
    # If rounding puts the number at or beyond the end, the last token may have a probability of 0.
    possible = weights.view(rows, -1).gather(-1, tokens) > 0
    # Waiting for a GPU's answer takes longer than finding the most likely token.
    if scores.device.type != "cpu" or not bool(possible.all()):
        tokens = torch.where(possible, tokens, scores.argmax(-1, keepdim=True))
    logprobs = scores.gather(-1, tokens) - top - edges[:, -1:].log().to(scores.dtype)
    return tokens.squeeze(-1), logprobs.squeeze(-1)
