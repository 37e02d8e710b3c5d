"""What is wrong with a recipe, in one message: field, line, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from prefold.algorithms import Algorithm
from prefold.errors import UserError
from prefold.recipe.recipe import Recipe

HINTS = {
    "per_device_train_batch_size": "`train.batch_size` is pairs per optimizer step over all devices: write the "
    "product of per_device_train_batch_size, gradient_accumulation_steps and the number of devices{product}",
    "model_name_or_path": "write `model: {{name: ...}}`",
    "max_prompt_length": "it belongs in the section `data`",
    "max_length": "it belongs in the section `data`",
    "beta": "it belongs in the section of the method, e.g. `dpo: {{beta: 0.1}}`",
    "loss_type": "each loss is a `method` of its own",
    "warmup_ratio": "write `warmup_steps`, the number of steps",
    "fp16": "write `model: {{dtype: float16}}`",
    "bf16": "write `model: {{dtype: bfloat16}}`",
    "push_to_hub": "write `publish: {{hub_model_id: NAME/MODEL}}`",
    "hub_private_repo": "write `publish: {{private: true}}`",
}
HINTS["gradient_accumulation_steps"] = HINTS["per_device_train_batch_size"]


def describe(errors: Sequence[ErrorDetails], values: dict[str, Any], where: str, lines: dict[str, int]) -> UserError:
    """Turn pydantic's first finding into one message with field, line, what was expected and what to do."""
    error = errors[0]
    path = _field_path(error)
    dotted = ".".join(path)
    place = f"{where}, line {lines[dotted]}" if dotted in lines else where
    kind = error["type"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return UserError(f"`{dotted}` is not a field", where=place, advice=_nearest(path, values))
    if kind == "missing" or kind == "missing_argument":
        return UserError(f"`{dotted}` is missing", where=place, expected=_meaning(path))
    if kind == "value_error":
        message = error["msg"].removeprefix("Value error, ")
        return UserError(f"`{dotted}`: {message}" if dotted else message, where=place)
    # A field of several types has one finding for each of them.
    expected = dict.fromkeys(_expected(other["msg"]) for other in errors if _field_path(other) == path)
    got = error["input"]
    return UserError(
        f"`{dotted}` is {_shown(got)}", where=place, expected=" or ".join(expected), advice=_number_hint(got)
    )


def _field_path(error: ErrorDetails) -> list[str]:
    return [str(part) for part in error["loc"] if not _is_union_branch(str(part))]


def _expected(message: str) -> str:
    message = message.removeprefix("Input should be ").removeprefix("a valid ")
    if "object" in message or "dictionary" in message:
        return "a section: fields below it, or {field: value}"
    return message.replace("array", "list")


def _shown(value: Any) -> str:
    text = "empty" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _number_hint(got: Any) -> str:
    try:
        float(got)
    except (TypeError, ValueError):
        return ""
    return "write the number without quotes" if isinstance(got, str) else ""


_BRANCHES = {"Lora", "int", "str", "float", "none", "bool"}


def _is_union_branch(part: str) -> bool:
    return part in _BRANCHES or part.startswith(("literal[", "list[", "dict[", "function-", "judge:"))


def section_fields(path: Sequence[str]) -> dict[str, str]:
    """Names and meanings of the fields of the section at `path`."""
    here: Any = Recipe
    for part in path:
        if part.isdigit():
            continue
        here = _section_class(here.model_fields[part].annotation) if part in getattr(here, "model_fields", ()) else None
        if here is None:
            return {}
    if issubclass(here, BaseModel):
        return {name: (field.description or "") for name, field in here.model_fields.items()}
    return {field.name: "" for field in fields(here)}


def _section_class(annotation: Any) -> Any:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel | Algorithm):
            return candidate
        if inner := (_section_class(candidate) if get_args(candidate) and candidate is not annotation else None):
            return inner
    return None


def _meaning(path: Sequence[str]) -> str:
    return section_fields(path[:-1]).get(path[-1], "").replace("\n", " ")


def _nearest(path: Sequence[str], values: dict[str, Any]) -> str:
    name = path[-1]
    if name in HINTS:
        train = values.get("train")
        train = train if isinstance(train, dict) else {}
        factors = [train.get("per_device_train_batch_size"), train.get("gradient_accumulation_steps")]
        numbers = [factor for factor in factors if isinstance(factor, int)]
        product = (
            f", on one device `batch_size: {numbers[0] * (numbers[1] if len(numbers) > 1 else 1)}`" if numbers else ""
        )
        return HINTS[name].format(product=product)
    known = list(section_fields(path[:-1]))
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean `{near[0]}`?"
    elsewhere = [dotted for dotted in all_fields() if dotted.split(".")[-1] == name]
    if elsewhere:
        return f"it is a field of another section: `{elsewhere[0]}`"
    return "the fields here are: " + ", ".join(known)


def all_fields() -> Iterator[str]:
    """Every field of a recipe by its dotted path, sections included."""

    def walk(prefix: list[str]) -> Iterator[str]:
        for name in section_fields(prefix):
            yield ".".join([*prefix, name])
            yield from walk([*prefix, name])

    yield from walk([])
