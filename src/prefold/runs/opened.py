"""Opens what a recipe names (model, rewards, tasks, judge), and says what cannot be used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from prefold.data.chat import encode
from prefold.data.examples import Examples, prompts_of
from prefold.errors import UserError
from prefold.evaluation.people import require_votes
from prefold.evaluation.scores import OpenTask
from prefold.evaluation.tasks import open_tasks
from prefold.evaluation.win_rate import Compares, open_judge
from prefold.launch import shards
from prefold.models.adapters import load_policy
from prefold.models.load import load_model
from prefold.models.merge import compared
from prefold.recipe import RecipeBase
from prefold.rewards.load import load_rewards, require_arguments
from prefold.rewards.scoring import LoadedReward, column_names
from prefold.runs.comparison import require_models
from prefold.runs.context import Run
from prefold.training.arguments import training_arguments
from prefold.training.loop import StepOrder
from prefold.training.optimizer import require_optimizer
from prefold.trees.attention import unwrapped
from prefold.trees.memory import auto_max_tokens
from prefold.trees.packing import TokenTree
from prefold.trees.scorer import Scorer, choose_scorer

WITHOUT_COLUMNS = ("prompts", "completions", "completion_ids")
"""Arguments of every reward, whatever columns the data have."""
TRAINED_LOGITS = "trained_logits.safetensors"
UNKNOWN_STEPS = 1000
"""Stands in for the number of steps while the data have not been counted."""


def require_usable(recipe: RecipeBase) -> PreTrainedModel | PeftModel:
    """The model to train, without its weights, in seconds. Raises UserError if model, adapter, LoRA, optimizer or
    schedule cannot be used."""
    shapes = policy_of(recipe, contents=False)
    require_optimizer(training_arguments(recipe, recipe.train.max_steps or UNKNOWN_STEPS))
    return shapes


def require_openable(run: Run) -> None:
    """Raises UserError if a reward, the judge or a model to compare with cannot be used, as far as a cheap check can
    tell, or if rounds have nothing held out. A later stage would stop because of it, after hours."""
    recipe, data = run.recipe, run.prepared
    if recipe.rewards:
        rewards = loaded_rewards(recipe, column_names(prompts_of(data.train)))
        if data.held_out:
            columns = column_names(prompts_of(data.held_out))
            require_arguments(rewards, [*WITHOUT_COLUMNS, *columns], "is no column of the held-out rows")
    if recipe.rounds and not data.held_out:
        what, advice = "nothing is held out to compare rounds on", "set `eval_fraction`, or name `eval`"
        raise UserError(what, where="`data`", advice=advice)
    if recipe.rounds and recipe.rounds.judge:
        open_judge(recipe.rounds.judge, lambda texts: [])
    if win_rate := recipe.evaluate.win_rate:
        require_votes(win_rate.votes) if win_rate.votes else judge_of(run)
    require_models(recipe.evaluate.compare_with)


def tasks_of(run: Run) -> list[OpenTask]:
    """The tasks that the recipe names. Raises UserError if one of them cannot be used."""
    return open_tasks(run.recipe.evaluate, run.tokenizer) if run.recipe.evaluate.tasks else []


def judge_of(run: Run) -> Compares:
    win_rate = run.recipe.evaluate.win_rate
    assert win_rate is not None and win_rate.judge is not None
    return open_judge(win_rate.judge, partial(encode, tokenizer=run.tokenizer))


def loaded_rewards(recipe: RecipeBase, columns: Sequence[str]) -> list[LoadedReward]:
    """Raises UserError if a reward cannot be loaded, or needs an argument that is not available."""
    return load_rewards(recipe.rewards, [*WITHOUT_COLUMNS, *columns])


def policy_of(recipe: RecipeBase, contents: bool = True) -> PreTrainedModel | PeftModel:
    """The model to train; see `load_model`."""
    section, settings, head_seed = recipe.model, recipe.train, head_seed_of(recipe)
    parts = shards(settings.fsdp)
    if recipe.lora == "none":
        # Mixed precision keeps the trained weights in float32 and computes in the recipe's dtype.
        return load_model(section, dtype="float32", head_seed=head_seed, shards=parts, contents=contents)
    return load_policy(section, recipe.lora, settings.seed, head_seed, parts, contents)


def head_seed_of(recipe: RecipeBase) -> int | None:
    """The seed of a new score head, for a method that trains one."""
    return recipe.train.seed if recipe.algorithm.kind.scores else None


def scorer_of(
    recipe: RecipeBase, model: torch.nn.Module, examples: Examples, dtype: torch.dtype | None = None
) -> Scorer:
    """`dtype`: what the model computes in; by default that of the weights."""
    setting = recipe.train.max_tokens
    budget = auto_max_tokens(unwrapped(model), recipe.train.gradient_checkpointing) if setting == "auto" else setting
    draws = recipe.algorithm.draws
    lengths = [prompt + max(completions, default=0) for prompt, *completions in examples.lengths]
    longest = max(lengths) + (draws.max_completion_length if draws else 0)
    # For the self-check, the last 32 tokens of prompts stand in where completions are yet to be sampled.
    trees = [*sample_trees(examples), examples.trees[lengths.index(max(lengths))]]
    stand_ins = tuple(tree.prompt[-32:] for tree in trees)
    *checked, deepest = [tree if tree.completions else replace(tree, completions=stand_ins) for tree in trees]
    return choose_scorer(model, checked, budget, recipe.model.attn_implementation, longest, deepest, dtype)


def served_folder(recipe: RecipeBase) -> Path:
    """Where adapters are put for servers."""
    wanted = recipe.generation.adapter_folder
    return Path(wanted).expanduser() / recipe.run_folder.name if wanted else recipe.run_folder / "served"


def sample_trees(examples: Examples) -> list[TokenTree]:
    """The two smallest trees and one of median size, for cheap checks."""
    sizes = [sum(lengths) for lengths in examples.lengths]
    by_size = sorted(range(len(sizes)), key=sizes.__getitem__)
    return [examples.trees[index] for index in (*by_size[:2], by_size[len(by_size) // 2])]


def compared_rows(recipe: RecipeBase, examples: Examples) -> list[list[int]]:
    """Rows of token ids on which the merged model is compared with the trained one."""
    trees = sample_trees(examples)
    if recipe.algorithm.kind.scores:
        return compared([tree.prompt + ids for tree in trees for ids in tree.completions])
    return compared([sum(tree.completions[:1], tree.prompt) for tree in trees])


def trained_logits(folder: Path) -> Tensor | None:
    """The quantised model's logits of `compared_rows` at the end of training; None if it was not quantised."""
    file = folder / TRAINED_LOGITS
    return load_file(file)["logits"] if file.is_file() else None


def order_of(recipe: RecipeBase, trees: int) -> StepOrder:
    settings, iterations = recipe.train, recipe.algorithm.iterations
    draws = round(settings.num_train_epochs * trees)
    if settings.max_steps:
        draws = math.ceil(settings.max_steps / iterations) * settings.batch_size
    return StepOrder(trees, settings.batch_size, max(1, draws), settings.seed, iterations)
