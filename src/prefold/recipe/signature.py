"""Functions and commands that take the fields of a section as their arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic.fields import FieldInfo

from prefold.recipe.section import Section

Function = TypeVar("Function", bound=Callable[..., Any])
Annotate = Callable[[str, FieldInfo], Any]


def with_fields(section: type[Section], annotate: Annotate | None = None) -> Callable[[Function], Function]:
    """Have a function that ends in `**settings` show the section's fields in its signature, those that it does not
    inherit first, and their meanings in its docstring.

    Args:
        annotate: gives a field's annotation by its name; without it the annotation is the field's type.
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
    """In one line."""
    return " ".join((field.description or "").split())
