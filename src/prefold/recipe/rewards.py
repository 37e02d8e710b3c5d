"""What scores completions in a recipe: rewards, and the judges of a win rate."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, Discriminator, Field, Tag, create_model, model_validator
from pydantic.fields import FieldInfo

from prefold.errors import UserError, did_you_mean
from prefold.recipe.section import Section, make_section
from prefold.recipe.text import parse_yaml

# ---- built-in rewards -------------------------------------------------------------------------------------------


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return text


class Length(Section):
    target: int = Field(ge=0)
    """The wanted length."""
    unit: Literal["tokens", "characters"] = "tokens"
    """What `target` counts."""


class Regex(Section):
    pattern: Annotated[str, AfterValidator(_pattern)]
    """A regular expression of Python's `re`; `(?s)` at its start lets a dot match a new line."""


class ExactNumber(Section):
    pass


class Repetition(Section):
    ngram_size: int = Field(3, ge=1)
    """Words in an n-gram."""


class RewardModel(Section):
    model: str
    """Hub id or folder of the reward model; of `rubric`, the chat model's name at its endpoint."""


class SymbolicEquality(Section):
    seconds: float = Field(5.0, gt=0)
    """Formulas that take longer to compare count as different."""


Timeout = Annotated[float, Field(gt=0, description="Seconds that an endpoint's answer may take.")]
Concurrency = Annotated[int, Field(gt=0, description="Concurrent requests to an endpoint.")]


def without_password(address: str) -> str:
    if "@" in urlsplit(address).netloc:
        raise ValueError("holds a password, which the run folder would record; put a key in the environment variable")
    return address


class AtEndpoint(Section):
    endpoint: Annotated[str, Field(min_length=1), AfterValidator(without_password)]
    """Address, e.g. `http://localhost:8000/v1`. A key is read from the environment variable OPENAI_API_KEY."""
    model: str = Field(min_length=1)
    """The chat model's name at the endpoint."""
    timeout: Timeout = 300.0
    concurrency: Concurrency = 8


class Criterion(Section):
    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$")
    """Its name in the model's replies, e.g. `correct`."""
    text: str = Field(min_length=1)
    """What a completion has to be or to do."""
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Its share of the score, relative to the other criteria's."""


def _named_apart(criteria: list[Criterion]) -> list[Criterion]:
    names = [criterion.name for criterion in criteria]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two criteria are called `{twice}`")
    return criteria


class Rubric(AtEndpoint):
    criteria: Annotated[list[Criterion], Field(min_length=1), AfterValidator(_named_apart)]
    """What the chat model says yes or no to; the score is the weight of the criteria that are met over that of all."""


BUILT_IN: dict[str, type[Section]] = {
    "rubric": Rubric,
    "length": Length,
    "regex": Regex,
    "exact_number": ExactNumber,
    "repetition": Repetition,
    "reward_model": RewardModel,
    "symbolic_equality": SymbolicEquality,
}

# ---- a reward of a recipe ---------------------------------------------------------------------------------------


class RewardBase(Section):
    name: str = Field(min_length=1)
    """A built-in reward; or, with `file`, the name of a function in it."""
    file: str | None = Field(None, min_length=1)
    """A Python file with a reward function."""
    weight: float = Field(1.0, allow_inf_nan=False)
    """Weight of its scores in the sum over all rewards."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do if it raises an exception, or returns anything but a finite number or None: `stop` the run and show
    the completion, or `skip`: the completion has no score of this reward, and is counted."""

    @property
    def settings(self) -> dict[str, Any]:
        """The built-in reward's own settings, as far as they are given."""
        own = {name: getattr(self, name) for name in type(self).model_fields if name not in RewardBase.model_fields}
        return {name: value for name, value in own.items() if value is not None}

    @model_validator(mode="before")
    @classmethod
    def only_its_own_settings(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(name := values.get("name"), str):
            return values
        if not values.get("file") and name not in BUILT_IN:
            hint = did_you_mean(name, BUILT_IN) or f"there are {', '.join(BUILT_IN)}"
            raise ValueError(f"`{name}` is not a built-in reward ({hint}); a function of your own needs its `file`")
        own = {} if values.get("file") else BUILT_IN[name].model_fields
        known = [*own, *RewardBase.model_fields]
        for key, value in values.items():
            # A dumped reward has the settings of all rewards, empty where they are not its own.
            if key not in known and (value is not None or key not in cls.model_fields):
                hint = did_you_mean(key, known) or "it has " + (", ".join(own) or "none")
                raise ValueError(f"`{key}` is not a setting of `{name}`; {hint}")
        missing = [key for key, field in own.items() if field.is_required() and values.get(key) is None]
        if missing:
            raise ValueError(f"`{name}` needs `{missing[0]}`")
        return values


def _optional(field: FieldInfo) -> Any:
    kind: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    return kind | None, Field(None, description=field.description)


Reward: type[RewardBase] = create_model(
    "Reward",
    __base__=RewardBase,
    __doc__="One reward: built in, or a function of a Python file.",
    **{name: _optional(field) for section in BUILT_IN.values() for name, field in section.model_fields.items()},
)


def parse_reward(text: str) -> RewardBase:
    """`NAME[:SETTING=VALUE,...]`, `FILE.py:FUNCTION[,weight=...]` or `model:NAME[,weight=...]`.

    Raises:
        UserError: it is none of these, or the reward has no such setting.
    """
    first, *given = re.split(r",(?=\w+=)", text)
    values: dict[str, Any]
    if function := re.fullmatch(r"(.+\.py):(\w+)", first):
        values = {"file": function[1], "name": function[2]}
    elif first.startswith("model:"):
        values = {"name": "reward_model", "model": first.removeprefix("model:")}
    else:
        name, _, setting = first.partition(":")
        values, given = {"name": name}, [*filter(None, [setting]), *given]
    where = f"--reward {text}"
    for setting in given:
        name, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"`{setting}` is not a setting", where=where, expected="NAME:SETTING=VALUE,...")
        kind = Reward.model_fields[name].annotation if name in Reward.model_fields else None
        is_text = any(str in (part, *get_args(part)) for part in (kind, *get_args(kind)))
        values[name] = value if is_text else parse_yaml(value, where)
    return make_section(Reward, values, where)


# ---- judges -----------------------------------------------------------------------------------------------------


class EndpointJudge(AtEndpoint):
    """A chat model behind an OpenAI-compatible endpoint. It is shown both orders of every two answers."""


def _kind_of_judge(value: Any) -> str:
    # The rubric, which is a reward, has an endpoint too.
    of_endpoint = isinstance(value, EndpointJudge) or (
        isinstance(value, dict) and "endpoint" in value and "name" not in value
    )
    return "judge:endpoint" if of_endpoint else "judge:reward"


class WinRate(Section):
    judge: (
        Annotated[
            Annotated[EndpointJudge, Tag("judge:endpoint")] | Annotated[Reward, Tag("judge:reward")],
            Discriminator(_kind_of_judge),
        ]
        | None
    ) = None
    """The judge: a reward as in `rewards`, e.g. `{name: reward_model, model: NAME}`, which prefers the answer with the
    higher score; or a chat model, `{endpoint: URL, model: NAME}`."""
    votes: str | None = Field(None, min_length=1)
    """Instead of a judge: a file of people's votes on the answers of this run, as `prefold ui` writes it."""

    @model_validator(mode="after")
    def somebody_judges(self) -> WinRate:
        if (self.judge is None) == (self.votes is None):
            raise ValueError("give either `judge`, a reward or a chat model, or `votes`, a file of people's votes")
        return self
