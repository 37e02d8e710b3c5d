"""A resolved recipe as plain values and YAML, and the schema of all recipes."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from typing import Any

import yaml
from pydantic import TypeAdapter

from prefold.algorithms import ALGORITHMS
from prefold.files import without_home
from prefold.recipe.recipe import Recipe, RecipeBase


def as_dict(recipe: RecipeBase) -> dict[str, Any]:
    """The resolved recipe as plain values, without sections that the method does not use and without the user's home
    path."""
    values = recipe.model_dump(mode="json")
    values[recipe.method] = asdict(recipe.algorithm)
    values["rewards"] = [reward.model_dump(mode="json", exclude_none=True) for reward in recipe.rewards]
    if judged := recipe.evaluate.win_rate:
        values["evaluate"]["win_rate"] = judged.model_dump(mode="json", exclude_none=True)
    idle = {*ALGORITHMS, "rewards"} - {recipe.method, "rewards" if recipe.rewards else ""}
    idle |= {"publish"} if recipe.publish is None else set()
    return {key: _homeless(value) for key, value in values.items() if key not in idle}


def _homeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _homeless(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_homeless(item) for item in value]
    return without_home(value) if isinstance(value, str) else value


def dump_recipe(recipe: RecipeBase) -> str:
    return yaml.safe_dump(as_dict(recipe), sort_keys=False, allow_unicode=True, width=120)


def json_schema() -> dict[str, Any]:
    """Of a recipe, with what every setting of an algorithm means."""
    schema: dict[str, Any] = Recipe.model_json_schema()
    for algorithm in ALGORITHMS.values():
        settings = schema["$defs"][algorithm.__name__]["properties"]
        # pydantic reads the docstrings of a dataclass's own fields only.
        for ancestor in filter(is_dataclass, algorithm.__mro__[1:]):
            inherited = TypeAdapter(ancestor).json_schema().get("properties", {})
            settings |= {name: {**meaning, **settings[name]} for name, meaning in inherited.items()}
    return schema
