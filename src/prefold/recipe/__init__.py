"""The recipe file: strict sections, dotted overrides, resolved dump, JSON schema.

A recipe is YAML with one section per stage. Every field is declared once, here or beside the algorithm it belongs to,
with its type, bounds and meaning; the Python API and the commands take their parameters from here. An unknown field is
an error that names the nearest one; nothing is accepted and then ignored. A field left out takes the method's default
(`Algorithm.defaults`) or the one written here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prefold.recipe.pairs import Pairs as Pairs
from prefold.recipe.rewards import EndpointJudge as EndpointJudge
from prefold.recipe.rewards import Reward as Reward
from prefold.recipe.rewards import RewardBase as RewardBase
from prefold.recipe.rewards import WinRate as WinRate
from prefold.recipe.rewards import parse_reward as parse_reward
from prefold.recipe.sampling import Chat as Chat
from prefold.recipe.sampling import Generate as Generate
from prefold.recipe.section import make_section as make_section
from prefold.recipe.sections import Benchmark as Benchmark
from prefold.recipe.sections import Data as Data
from prefold.recipe.sections import Evaluate as Evaluate
from prefold.recipe.sections import Generation as Generation
from prefold.recipe.sections import Guards as Guards
from prefold.recipe.sections import Lora as Lora
from prefold.recipe.sections import Model as Model
from prefold.recipe.sections import Publish as Publish
from prefold.recipe.sections import Rows as Rows
from prefold.recipe.sections import Source as Source
from prefold.recipe.text import builtin_recipes as builtin_recipes
from prefold.recipe.text import first_comment as first_comment
from prefold.recipe.text import parse_yaml as parse_yaml
from prefold.recipe.text import read_text as read_text
from prefold.recipe.values import Values as Values

if TYPE_CHECKING:
    from prefold.recipe.load import as_dict as as_dict
    from prefold.recipe.load import as_recipe as as_recipe
    from prefold.recipe.load import dump_recipe as dump_recipe
    from prefold.recipe.load import json_schema as json_schema
    from prefold.recipe.load import load_recipe as load_recipe
    from prefold.recipe.load import make_recipe as make_recipe
    from prefold.recipe.recipe import Recipe as Recipe
    from prefold.recipe.recipe import RecipeBase as RecipeBase

_WITH_ALGORITHMS = {
    "load": ("as_dict", "as_recipe", "dump_recipe", "json_schema", "load_recipe", "make_recipe"),
    "recipe": ("Recipe", "RecipeBase"),
}
"""Names by module, imported on first use: they load every method, which the commands' flags do not need."""


def __getattr__(name: str) -> Any:
    for module, names in _WITH_ALGORITHMS.items():
        if name in names:
            return getattr(import_module(f"prefold.recipe.{module}"), name)
    raise AttributeError(f"module `prefold.recipe` has no attribute `{name}`")
