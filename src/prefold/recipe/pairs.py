"""The settings of `prefold pairs`, and which of them go together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator

from prefold.errors import UserError
from prefold.recipe.rewards import Concurrency, Timeout
from prefold.recipe.sampling import MaxLengthRatio, MaxNewTokens, MinMargin, Sampling, Temperature

JUDGE = "judge"
"""Among the values of `reward`: a chat model scores the answers."""
Texts = Annotated[
    list[str], BeforeValidator(lambda value: list(map(str, [value] if isinstance(value, str | Path) else value)))
]


class Pairs(Sampling):
    prompts: Annotated[str, BeforeValidator(str)]
    """A file, folder, built-in set or Hub data set."""
    model: Texts
    """The model that answers, named as MODEL elsewhere; twice for two models."""
    output: Annotated[Path, BeforeValidator(lambda value: Path(value).expanduser())]
    """The file of pairs, .jsonl."""
    reward: Texts = []
    """What scores answers: NAME:SETTING=VALUE,..., FILE.py:FUNCTION, model:NAME or judge. Several add up."""
    prefer_first: bool = False
    """No scores: the first model's answer is chosen, the second's rejected."""
    num_completions: int | None = Field(None, gt=0)
    """Answers per prompt and model: 4; with --prefer-first 1."""
    min_margin: MinMargin = 0.0
    max_length_ratio: MaxLengthRatio = None
    endpoint: Texts = []
    """Address of an OpenAI-compatible server that has the models; with two models, one for each, or `local`."""
    server: Texts = []
    """Address of a vLLM server that has the model; several share the prompts, which are sent as token ids."""
    judge_endpoint: str | None = None
    """Address of the judge's server."""
    judge_model: str | None = None
    """The judge's name there."""
    where: str | None = None
    """Condition on a row's columns, as in a recipe."""
    limit: int | None = Field(None, gt=0)
    """Use only the first so many prompts."""
    name: str | None = None
    """Configuration of a Hub data set."""
    split: str | None = None
    """Split of a built-in set or Hub data set."""
    prompt_column: str | None = None
    """Column of the prompts, if it is not recognised."""
    max_new_tokens: MaxNewTokens = 512
    temperature: Temperature = 0.8
    concurrency: Concurrency = 8
    timeout: Timeout = 300.0
    fresh: bool = False
    """Delete the answers and scores of an earlier run first."""

    @property
    def answers_per_model(self) -> int:
        return self.num_completions or (1 if self.prefer_first else 4)

    @model_validator(mode="after")
    def something_decides(self) -> Self:
        if not 1 <= len(self.model) <= 2:
            raise UserError(f"{len(self.model)} models", expected="one --model, or two")
        if len(self.model) == 2 and len({*self.model}) == 1 and len({*self.endpoint}) < 2:
            raise UserError("both models are the same", expected="two different ones", advice="raise --num-completions")
        if self.prefer_first:
            if self.reward or self.min_margin:
                raise UserError("--prefer-first decides by itself", advice="remove --reward and --min-margin, or it")
            if len(self.model) != 2:
                raise UserError("--prefer-first needs two models", advice="add the one to be rejected: --model OTHER")
        elif not self.reward:
            raise UserError(
                "nothing says which answer is better", expected="--reward, or --prefer-first with two models"
            )
        return self

    @model_validator(mode="after")
    def the_judge_is_known(self) -> Self:
        options = self.judge_endpoint, self.judge_model
        if JUDGE in self.reward and len(self.reward) > 1:
            raise UserError("--reward judge cannot be added to other rewards", advice="choose one of them")
        if JUDGE in self.reward and None in options:
            raise UserError("--reward judge needs an endpoint", expected="--judge-endpoint URL --judge-model NAME")
        if JUDGE not in self.reward and options != (None, None):
            raise UserError(
                "--judge-endpoint and --judge-model are for --reward judge", advice="add it, or remove them"
            )
        return self

    @model_validator(mode="after")
    def there_are_answers_to_compare(self) -> Self:
        number = self.answers_per_model
        if self.prefer_first and number > 1:
            raise UserError(f"--num-completions {number} has no use with --prefer-first", expected="one answer a model")
        if number * len(self.model) < 2:
            raise UserError("--num-completions 1 leaves nothing to compare", expected="2 or more, or a second --model")
        if number > 1 and self.temperature == 0:
            raise UserError("at --temperature 0 all completions are the same", expected="a temperature above 0")
        if self.server and (self.endpoint or len(self.model) > 1):
            raise UserError("--server is for one model, and without --endpoint", expected="one --model and its servers")
        if len(self.endpoint) not in (0, 1, len(self.model)):
            raise UserError(
                "too many --endpoint", expected="one for all models, or one for each --model, in their order"
            )
        return self
