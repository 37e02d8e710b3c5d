"""The base class of all sections, and validation errors as one message: field, line, what was expected, what to do."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from math import prod
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from prefold.errors import UserError, did_you_mean


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    def changed(self, *names: str) -> list[str]:
        """Which of these fields differ from their defaults."""
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]


SectionType = TypeVar("SectionType", bound=Section)
Function = TypeVar("Function", bound=Callable[..., Any])

HINTS = {
    "per_device_train_batch_size": "`train.batch_size` is pairs per optimizer step over all devices: write the "
    "product of per_device_train_batch_size, gradient_accumulation_steps and the number of devices{product}",
    "model_name_or_path": "write `model: {{name: ...}}`",
    "max_prompt_length": "it belongs in the section `data`",
    "max_length": "it belongs in the section `data`",
    "beta": "it belongs in the section of the method, e.g. `dpo: {{beta: 0.1}}`",
    "loss_type": "each loss is a `method` of its own",
    "warmup_ratio": "write `warmup_steps`, which below 1 is a share of all steps",
    "fp16": "write `model: {{dtype: float16}}`",
    "bf16": "write `model: {{dtype: bfloat16}}`",
    "push_to_hub": "write `publish: {{hub_model_id: NAME/MODEL}}`",
    "hub_private_repo": "write `publish: {{private: true}}`",
}
"""Advice on fields of other tools, and on fields that are often put into the wrong section."""
_BATCH_FACTORS = ("per_device_train_batch_size", "gradient_accumulation_steps")
HINTS["gradient_accumulation_steps"] = HINTS["per_device_train_batch_size"]


def make_section(section: type[SectionType], values: dict[str, Any], where: str = "") -> SectionType:
    """Check the values of a section.

    Raises:
        UserError: for the first thing that is wrong.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise describe(error, section, values, where) from None


def describe(
    invalid: ValidationError,
    section: type[Section],
    values: Mapping[str, Any],
    where: str,
    lines: Mapping[str, int] | None = None,
) -> UserError:
    """Turn pydantic's first error into one message with field, line, what was expected and what to do."""
    errors = invalid.errors()
    error = errors[0]
    path = _field_path(error)
    dotted, kind = ".".join(path), error["type"]
    where = f"{where}, line {lines[dotted]}" if lines and dotted in lines else where
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return UserError(f"`{dotted}` is not a field", where=where, advice=_nearest(path, section, values))
    if kind in ("missing", "missing_argument"):
        meaning = section_fields(section, path[:-1]).get(path[-1], "").replace("\n", " ")
        return UserError(f"`{dotted}` is missing", where=where, expected=meaning)
    if kind == "value_error":
        message = error["msg"].removeprefix("Value error, ")
        return UserError(f"`{dotted}`: {message}" if dotted else message, where=where)
    # pydantic reports a field of several types once for each type.
    expected = dict.fromkeys(_expected(other["msg"]) for other in errors if _field_path(other) == path)
    got = "empty" if error["input"] is None else repr(error["input"])
    return UserError(
        f"`{dotted}` is {got if len(got) <= 60 else got[:57] + '...'}",
        where=where,
        expected=" or ".join(expected),
        advice=_number_hint(error["input"]),
    )


_BRANCH = re.compile(r"(Lora|int|str|float|none|bool)|(literal\[|list\[|dict\[|function-|judge:).*")
"""Parts of an error's path that are not fields: there pydantic names the branch of a union."""


def _field_path(error: ErrorDetails) -> list[str]:
    return [part for part in map(str, error["loc"]) if not _BRANCH.fullmatch(part)]


def _expected(message: str) -> str:
    message = message.removeprefix("Input should be ").removeprefix("a valid ")
    if "object" in message or "dictionary" in message:
        return "a section: fields below it, or {field: value}"
    return message.replace("array", "list")


def _number_hint(got: Any) -> str:
    try:
        float(got)
    except (TypeError, ValueError):
        return ""
    return "write the number without quotes" if isinstance(got, str) else ""


def _nearest(path: Sequence[str], section: type[Section], values: Mapping[str, Any]) -> str:
    name, known = path[-1], list(section_fields(section, path[:-1]))
    if name in HINTS:
        train = values.get("train")
        factors = [train.get(factor) for factor in _BATCH_FACTORS] if isinstance(train, dict) else []
        numbers = [factor for factor in factors if isinstance(factor, int)]
        return HINTS[name].format(product=f", on one device `batch_size: {prod(numbers)}`" if numbers else "")
    if meant := did_you_mean(name, known):
        return meant
    elsewhere = [dotted for dotted in all_fields(section) if dotted.split(".")[-1] == name]
    if elsewhere:
        return f"it is a field of another section: `{elsewhere[0]}`"
    return "the fields here are: " + ", ".join(known)


# ---- the fields of sections -------------------------------------------------------------------------------------


def section_fields(section: type[Section], path: Sequence[str] = ()) -> dict[str, str]:
    """Names and descriptions of the fields of a section, or of the section nested in it at `path`."""
    here: Any = section
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
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or is_dataclass(annotation)):
        return annotation
    return next(filter(None, map(_section_class, get_args(annotation))), None)


def all_fields(section: type[Section], path: Sequence[str] = ()) -> Iterator[str]:
    """Every field by its dotted path, sections included."""
    for name in section_fields(section, path):
        yield ".".join([*path, name])
        yield from all_fields(section, [*path, name])


# ---- functions and commands that take the fields of a section as their arguments --------------------------------


def with_fields(
    section: type[Section], annotate: Callable[[str, FieldInfo], Any] | None = None
) -> Callable[[Function], Function]:
    """Give a function that ends in `**settings` a signature with the section's fields, inherited ones last.

    Args:
        annotate: (name, field) -> the parameter's annotation. Without it, the annotation is the field's type, and the
            fields' descriptions take the place of `**settings` in the function's docstring.
    """

    def decorate(function: Function) -> Function:
        *own, _ = inspect.signature(function, eval_str=True).parameters.values()
        inherited = getattr(section.__base__, "model_fields", {})
        names = [*(name for name in section.model_fields if name not in inherited), *inherited]
        fields = {
            name: section.model_fields[name] for name in names if name not in [parameter.name for parameter in own]
        }
        added = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.is_required() else field.default,
                annotation=annotate(name, field) if annotate else field.annotation,
            )
            for name, field in fields.items()
        ]
        positional = [parameter for parameter in own if parameter.kind is not parameter.KEYWORD_ONLY]
        after = [parameter for parameter in own if parameter.kind is parameter.KEYWORD_ONLY]
        function.__signature__ = inspect.Signature([*positional, *added, *after])  # type: ignore[attr-defined]
        function.__annotations__ |= {parameter.name: parameter.annotation for parameter in added}
        if annotate is None:
            meanings = [f"        {name}: {meaning_of(field)}" for name, field in fields.items()]
            function.__doc__ = (function.__doc__ or "").replace("        **settings\n", "\n".join(meanings) + "\n")
        return function

    return decorate


def meaning_of(field: FieldInfo) -> str:
    """A field's description, in one line."""
    return " ".join((field.description or "").split())
