"""Train: the policy, what its steps are computed from, and who is told of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from prefold import ranks
from prefold.data.examples import Examples, prompts_of
from prefold.data.mixture import Prepared
from prefold.errors import StageError, UserError
from prefold.files import cache_folder, new_folder
from prefold.models.device import choose_device, choose_dtype
from prefold.models.load import tokenizer_of, trainable_parameters
from prefold.publishing.hub import push_checkpoint
from prefold.recipe import RecipeBase
from prefold.rewards.scoring import column_names
from prefold.runs.context import Run, loaded_rewards, order_of, policy_of, scorer_of
from prefold.runs.fingerprints import row_list
from prefold.terminal import progress_bar, say
from prefold.training.arguments import training_arguments
from prefold.training.checkpoints import last_checkpoint, step_of
from prefold.training.guards import Facts, Guards, RolledBack
from prefold.training.loop import StepOrder, StoredTrees, TrainingLoop, TreeSet
from prefold.training.pushes import Pushes
from prefold.training.record import StepRecord
from prefold.training.sampled_trees import SampledTrees
from prefold.training.saved_state import save_weights
from prefold.training.trackers import open_trackers, send_completions
from prefold.trees.memory import free_memory
from prefold.trees.reference import reference_logprobs
from prefold.trees.scorer import Scorer

TELLING = ("length_bias", "telling_opening")
"""Findings of the check about what tells chosen from rejected without reading them."""


def train(run: Run) -> None:
    """Train; where a guard rolls back, once more from the checkpoint before."""
    _require_sharing(run.recipe)
    with ranks.first_ahead():
        run.require_openable()
        prepared = run.checked_data()
    while True:
        try:
            return _train(run.recipe, prepared)
        except RolledBack:
            pass
        free_memory()


def _train(recipe: RecipeBase, prepared: Prepared) -> None:
    algorithm, folder = recipe.algorithm, recipe.run_folder
    model = _policy(recipe)
    scorer = scorer_of(recipe, model, prepared.train)
    _require_packing(scorer)
    stored = None if algorithm.draws else _tree_set(recipe, scorer, prepared.train)
    held_out = _tree_set(recipe, scorer, prepared.held_out) if stored and recipe.train.eval_steps else None
    free_memory()  # of the self-check and the reference
    checkpoint = _last_checkpoint(recipe)
    done, order = step_of(checkpoint), order_of(recipe, len(prepared.train))
    with _trackers(recipe), progress_bar("train", len(order), done) as advance:
        record = StepRecord(folder, done, advance)
        loop = TrainingLoop(
            algorithm,
            scorer,
            StoredTrees(stored, order) if stored else _sampled_trees(recipe, scorer, prepared.train, order, record),
            order,
            record,
            _guards(recipe, record, done, order, prepared),
            training_arguments(recipe, len(order)),
            held_out,
            recipe.train.early_stopping_patience,
            _callbacks(recipe) if ranks.is_first() else (),
        )
        if checkpoint:
            say(f"  going on after step {done}")
        loop.train(checkpoint)
    target = folder / ("trained" if recipe.lora == "none" else "adapter")
    with new_folder(target) if ranks.is_first() else nullcontext(target) as aside:
        save_weights(model, aside)
        if recipe.model.chat_template and ranks.is_first():
            tokenizer_of(recipe.model).save_pretrained(aside)
    del loop, model, scorer
    free_memory()


def _tree_set(recipe: RecipeBase, scorer: Scorer, examples: Examples) -> TreeSet:
    """Examples with what the algorithm asks for."""
    algorithm, dtype = recipe.algorithm, choose_dtype(recipe.model.dtype, choose_device())
    reference = reference_logprobs(scorer, examples.trees, cache_folder(), dtype) if algorithm.needs_reference else None
    extras: dict[str, Any] = {
        name: torch.tensor([getattr(record, name) for record in examples.records])[:, None]
        for name in algorithm.record_fields
    }
    return TreeSet(examples.trees, reference, extras)


def _sampled_trees(
    recipe: RecipeBase, scorer: Scorer, prompts: Examples, order: StepOrder, record: StepRecord
) -> SampledTrees:
    assert recipe.algorithm.draws is not None
    scorer.temperature = recipe.algorithm.draws.temperature
    columns = column_names(prompts_of(prompts))
    rewards, tokenizer = loaded_rewards(recipe, columns), tokenizer_of(recipe.model)
    dtype = choose_dtype(recipe.model.dtype, choose_device())
    seed = recipe.train.seed
    show = [record.rollout, *([send_completions] if "wandb" in recipe.train.report_to else [])]
    return SampledTrees(recipe.algorithm, scorer, prompts, rewards, columns, tokenizer, order, show, seed, dtype)


def _callbacks(recipe: RecipeBase) -> list[TrainerCallback]:
    pushes = [Pushes(partial(push_checkpoint, recipe))] if recipe.publish and recipe.publish.checkpoints else []
    return [*open_trackers(recipe.train.report_to), *pushes]


def _guards(recipe: RecipeBase, record: StepRecord, done: int, order: StepOrder, prepared: Prepared) -> Guards:
    dtype = choose_dtype(recipe.model.dtype, choose_device())
    settings = recipe.train
    telling = [finding.message for finding in prepared.report.findings if finding.kind in TELLING]
    in_float16 = dtype == torch.float16
    facts = Facts(len(order), settings.learning_rate, settings.batch_size, telling, in_float16)
    origins = prepared.train.origins
    return Guards(
        recipe.guards.model_dump(),
        facts,
        record,
        done,
        rows_of=lambda step: row_list([origins[i] for i in order[step - 1]]),
        last_step=lambda: step_of(_last_checkpoint(recipe)),
    )


def _last_checkpoint(recipe: RecipeBase) -> Path | None:
    return ranks.from_first(lambda: last_checkpoint(recipe.run_folder / "checkpoints"))


def _require_sharing(recipe: RecipeBase) -> None:
    """Raises UserError if what the recipe asks for cannot be had from the processes that there are."""
    if ranks.processes() > 1:
        say(f"  {ranks.processes()} processes, each with a share of every step")
        if recipe.model.device_map:
            what = "places one model on several devices, and here each process has its own"
            raise UserError(what, where="`model.device_map`", advice="remove it, or start one process")
    elif recipe.train.fsdp:
        raise UserError(
            "shards weights over processes, and there is one",
            where="`train.fsdp`",
            advice="start several, e.g. `prefold run RECIPE --nproc 2`",
        )


def _require_packing(scorer: Scorer) -> None:
    if scorer.sharded and not scorer.packed:
        raise StageError(f"`train.fsdp` needs a model whose trees can be packed; here: {scorer.reason}")


def _policy(recipe: RecipeBase) -> torch.nn.Module:
    """The model to train, with its trainable parameters counted aloud."""
    model = policy_of(recipe)
    trainable, total = trainable_parameters(model)
    say(f"  {trainable:,} of {total:,} parameters are trained ({trainable / total:.2%})")
    return model


@contextmanager
def _trackers(recipe: RecipeBase) -> Iterator[None]:
    """W&B and TensorBoard take their settings from the environment; their files go into the run folder."""
    wanted = {
        "WANDB_PROJECT": recipe.train.project,
        "WANDB_DIR": str(recipe.run_folder),
        "TENSORBOARD_LOGGING_DIR": str(recipe.run_folder / "tensorboard"),
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        if "wandb" in recipe.train.report_to:
            import wandb

            with suppress(Exception, SystemExit):  # a tracker that is down costs its curves, never the run
                wandb.finish()
                wandb.teardown()  # else it keeps this run's folder for the next one in the process
