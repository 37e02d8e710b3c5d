"""Completions while they are written: which tokens they have, when they end, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prefold.generation.sampling import Completion, Sampling, choose, stream_of

OnToken = Callable[[int, int, int], None]
"""Called with the place of a prompt, the number of a completion and its newest token."""


@dataclass
class Row:
    """Completion `number` of the prompt at `prompt`, so far. `drawn` are the numbers that its tokens are drawn with,
    `seen` `[V]` the tokens that a repetition penalty counts."""

    prompt: int
    number: int
    drawn: list[float]
    seen: Tensor | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    model_logprobs: list[float] = field(default_factory=list)
    ended: bool = False
    """By an end token or a stop string."""
    over: bool = False
    """Ended, or as long as it may be."""


class Writing:
    """All completions of one call."""

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
        self._unfinished: dict[int, list[Row]] = {}
        # A token is a byte or more, so that many tokens hold the longest stop string; some, for half characters.
        self._tail = 4 + max((len(stop.encode()) for stop in settings.stop), default=0)

    def begin(self, prompt: int) -> list[Row]:
        """The rows of a prompt, still empty."""
        settings = self.settings
        rows = [
            Row(prompt, number, stream_of(settings.seed, self._numbers[prompt], number, settings.max_new_tokens))
            for number in range(settings.num_answers)
        ]
        self._unfinished[prompt] = rows
        return rows

    def extend(self, rows: Sequence[Row], logits: Tensor) -> None:
        """Give each row its next token, by logits `[rows, V]`."""
        drawn = torch.tensor([row.drawn[len(row.tokens)] for row in rows], dtype=torch.float64, device=logits.device)
        seen = self._seen(rows, logits) if self.settings.repetition_penalty != 1 else None
        chosen = choose(logits, self.settings, drawn, seen)
        logprobs = chosen.logprobs.tolist()
        model_logprobs = None if chosen.model_logprobs is None else chosen.model_logprobs.tolist()
        for place, (row, token) in enumerate(zip(rows, chosen.tokens.tolist(), strict=True)):
            row.tokens.append(token)
            row.logprobs.append(logprobs[place])
            if model_logprobs is not None:
                row.model_logprobs.append(model_logprobs[place])
            if row.seen is not None:
                row.seen[token] = True
            row.ended = token in self._ends or self._is_stopped(row)
            row.over = row.ended or len(row.tokens) == self.settings.max_new_tokens
            if self._on_token is not None:
                self._on_token(row.prompt, row.number, token)

    def finished(self, rows: Sequence[Row]) -> Iterator[tuple[int, list[Completion]]]:
        """The prompts of these rows that are all done, with their completions."""
        for prompt in dict.fromkeys(row.prompt for row in rows if row.over):
            if all(row.over for row in self._unfinished[prompt]):
                yield prompt, [self._completion(row) for row in self._unfinished.pop(prompt)]

    def _seen(self, rows: Sequence[Row], logits: Tensor) -> Tensor:
        for row in rows:
            if row.seen is None:
                row.seen = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
                ids = torch.tensor(self.prompts[row.prompt], device=logits.device)
                # Embeddings may have more tokens than the head.
                row.seen[ids[ids < logits.shape[-1]]] = True
        return torch.stack([row.seen for row in rows if row.seen is not None])

    def _is_stopped(self, row: Row) -> bool:
        if not self.settings.stop:
            return False
        text = str(self._tokenizer.decode(row.tokens[-self._tail :], skip_special_tokens=False))
        return any(stop in text for stop in self.settings.stop)

    def _completion(self, row: Row) -> Completion:
        text = str(self._tokenizer.decode(row.tokens, skip_special_tokens=True))
        cut = min((text.find(stop) for stop in self.settings.stop if stop in text), default=len(text))
        own = tuple(row.model_logprobs) if self.settings.with_model_logprobs else None
        return Completion(tuple(row.tokens), text[:cut], row.ended, tuple(row.logprobs), own)
