"""What the stages of a run share: recipe, folder, tokenizer and data. `opened.py` opens what else a recipe names."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from prefold.data.mixture import Prepared
from prefold.data.prepared_cache import prepare
from prefold.files import read_json
from prefold.models.tokenizer import tokenizer_of
from prefold.recipe import RecipeBase
from prefold.runs.fingerprints import require_same_tokens, require_unchanged
from prefold.terminal import busy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Run:
    """A run, as its stages receive it: tokenizer and data are read when a stage first needs them.

    Args:
        measured_before: results of models before training, by everything that decides them; the runs of a sweep share
            it.
    """

    def __init__(self, recipe: RecipeBase, measured_before: dict[str, Any] | None = None):
        self.recipe, self.folder = recipe, recipe.run_folder
        self.measured_before = {} if measured_before is None else measured_before

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return tokenizer_of(self.recipe.model)

    @cached_property
    def prepared(self) -> Prepared:
        recipe = self.recipe
        tokenizer = self.tokenizer
        with busy("reading the data"):
            return prepare(recipe.data, tokenizer, recipe.train.seed, recipe.data_kind)

    def checked_data(self) -> Prepared:
        """The data that the run began with. Raises UserError: the data, or other inputs of `check`, have changed."""
        began, prepared = read_json(self.folder / "data.json"), self.prepared
        require_unchanged(self.recipe, self.folder)
        require_same_tokens(began, prepared, self.recipe.output_dir)
        return prepared
