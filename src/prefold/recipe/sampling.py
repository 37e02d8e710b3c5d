"""How answers are sampled: the settings that `evaluate`, `generate`, `chat` and `pairs` share."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from prefold.recipe.section import Section

MaxNewTokens = Annotated[int, Field(gt=0, description="Longest answer, in tokens.")]
Temperature = Annotated[float, Field(ge=0, allow_inf_nan=False, description="0 is greedy.")]
TopP = Annotated[
    float, Field(gt=0, le=1, description="Sample from the likeliest tokens that together have this probability.")
]
TopK = Annotated[int, Field(ge=0, description="Sample from this many of the likeliest tokens; 0 is off.")]
MinP = Annotated[
    float,
    Field(ge=0, le=1, description="Leave out tokens below this share of the likeliest one's probability; 0 is off."),
]

# Of the pairs that are made of sampled answers.
MinMargin = Annotated[float, Field(ge=0, description="Smallest difference of a pair's scores.")]
MaxLengthRatio = Annotated[
    float | None,
    Field(ge=1, description="A pair's longer answer has at most so many times the characters of the shorter."),
]


class Sampling(Section):
    system: str | None = None
    """System message before each prompt; unset: what the prompt or the chat template brings."""
    max_new_tokens: MaxNewTokens = 256
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    min_p: MinP = 0.0
    seed: int = Field(42, ge=0)
    """Seed of the sampling."""


class Generate(Sampling):
    num_answers: int = Field(1, gt=0)
    """Answers per prompt."""


class Chat(Sampling):
    temperature: Temperature = 0.7
    min_p: MinP = 0.05
