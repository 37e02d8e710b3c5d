"""What `prefold pairs` is asked for, and whether it goes together."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from prefold.errors import UserError
from prefold.files import without_home
from prefold.generation.sampling import Sampling
from prefold.recipe import Reward, RewardBase, describe, parse_yaml

LOCAL = "local"
"""Stands for no endpoint where another model has one."""
JUDGE = "judge"


def _default_sampling() -> Sampling:
    return Sampling(max_new_tokens=512, num_answers=0, temperature=0.8)


@dataclass(frozen=True)
class PairSettings:
    """What `prefold pairs` is asked for.

    Args:
        prompts: a file, folder, built-in set or Hub data set, as in a recipe.
        models: one or two; both answer every prompt.
        output: a .jsonl file.
        rewards: what scores the answers: `NAME:SETTING=VALUE,...`, `FILE.py:FUNCTION`, `model:NAME`, or `judge` alone.
        prefer_first: instead of scores, the first model's answer is chosen and the second's rejected.
        endpoints: none (the models are loaded here), one for all models, or one for each (`local`: loaded here).
        sampling: `num_answers` of each model; 0 stands for 4, or with `prefer_first` for 1.
        min_margin: least difference of the scores of a pair, beyond being different at all.
        max_length_ratio: a pair's longer answer has at most so many times the characters of the shorter.
    """

    prompts: str
    models: Sequence[str]
    output: Path
    rewards: Sequence[str] = ()
    prefer_first: bool = False
    endpoints: Sequence[str] = ()
    judge_endpoint: str | None = None
    judge_model: str | None = None
    sampling: Sampling = field(default_factory=_default_sampling)
    min_margin: float = 0.0
    max_length_ratio: float | None = None
    where: str | None = None
    limit: int | None = None
    name: str | None = None
    split: str | None = None
    prompt_column: str | None = None
    system: str | None = None
    concurrency: int = 8
    timeout: float = 300.0
    fresh: bool = False


def checked(settings: PairSettings) -> PairSettings:
    """The settings with their number of answers filled in, if they go together."""
    _check_what_decides(settings)
    per_model = settings.sampling.num_answers or (1 if settings.prefer_first else 4)
    if settings.prefer_first and per_model > 1:
        raise UserError(f"--num-completions {per_model} has no use with --prefer-first", expected="one answer a model")
    if per_model * len(settings.models) < 2:
        raise UserError("--num-completions 1 leaves nothing to compare", expected="2 or more, or a second --model")
    if per_model > 1 and settings.sampling.temperature == 0:
        raise UserError("at --temperature 0 all completions are the same", expected="a temperature above 0")
    if len(settings.endpoints) not in (0, 1, len(settings.models)):
        raise UserError("too many --endpoint", expected="one for all models, or one for each --model, in their order")
    _check_output(settings)
    return replace(settings, sampling=replace(settings.sampling, num_answers=per_model))


def _check_what_decides(settings: PairSettings) -> None:
    if not 1 <= len(settings.models) <= 2:
        raise UserError(f"{len(settings.models)} models", expected="one --model, or two")
    if len(settings.models) == 2 and len({*settings.models}) == 1 and len({*settings.endpoints}) < 2:
        raise UserError("both models are the same", expected="two different ones", advice="raise --num-completions")
    if settings.prefer_first:
        if settings.rewards or settings.min_margin:
            raise UserError("--prefer-first decides by itself", advice="remove --reward and --min-margin, or it")
        if len(settings.models) != 2:
            raise UserError("--prefer-first needs two models", advice="add the one to be rejected: --model OTHER")
    elif not settings.rewards:
        raise UserError("nothing says which answer is better", expected="--reward, or --prefer-first with two models")
    if JUDGE in settings.rewards and len(settings.rewards) > 1:
        raise UserError("--reward judge cannot be added to other rewards", advice="choose one of them")
    judge_options = settings.judge_endpoint, settings.judge_model
    if JUDGE in settings.rewards and None in judge_options:
        raise UserError("--reward judge needs an endpoint", expected="--judge-endpoint URL --judge-model NAME")
    if JUDGE not in settings.rewards and judge_options != (None, None):
        raise UserError("--judge-endpoint and --judge-model are for --reward judge", advice="add it, or remove them")


def _check_output(settings: PairSettings) -> None:
    output, where = settings.output, without_home(str(settings.output))
    if output.suffix != ".jsonl":
        raise UserError("the output is written as JSON lines", where=where, expected="a name that ends in .jsonl")
    if not output.parent.is_dir():
        raise UserError("its folder does not exist", where=where, advice=f"mkdir -p {without_home(str(output.parent))}")
    if not os.access(output.parent, os.W_OK):
        raise UserError("its folder cannot be written to", where=where)
    if output.is_dir() or output.resolve() == Path(settings.prompts).expanduser().resolve():
        raise UserError(
            "is not a file to write pairs to", where=where, expected="another file than that of the prompts"
        )


def parse_reward(text: str) -> RewardBase:
    """`NAME[:SETTING=VALUE,...]`, `FILE.py:FUNCTION[,weight=...]` or `model:NAME[,weight=...]`.

    Raises:
        UserError: it is none of these, or the reward has not such a setting.
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
        values[name] = value if _is_text(name) else parse_yaml(value, where)
    try:
        return Reward.model_validate(values)
    except ValidationError as error:
        raise describe(error.errors(), values, where, {}) from None


def _is_text(setting: str) -> bool:
    field = Reward.model_fields.get(setting)
    return field is not None and str in (field.annotation, *get_args(field.annotation))
