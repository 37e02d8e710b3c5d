"""Recipes as text: where they are found, and their YAML."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from prefold.errors import UserError, did_you_mean


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `5e-5` is a number and a repeated key is an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$|^[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)


def _no_repeated_keys(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"`{key}` is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _no_repeated_keys)


def parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"not valid YAML: {getattr(error, 'problem', error)}", where=f"{where}{line}") from None


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `section.field=value` in place; numbers in the path are indices of a list."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError("not an override", where=override, expected="section.field=value, e.g. `train.max_steps=10`")
    *parents, last = dotted.split(".")
    value, here = parse_yaml(text, override), values
    for part in parents:
        here = here.setdefault(part, {}) if isinstance(here, dict) else here[_index(here, part, override)]
    here[last if isinstance(here, dict) else _index(here, last, override)] = value


def _index(here: Any, part: str, override: str) -> Any:
    if isinstance(here, list) and part.isdigit() and int(part) < len(here):
        return int(part)
    raise UserError(
        f"there is no `{part}` to set", where=override, expected="the path of a field that the recipe can have"
    )


def field_lines(text: str) -> dict[str, int]:
    """1-based line of every field of a YAML text, by dotted path."""
    lines: dict[str, int] = {}

    def walk(node: yaml.Node | None, path: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner = f"{path}.{key.value}" if path else str(key.value)
                lines[inner] = key.start_mark.line + 1
                walk(value, inner)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                walk(value, f"{path}.{index}")

    walk(yaml.compose(text, Loader=_Loader), "")
    return lines


def builtin_recipes() -> list[str]:
    return sorted(
        entry.name[:-5] for entry in resources.files("prefold.recipes").iterdir() if entry.name.endswith(".yaml")
    )


def read_text(name: str) -> tuple[str, str]:
    """The YAML text of a recipe file, run folder or built-in recipe, and the name to call it by in messages."""
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "recipe.yaml"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), name
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot be read: {error}", where=name, expected="a recipe in YAML, UTF-8") from None
    if name in builtin_recipes():
        return (resources.files("prefold.recipes") / f"{name}.yaml").read_text(encoding="utf-8"), name
    what = "no such recipe"
    if Path(name).expanduser().is_dir():
        what = "a folder without recipe.yaml, so no run folder"
        if runs := sorted(path.parent.name for path in Path(name).expanduser().glob("*/recipe.yaml")):
            raise UserError(what, where=name, advice=f"name a run in it: {', '.join(runs[:8])}")
    raise UserError(
        what,
        where=name,
        expected="a YAML file, a run folder, or one of the built-in recipes: " + ", ".join(builtin_recipes()),
        advice=did_you_mean(name, builtin_recipes()) or "`prefold recipes` lists the built-in ones",
    )


def first_comment(name: str) -> str:
    """The description of a built-in recipe, which is its first line."""
    return read_text(name)[0].splitlines()[0].lstrip("# ")
