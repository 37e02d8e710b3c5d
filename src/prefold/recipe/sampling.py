"""How answers are sampled: the settings that `evaluate`, `generate`, `chat` and `pairs` share."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from prefold.recipe.section import Section

MaxNewTokens = Annotated[int, Field(gt=0, description="Longest answer, in tokens.")]
Temperature = Annotated[float, Field(ge=0, allow_inf_nan=False, description="0 is greedy.")]
MinP = Annotated[
    float,
    Field(ge=0, le=1, description="Leave out tokens below this share of the likeliest one's probability; 0 is off."),
]


class Sampling(Section):
    system: str | None = None
    """System message before each prompt; unset: what the prompt or the chat template brings."""
    max_new_tokens: MaxNewTokens = 256
    temperature: Temperature = 0.0
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the likeliest tokens that together have this probability."""
    top_k: int = Field(0, ge=0)
    """Sample from this many of the likeliest tokens; 0 is off."""
    min_p: MinP = 0.0
    seed: int = Field(42, ge=0)
    """Seed of the sampling."""


class Generate(Sampling):
    num_answers: int = Field(1, gt=0)
    """Answers per prompt."""


class Chat(Sampling):
    temperature: Temperature = 0.7
    min_p: MinP = 0.05
