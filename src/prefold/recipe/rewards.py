"""What scores completions in a recipe: rewards, and the judges of a win rate."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Annotated, Any, get_type_hints
from urllib.parse import urlsplit

from pydantic import Discriminator, Field, Tag, TypeAdapter, create_model, field_validator, model_validator

from prefold.recipe.section import Section
from prefold.rewards.functions import REWARDS, OnError, settings_of


class RewardBase(Section):
    name: str = Field(min_length=1)
    """A built-in reward; or, with `file`, the function of that name in it."""
    file: str | None = Field(None, min_length=1)
    """A Python file with a reward function."""
    weight: float = Field(1.0, allow_inf_nan=False)
    """What its numbers are multiplied with before those of all rewards are added."""
    on_error: OnError = "stop"
    """What an exception, or anything but a finite number or None, does: `stop` the run and show the completion, or
    `skip`: the completion has no score of this reward, and is counted."""

    @property
    def settings(self) -> dict[str, Any]:
        """What is given of the built-in reward's own settings."""
        return {
            name: value
            for name in type(self).model_fields
            if name not in RewardBase.model_fields and (value := getattr(self, name)) is not None
        }

    @model_validator(mode="before")
    @classmethod
    def only_its_own_settings(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(name := values.get("name"), str):
            return values
        own = [] if values.get("file") else list(settings_of(name))
        known = [*own, *RewardBase.model_fields]
        for key, value in values.items():
            # A resolved recipe holds the settings of all rewards, empty where they are not this one's.
            if key not in known and (value is not None or key not in cls.model_fields):
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean `{near[0]}`?" if near else "it has " + (", ".join(own) or "none")
                raise ValueError(f"`{key}` is not a setting of `{name}`; {hint}")
        return values

    @model_validator(mode="after")
    def can_be_made(self) -> RewardBase:
        if self.file is None:
            missing = [name for name, needed in settings_of(self.name).items() if needed and name not in self.settings]
            if missing:
                raise ValueError(f"`{self.name}` needs `{missing[0]}`")
            REWARDS[self.name](**self.settings)
        return self


def _reward_settings() -> dict[str, Any]:
    """The settings of all built-in rewards as optional fields, with the meanings that stand below them."""
    found: dict[str, Any] = {}
    for reward in REWARDS.values():
        meanings, types = TypeAdapter(reward).json_schema()["properties"], get_type_hints(reward)
        for name in (field.name for field in fields(reward)):
            found[name] = (types[name] | None, Field(None, description=meanings[name].get("description")))
    return found


Reward: type[RewardBase] = create_model(
    "Reward", __base__=RewardBase, __doc__="One reward: built in, or a function of a Python file.", **_reward_settings()
)


class EndpointJudge(Section):
    """A chat model behind an OpenAI-compatible endpoint. It is shown both orders of every two answers."""

    endpoint: str = Field(min_length=1)
    """Its address, e.g. `http://localhost:8000/v1`. A key is read from the environment variable OPENAI_API_KEY."""
    model: str = Field(min_length=1)
    """The model's name there."""
    timeout: float = Field(300.0, gt=0)
    """Seconds that a reply may take."""
    concurrency: int = Field(8, gt=0)
    """Requests at a time."""

    @field_validator("endpoint")
    @classmethod
    def holds_no_password(cls, value: str) -> str:
        if "@" in urlsplit(value).netloc:
            raise ValueError("holds a password, which would stand in the run folder; put the key in OPENAI_API_KEY")
        return value


def _kind_of_judge(value: Any) -> str:
    of_endpoint = isinstance(value, EndpointJudge) or (isinstance(value, dict) and "endpoint" in value)
    return "judge:endpoint" if of_endpoint else "judge:reward"


class WinRate(Section):
    judge: Annotated[
        Annotated[EndpointJudge, Tag("judge:endpoint")] | Annotated[Reward, Tag("judge:reward")],
        Discriminator(_kind_of_judge),
    ]
    """Who judges: a reward as in `rewards`, e.g. `{name: reward_model, model: NAME}`, which prefers the answer that it
    gives more; or a chat model, `{endpoint: URL, model: NAME}`."""
