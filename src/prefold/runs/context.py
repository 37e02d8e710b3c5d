"""What several stages need: the data of the run, and what is made of its recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from prefold.data.examples import Examples
from prefold.data.findings import fingerprint
from prefold.data.mixture import Prepared, load_split
from prefold.data.preference import Unpaired
from prefold.evaluation.scores import OpenTask
from prefold.evaluation.tasks import open_tasks
from prefold.evaluation.win_rate import Compares, open_judge
from prefold.files import read_json
from prefold.generation.groups import prompts_of
from prefold.models.load import tokenizer_of
from prefold.pairs.candidates import column_names
from prefold.recipe import RecipeBase
from prefold.rewards.functions import LoadedReward, open_rewards
from prefold.runs.comparison import require_models
from prefold.runs.fingerprints import inputs_of, require_unchanged
from prefold.training.offline import StepOrder
from prefold.trees.memory import auto_max_tokens
from prefold.trees.packing import TokenTree
from prefold.trees.scorer import Scorer, choose_scorer, unwrapped

STAND_IN = 32
"""Tokens."""


def read_and_check(recipe: RecipeBase) -> Prepared:
    """The data, once what else the recipe names could be opened: rewards, judge, other models."""
    prepared = read_once(recipe, tokenizer_of(recipe.model))
    if does_sample(recipe):
        loaded_rewards(recipe, column_names(prompts_of(prepared.train)))
    if recipe.evaluate.win_rate:
        judge_of(recipe, tokenizer_of(recipe.model))
    require_models(recipe.evaluate.compare_with)
    return prepared


def fingerprints(prepared: Prepared) -> dict[str, str]:
    return {"train": fingerprint(prepared.train), "held_out": fingerprint(prepared.held_out)}


def as_read(recipe: RecipeBase, prepared: Prepared) -> dict[str, Any]:
    """What a run must find unchanged when it goes on: its data, and what it reads beside it."""
    return {**prepared.report.as_json(), "fingerprint": {**fingerprints(prepared), **inputs_of(recipe)}}


_last_read: dict[str, Prepared] = {}


def read_once(recipe: RecipeBase, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """The data of a recipe; the stages of one run share it."""
    key = f"{recipe.model!r} {recipe.data!r} {recipe.train.seed} {recipe.method}"
    if key not in _last_read:
        _last_read.clear()
        _last_read[key] = load_split(recipe.data, tokenizer, recipe.train.seed, recipe.algorithm.kind.data)
    return _last_read[key]


def forget_data() -> None:
    """Read the data anew when it is next needed: files may have changed."""
    _last_read.clear()


def labels_of(examples: Examples) -> list[bool]:
    return [record.label for record in examples.records if isinstance(record, Unpaired)]


def does_sample(recipe: RecipeBase) -> bool:
    """Whether the method trains on completions that it samples."""
    return recipe.algorithm.kind.samples


def loaded_rewards(recipe: RecipeBase, columns: Sequence[str]) -> list[LoadedReward]:
    """Raises UserError if a reward cannot be loaded, or asks for what there is not."""
    return open_rewards(recipe.rewards, ["prompts", "completions", "completion_ids", *columns])


def head_seed_of(recipe: RecipeBase) -> int | None:
    """What a new head is drawn by, for a method that wants one that gives scores."""
    return recipe.train.seed if recipe.algorithm.kind.scores else None


def scorer_of(recipe: RecipeBase, model: torch.nn.Module, examples: Examples) -> Scorer:
    setting = recipe.train.max_tokens
    budget = auto_max_tokens(unwrapped(model), recipe.train.gradient_checkpointing) if setting == "auto" else setting
    draws = recipe.algorithm.draws
    longest = max(tree.longest for tree in examples.trees) + (draws.max_completion_length if draws else 0)
    return choose_scorer(model, _checked_trees(examples), budget, recipe.model.attn_implementation, longest)


def _checked_trees(examples: Examples) -> list[TokenTree]:
    """Sample trees; where completions are yet to be sampled, ends of their prompts stand in for them."""
    trees = sample_trees(examples)
    stand_ins = tuple(tree.prompt[-STAND_IN:] for tree in trees)
    return [tree if tree.completions else replace(tree, completions=stand_ins) for tree in trees]


def order_of(recipe: RecipeBase, trees: int) -> StepOrder:
    settings, iterations = recipe.train, recipe.algorithm.iterations
    draws = round(settings.num_train_epochs * trees)
    if settings.max_steps:
        draws = math.ceil(settings.max_steps / iterations) * settings.batch_size
    return StepOrder(trees, settings.batch_size, max(1, draws), settings.seed, iterations)


def check_tasks(recipe: RecipeBase) -> list[OpenTask]:
    """Open the tasks that the recipe asks for.

    Raises:
        UserError: one of them cannot be asked.
    """
    return open_tasks(recipe.evaluate, tokenizer_of(recipe.model)) if recipe.evaluate.tasks else []


def judge_of(recipe: RecipeBase, tokenizer: PreTrainedTokenizerBase) -> Compares:
    assert recipe.evaluate.win_rate is not None

    def token_ids(texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    return open_judge(recipe.evaluate.win_rate.judge, token_ids)


def prepared_data(recipe: RecipeBase) -> Prepared:
    """The data as it was checked.

    Raises:
        UserError: the data, or another file that the run reads, has changed since.
    """
    prepared = read_and_check(recipe)
    require_unchanged(read_json(recipe.run_folder / "data.json"), as_read(recipe, prepared), recipe.output_dir)
    return prepared


def sample_trees(examples: Examples) -> list[TokenTree]:
    """Two small trees and a middling one, for checks that should cost little."""
    trees = examples.trees
    by_size = sorted(range(len(trees)), key=lambda place: trees[place].size)
    return [trees[place] for place in (*by_size[:2], by_size[len(by_size) // 2])]
