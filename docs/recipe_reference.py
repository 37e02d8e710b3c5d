"""The page of every recipe field: `python docs/recipe_reference.py > docs/recipe.md`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

from prefold.algorithms import ALGORITHMS
from prefold.algorithms.base import Bound
from prefold.recipe import (
    Benchmark,
    Data,
    EndpointJudge,
    Evaluate,
    Guards,
    Lora,
    Model,
    Publish,
    Recipe,
    Source,
    Values,
    json_schema,
)
from prefold.recipe.load import EVAL_FRACTION
from prefold.recipe.rewards import BUILT_IN, Criterion, RewardBase, WinRate
from prefold.recipe.section import Section, meaning_of
from prefold.recipe.sections import Generation, Merge, Rounds, Train

SECTIONS: dict[str, type[Section]] = {
    "model": Model,
    "lora": Lora,
    "data": Data,
    "data.train and data.eval": Source,
    "data.train, values": Values,
    "data.decontaminate": Benchmark,
    "rewards": RewardBase,
    "rewards, criteria of a rubric": Criterion,
    "rounds": Rounds,
    "generation": Generation,
    "train": Train,
    "guards": Guards,
    "merge": Merge,
    "evaluate": Evaluate,
    "evaluate.win_rate": WinRate,
    "evaluate.win_rate.judge, behind an endpoint": EndpointJudge,
    "publish": Publish,
}
"""By their headings, in the order of a recipe; those of lists and parts behind what they belong to."""

HEADING = f"""\
# Every field of a recipe

Written by `python docs/recipe_reference.py > docs/recipe.md` from the code; a test compares the two. `prefold schema`
prints the same as a JSON schema for editors, and `prefold recipes demo` a recipe to start from.

The field `batch_size` of the section `train` is written `train: {{batch_size: 16}}`, and `train.batch_size=16` behind a
command. Any field that is not listed here is an error that names the nearest one. *Unset* means: leave the field out.

Some defaults depend on the method: [the last table](#defaults-of-the-methods). What the methods do is in
[algorithms](algorithms/README.md). Where neither `data.eval` nor `data.eval_fraction` is given, {EVAL_FRACTION} of the
rows are held out.
"""
TABLE = "| field | type | default | meaning |\n|---|---|---|---|\n"
SIMPLE = {str: "text", bool: "true or false", int: "whole number", float: "number", Any: "anything"}
BOUNDS = {"gt": "> {:g}", "ge": "≥ {:g}", "lt": "< {:g}", "le": "≤ {:g}"}


# ---- words for types and values ---------------------------------------------------------------------------------


def type_of(annotation: Any, notes: Iterable[Any] = ()) -> str:
    """In words, with bounds: `whole number, > 0`."""
    if get_origin(annotation) is Annotated:
        annotation, *own = get_args(annotation)
        notes = [*own, *notes]
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    words = list(dict.fromkeys(_kind(kind) for kind in kinds if kind is not NoneType))
    if "number" in words and "whole number" in words:
        words.remove("whole number")  # a number may be whole
    text = " or ".join(words).replace("true or false or number or text", "any value")
    return ", ".join([text, *_bounds(notes)])


def _kind(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return type_of(kind)
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if origin is list:
        return f"list ({type_of(arguments[0])})"
    if origin is dict:
        return "mapping"
    return SIMPLE.get(kind, "section")


def _bounds(notes: Iterable[Any]) -> list[str]:
    texts = []
    for note in notes:
        if isinstance(note, Bound):
            texts.append(note.text)
        elif isinstance(note, FieldInfo):
            texts += _bounds(note.metadata)
        else:
            texts += [
                text.format(value) for name, text in BOUNDS.items() if (value := getattr(note, name, None)) is not None
            ]
    return texts


def shown(value: Any) -> str:
    """A default as a recipe would have it."""
    if isinstance(value, Section):
        return "its defaults"
    if value is None:
        return "unset"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`".replace("e-0", "e-")


def row(name: str, kind: str, default: str, meaning: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (name, kind, default, meaning)) + " |\n"


# ---- the tables -------------------------------------------------------------------------------------------------


def table(section: type[Section], leave_out: Iterable[str] = ()) -> str:
    rows = ""
    for name, field in section.model_fields.items():
        if name not in leave_out:
            default = "required" if field.is_required() else shown(field.default)
            rows += row(f"`{name}`", type_of(field.annotation, field.metadata), default, meaning_of(field))
    return TABLE + rows


def rewards_table() -> str:
    """The settings that each built-in reward has of its own."""
    text = "\n### Built-in rewards\n\nWhat each of them scores: [pairs](pairs.md#what-scores).\n\n" + TABLE.replace(
        "field", "reward and field"
    )
    for name, section in BUILT_IN.items():
        for line in table(section).removeprefix(TABLE).splitlines(keepends=True) or [row("none", "", "", "")]:
            text += f"| `{name}`: {line.removeprefix('| ')}"
    return text


def methods_table() -> str:
    """Each setting once, with the methods that share it."""
    shared: dict[tuple[type, str], list[str]] = {}
    for name, kind in ALGORITHMS.items():
        for setting in fields(kind):
            owner = next(
                ancestor for ancestor in kind.__mro__ if setting.name in vars(ancestor).get("__annotations__", {})
            )
            shared.setdefault((owner, setting.name), []).append(name)
    definitions = json_schema()["$defs"]
    text = "\n## Settings of the methods\n\nIn the section that is named like the method: `dpo: {beta: 0.1}`.\n\n"
    text += TABLE.replace("| field", "| methods | field").replace("|---|", "|---|---|", 1)
    for (_, setting_name), names in shared.items():
        kind = ALGORITHMS[names[0]]
        meaning = " ".join(definitions[kind.__name__]["properties"][setting_name]["description"].split())
        hint = get_type_hints(kind, include_extras=True)[setting_name]
        methods = ", ".join(f"`{name}`" for name in names)
        text += f"| {methods} {row(f'`{setting_name}`', type_of(hint), shown(getattr(kind(), setting_name)), meaning)}"
    return text


def defaults_table() -> str:
    names = list(dict.fromkeys(name for kind in ALGORITHMS.values() for name in kind.defaults))
    rows = {
        method: [kind.defaults.get(name, _of_section(name)) for name in names] for method, kind in ALGORITHMS.items()
    }
    alike: dict[str, list[str]] = {}
    for method, values in rows.items():
        alike.setdefault(" | ".join(map(shown, values)), []).append(f"`{method}`")
    head = " | ".join(f"`{name}`" for name in names)
    text = f"\n## Defaults of the methods\n\n| methods | {head} |\n|---|{'---|' * len(names)}\n"
    return text + "".join(f"| {', '.join(methods)} | {values} |\n" for values, methods in alike.items())


def _of_section(dotted: str) -> Any:
    section, name = dotted.split(".")
    return SECTIONS[section].model_fields[name].default


def page() -> str:
    text = (
        HEADING + "\n## The recipe itself\n\n" + table(Recipe, leave_out={*ALGORITHMS, *SECTIONS} - {"lora", "rewards"})
    )
    for heading, section in SECTIONS.items():
        text += f"\n## `{heading}`\n\n" + table(section)
        text += rewards_table() if heading == "rewards" else ""
    return text + methods_table() + defaults_table()


if __name__ == "__main__":
    print(page(), end="")
