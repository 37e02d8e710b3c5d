"""Built-in rewards that need only texts or token ids: each function here makes a reward from its settings."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from prefold.recipe import rewards as settings

RewardFunction = Callable[..., Sequence[float | None]]


def length(wanted: settings.Length) -> RewardFunction:
    """-|target - length|: 0 for a completion of exactly that length, one less for each token (character) off it."""

    def in_tokens(completion_ids: Sequence[Sequence[Any]]) -> list[float]:
        return [-float(abs(wanted.target - len(ids))) for ids in completion_ids]

    # A reward is given the arguments that its signature names.
    return in_tokens if wanted.unit == "tokens" else lambda completions: in_tokens(completions)


def regex(wanted: settings.Regex) -> RewardFunction:
    """1 where the pattern is found anywhere in the completion, else 0."""
    pattern = re.compile(wanted.pattern)
    return lambda completions: [float(pattern.search(completion) is not None) for completion in completions]


def repetition(wanted: settings.Repetition) -> RewardFunction:
    """-(share of the word n-grams that repeat an earlier one): 0 if all differ, near -1 if one repeats throughout."""

    def repeated(words: list[str]) -> float:
        size = wanted.ngram_size
        ngrams = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
        return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0

    return lambda completions: [-repeated(completion.lower().split()) for completion in completions]


def exact_number(wanted: settings.ExactNumber) -> RewardFunction:
    """1 where the completion's number is that of the column `answer`, else 0; None where the answer has no number.

    The number of a text is the one after its last `####` if there is one, else its last number. $, % and the commas of
    thousands are ignored, so `$1,250.00` is 1250 and `5%` is 5.
    """

    def equal(completions: Sequence[str], answer: Sequence[Any]) -> list[float | None]:
        return [
            None if (right := number_in(str(value))) is None else float(number_in(completion) == right)
            for completion, value in zip(completions, answer, strict=True)
        ]

    return equal


# A minus after a word, number or closing bracket is no sign; digits after a letter belong to a word (CO2).
_NUMBER = re.compile(
    r"((?<![\w)\]])[-+\u2212])?(?:\$\s?([-+\u2212])?)?"
    r"((?<![A-Za-z0-9_])(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
    r"([eE][-+]?[0-9]{1,3}(?![0-9]))?"
)
_MINUS = ("-", "\u2212")


def number_in(text: str) -> Decimal | None:
    """The number after the last `####` if there is one, else the last number; None if there is none."""
    marked = _numbers(text.rpartition("####")[2]) if "####" in text else []
    numbers = marked[:1] or _numbers(text)
    return numbers[-1] if numbers else None


def _numbers(text: str) -> list[Decimal]:
    return [
        Decimal(("-" if before in _MINUS or after in _MINUS else "") + digits.replace(",", "") + exponent)
        for before, after, digits, exponent in _NUMBER.findall(text)  # signs before and after a dollar
    ]
