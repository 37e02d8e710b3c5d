"""The settings of sampling, and its result: completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prefold.recipe import sampling as settings


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling. `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 are
    off.

    Args:
        stop: texts that end a completion; its text ends before them.
        end_tokens: ids that end a completion; None for the model's own.
        with_model_logprobs: whether completions include the model's own log-probs.
        with_entropies: whether they include entropies.
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
    with_entropies: bool = False

    @property
    def truncates(self) -> bool:
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @classmethod
    def of(cls, wanted: settings.Sampling, num_answers: int = 1) -> Sampling:
        """From a section of a recipe, or from the options of a command."""
        truncation = wanted.top_p, wanted.top_k, wanted.min_p
        return cls(wanted.max_new_tokens, num_answers, wanted.temperature, *truncation, wanted.seed)


@dataclass(frozen=True)
class Completion:
    """What a model wrote. `token_ids` include the end token; `finished` is False if the length limit cut it off.

    Log-probs in nats, one for each token: `logprobs` of the distribution that it was drawn from (0 if greedy), and, on
    request, `model_logprobs` of the model's own, at temperature 1. `entropies`, on request: in nats, of the
    distribution at each token, at the sampling temperature, before `top_p`, `top_k` and `min_p`.
    """

    token_ids: tuple[int, ...]
    text: str
    finished: bool
    logprobs: tuple[float, ...] = ()
    model_logprobs: tuple[float, ...] | None = None
    entropies: tuple[float, ...] | None = None

    @property
    def finish_reason(self) -> Literal["stop", "length"]:
        """In the words of OpenAI's API."""
        return "stop" if self.finished else "length"
