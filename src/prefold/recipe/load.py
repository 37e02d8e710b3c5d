"""From a recipe's text and overrides to a checked recipe, and back to text; and the JSON schema of recipes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from prefold.algorithms import ALGORITHMS, Algorithm
from prefold.errors import UserError
from prefold.files import without_home
from prefold.recipe.paths import run_folder, start_of_paths, with_paths_from
from prefold.recipe.recipe import Recipe, RecipeBase
from prefold.recipe.section import describe
from prefold.recipe.text import apply_override, field_lines, parse_yaml, read_text

OPTIONAL = ("rewards", "rounds", "publish")
"""Sections that a resolved recipe leaves out if they are empty."""
EVAL_FRACTION = 0.1
"""Share held out where a recipe says nothing about it, since no run ends without a comparison."""


def load_recipe(name: str, overrides: Sequence[str] = ()) -> RecipeBase:
    """Read a recipe, apply `section.field=value` overrides, fill in the method's defaults and check everything.

    The recipe of a run folder is for that folder, even if it was moved, and its paths still lead where they did.

    Raises:
        UserError: for the first thing that is wrong, with its field and line.
    """
    text, where = read_text(name)
    values = parse_yaml(text, where)
    if not isinstance(values, dict):
        raise UserError(
            "the recipe is empty" if values is None else "the recipe is not a mapping of sections", where=where
        )
    folder = run_folder(name)
    if folder is not None:
        if (start := start_of_paths(folder)) != Path.cwd():
            values = with_paths_from(start, values)
        values["output_dir"] = without_home(str(folder))
    for override in overrides:
        apply_override(values, override)
    return make_recipe(values, where, lines=None if overrides or folder else field_lines(text))


def as_recipe(recipe: str | Path | RecipeBase, overrides: Sequence[str] = ()) -> RecipeBase:
    """A recipe as it is, or loaded by its name."""
    if not isinstance(recipe, RecipeBase):
        return load_recipe(str(recipe), overrides)
    if overrides:
        raise UserError("overrides are for a recipe by name", advice="give them to `prefold.load_recipe`")
    return recipe


def make_recipe(values: dict[str, Any], where: str = "recipe", lines: dict[str, int] | None = None) -> RecipeBase:
    """Check the values of a recipe that is already in memory."""
    algorithm = ALGORITHMS.get(str(values.get("method")))
    if algorithm is not None:
        values = with_defaults(values, str(values["method"]), algorithm)
    try:
        # In JSON mode a strict model still builds the algorithm's dataclass from a mapping.
        return Recipe.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise describe(error, Recipe, values, where, lines) from None


def with_defaults(values: dict[str, Any], method: str, algorithm: type[Algorithm]) -> dict[str, Any]:
    """A copy of `values` in which the fields left out have the method's defaults."""
    filled = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    if isinstance(data := filled.get("data"), dict) and not data.get("eval"):
        data.setdefault("eval_fraction", EVAL_FRACTION)
    if filled.get(method) is None:
        filled[method] = {}
    for dotted, default in algorithm.defaults.items():
        section, field = dotted.split(".")
        if isinstance(filled.setdefault(section, {}), dict):
            filled[section].setdefault(field, default)
    return filled


# ---- back to text -----------------------------------------------------------------------------------------------


def as_dict(recipe: RecipeBase) -> dict[str, Any]:
    """The resolved recipe as plain values, without unused sections, and with `~` for the user's home folder."""
    values = recipe.model_dump(mode="json")
    values[recipe.method] = asdict(recipe.algorithm)
    values["rewards"] = [reward.model_dump(mode="json", exclude_none=True) for reward in recipe.rewards]
    if judged := recipe.evaluate.win_rate:
        values["evaluate"]["win_rate"] = judged.model_dump(mode="json", exclude_none=True)
    own = {recipe.method, *(name for name in OPTIONAL if getattr(recipe, name))}
    unused = {*ALGORITHMS, *OPTIONAL} - own
    if not recipe.generation.by_servers:
        unused.add("generation")
    return {key: _with_tilde(value) for key, value in values.items() if key not in unused}


def _with_tilde(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tilde(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_tilde(item) for item in value]
    return without_home(value) if isinstance(value, str) else value


def dump_recipe(recipe: RecipeBase, start: Path | None = None) -> str:
    """The resolved recipe as YAML; with `start`, its relative paths are made absolute from there."""
    values = as_dict(recipe) if start is None else with_paths_from(start, as_dict(recipe))
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, with a description of every setting of the methods."""
    schema: dict[str, Any] = Recipe.model_json_schema()
    for algorithm in ALGORITHMS.values():
        settings = schema["$defs"][algorithm.__name__]["properties"]
        # pydantic reads the docstrings of a dataclass's own fields only.
        for ancestor in filter(is_dataclass, algorithm.__mro__[1:]):
            inherited = TypeAdapter(ancestor).json_schema().get("properties", {})
            settings |= {name: {**meaning, **settings[name]} for name, meaning in inherited.items()}
    return schema
