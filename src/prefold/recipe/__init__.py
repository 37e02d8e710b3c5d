"""The recipe file: strict sections, dotted overrides, resolved dump, JSON schema.

A recipe is YAML with one section per stage. Every field is declared once, here or beside the algorithm it belongs to,
with its type, bounds and meaning; the Python API and the commands take theirs from here. An unknown field is an error
that names the nearest one; nothing is accepted and then ignored. Fields left out take the method's vetted default
(`Algorithm.defaults`) or the one written here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prefold.recipe.explain import make_section
from prefold.recipe.pairs import Pairs
from prefold.recipe.rewards import EndpointJudge, Reward, RewardBase, WinRate, parse_reward
from prefold.recipe.sampling import Chat, Generate
from prefold.recipe.sections import (
    Benchmark,
    Data,
    Evaluate,
    Guards,
    Lora,
    Merge,
    Model,
    Publish,
    Rows,
    Source,
    Train,
)
from prefold.recipe.text import builtin_recipes, first_comment, parse_yaml, read_text

if TYPE_CHECKING:
    from prefold.recipe.dump import as_dict, dump_recipe, json_schema
    from prefold.recipe.load import load_recipe, make_recipe
    from prefold.recipe.recipe import Recipe, RecipeBase

__all__ = [
    "Benchmark",
    "Chat",
    "Data",
    "EndpointJudge",
    "Evaluate",
    "Generate",
    "Guards",
    "Lora",
    "Merge",
    "Model",
    "Pairs",
    "Publish",
    "Recipe",
    "RecipeBase",
    "Reward",
    "RewardBase",
    "Rows",
    "Source",
    "Train",
    "WinRate",
    "as_dict",
    "builtin_recipes",
    "dump_recipe",
    "first_comment",
    "json_schema",
    "load_recipe",
    "make_recipe",
    "make_section",
    "parse_reward",
    "parse_yaml",
    "read_text",
]

_WITH_ALGORITHMS = {
    "Recipe": "recipe",
    "RecipeBase": "recipe",
    "as_dict": "dump",
    "dump_recipe": "dump",
    "json_schema": "dump",
    "load_recipe": "load",
    "make_recipe": "load",
}
"""Imported when they are used: algorithms import torch, which takes seconds, and the commands' flags need none."""


def __getattr__(name: str) -> Any:
    if name not in _WITH_ALGORITHMS:
        raise AttributeError(f"module `prefold.recipe` has no attribute `{name}`")
    return getattr(import_module(f"prefold.recipe.{_WITH_ALGORITHMS[name]}"), name)
