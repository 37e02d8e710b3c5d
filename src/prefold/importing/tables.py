"""Tables of other tools' keys, from the `*.yaml` files beside this one, and conversions of the values."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from functools import cache
from importlib import resources
from typing import Any, Literal, NamedTuple

from prefold.recipe import parse_yaml
from prefold.recipe.sections import OPTIMIZERS, SCHEDULERS


class NoCounterpartError(Exception):
    """A value that no recipe can hold; the message says what to do."""


def of_names(names: Collection[str], advice: str) -> Callable[[Any], Any]:
    """A conversion that takes these names as they are, and no others."""

    def convert(value: Any) -> Any:
        if isinstance(value, str) and value in names:
            return value
        raise NoCounterpartError(advice)

    return convert


def whole_or_share(value: Any) -> Any:
    """A number of steps, or a share of them below 1."""
    return int(value) if isinstance(value, float) and value >= 1 and value.is_integer() else value


def mapping(value: Any) -> Any:
    """A mapping, which may be written as JSON."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, Mapping):
        raise NoCounterpartError("no mapping, and no JSON of one; write it as `{key: value}`")
    return dict(value)


def overlong(value: Any) -> Any:
    choices = read_tool("transformers")["overlong"]
    if str(value) in choices:
        return choices[str(value)]
    raise NoCounterpartError("answers are never cut; see `data.overlong`")


def listed(value: Any) -> list[Any]:
    """A list of values, which may be written as one text with commas."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return value if isinstance(value, list) else [value]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def modules(value: Any) -> Any:
    """LoRA's target modules: `all-linear`, a pattern, or a list of names."""
    names = listed(value)
    if names in (["all"], ["all-linear"]):
        return "all-linear"
    # peft takes a string as a pattern, and a list as names.
    return value if isinstance(value, str) and re.search(r"[*+^$|\\(\[]", value) else names


CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "same": lambda value: value,
    "scheduler": of_names(SCHEDULERS, "choose one of transformers' schedules for `train.lr_scheduler_type`"),
    "optimizer": of_names(
        OPTIMIZERS, "not one of transformers' optimizers that work here; set `train.optim`, e.g. to `adamw_torch`"
    ),
    "steps": whole_or_share,
    "overlong": overlong,
    "mapping": mapping,
    "listed": listed,
    "modules": modules,
    "switch": bool,
    "on": lambda value: value or None,
    "all_linear": lambda value: "all-linear" if value else None,
    "thinking": lambda value: {"enable_thinking": value},
    "negated": lambda value: not value,
    "revision": lambda value: None if value == "main" else value,
    "duplicates": lambda value: "drop_exact" if value else "keep",
}
"""What makes a field's value of a key's; None if the field need not be set."""


class Entry(NamedTuple):
    """What becomes of a key. `text`: of `field` its name, of `decided` why none is needed, of `missing` what to do."""

    kind: Literal["field", "decided", "missing"]
    text: str
    conversion: str = "same"


Table = Mapping[str, Entry]


@cache
def read_tool(name: str) -> dict[str, Any]:
    """The content of a tool's YAML file."""
    text = (resources.files("prefold.importing") / f"{name}.yaml").read_text(encoding="utf-8")
    values: dict[str, Any] = parse_yaml(text, name)
    return values


def table_of(tables: Mapping[str, Any]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for key, field in tables.get("fields", {}).items():
        entries[key] = Entry("field", field) if isinstance(field, str) else Entry("field", field["field"], field["as"])
    for kind in ("decided", "missing"):
        entries |= {key: Entry(kind, text) for text, keys in tables.get(kind, {}).items() for key in keys}
    return entries
