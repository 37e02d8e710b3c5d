"""The recipe file: strict sections, dotted overrides, resolved dump, JSON schema.

A recipe is YAML with one section per stage. Every field is declared once, here or beside the algorithm it belongs to,
with its type, bounds and meaning. An unknown field is an error that names the nearest one; nothing is accepted and then
ignored. Fields left out take the method's vetted default (`Algorithm.defaults`) or the one written here.
"""

from prefold.recipe.dump import as_dict, dump_recipe, json_schema
from prefold.recipe.explain import all_fields, describe
from prefold.recipe.load import load_recipe, make_recipe
from prefold.recipe.recipe import RecipeBase
from prefold.recipe.rewards import EndpointJudge, Reward, RewardBase, WinRate
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

__all__ = [
    "Benchmark",
    "Data",
    "EndpointJudge",
    "Evaluate",
    "Guards",
    "Lora",
    "Merge",
    "Model",
    "Publish",
    "RecipeBase",
    "Reward",
    "RewardBase",
    "Rows",
    "Source",
    "Train",
    "WinRate",
    "all_fields",
    "as_dict",
    "builtin_recipes",
    "describe",
    "dump_recipe",
    "first_comment",
    "json_schema",
    "load_recipe",
    "make_recipe",
    "parse_yaml",
    "read_text",
]
