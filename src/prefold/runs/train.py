"""Train: the policy, its trainer and whoever watches it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainingArguments

from prefold import ranks
from prefold.algorithms import GRPO
from prefold.data.examples import Examples
from prefold.data.mixture import Prepared
from prefold.errors import StageError, UserError
from prefold.files import cache_folder, new_folder
from prefold.generation.groups import prompts_of
from prefold.models.adapters import load_policy
from prefold.models.device import choose_device, choose_dtype
from prefold.models.load import load_model, tokenizer_of, trainable_parameters
from prefold.pairs.candidates import column_names
from prefold.publishing.hub import push_checkpoint
from prefold.recipe import RecipeBase
from prefold.runs.context import (
    Run,
    head_seed_of,
    labels_of,
    loaded_rewards,
    order_of,
    scorer_of,
)
from prefold.runs.fingerprints import row_list
from prefold.terminal import progress_bar, say
from prefold.training.arguments import training_arguments
from prefold.training.checkpoints import kept_in, last_checkpoint, step_of
from prefold.training.guards import Facts
from prefold.training.interrupt import Interruption
from prefold.training.keeping import save_weights
from prefold.training.offline import PreferenceTrainer, StepOrder, TreeSet
from prefold.training.online import OnlineTrainer
from prefold.training.pushes import Pushes
from prefold.training.record import StepRecord
from prefold.training.trackers import open_trackers
from prefold.training.watch import RolledBack, Watch
from prefold.trees.memory import free_memory
from prefold.trees.reference import reference_logprobs
from prefold.trees.scorer import Scorer


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
    folder = recipe.run_folder
    model = _policy(recipe)
    scorer = scorer_of(recipe, model, prepared.train)
    _require_packing(scorer)
    make_trainer = (_online_trainer if recipe.algorithm.kind.samples else _offline_trainer)(recipe, scorer, prepared)
    free_memory()  # of the self-check and the reference
    checkpoint = _last_checkpoint(recipe)
    done, order = step_of(checkpoint), order_of(recipe, len(prepared.train))
    interruption = Interruption(every=order.iterations)
    with interruption, _trackers(recipe), progress_bar("train", len(order), done) as advance:
        record = StepRecord(folder, done, advance)
        trainer = make_trainer(order, record, training_arguments(recipe, len(order)))
        trainer.watch_by(_watch(recipe, record, done, order, prepared))
        for callback in (*(_outside(recipe) if ranks.is_first() else []), interruption):
            trainer.add_callback(callback)
        if checkpoint:
            trainer.scorer.max_tokens, trainer.carried = kept_in(checkpoint)
            say(f"  going on after step {done}")
        with scorer.in_place():
            trainer.require_metric()
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        interruption.leave()
    target = folder / ("trained" if recipe.lora == "none" else "adapter")
    with new_folder(target) if ranks.is_first() else nullcontext(target) as aside:
        save_weights(model, aside)
        if recipe.model.chat_template and ranks.is_first():
            tokenizer_of(recipe.model).save_pretrained(aside)
    del trainer, make_trainer, model, scorer
    free_memory()


def _outside(recipe: RecipeBase) -> list[TrainerCallback]:
    """Who else is told of training."""
    pushes = [Pushes(partial(push_checkpoint, recipe))] if recipe.publish and recipe.publish.checkpoints else []
    return [*open_trackers(recipe.train.report_to), *pushes]


def _watch(recipe: RecipeBase, record: StepRecord, done: int, order: StepOrder, prepared: Prepared) -> Watch:
    dtype = choose_dtype(recipe.model.dtype, choose_device())
    settings = recipe.train
    facts = Facts(len(order), settings.learning_rate, settings.batch_size, scales_gradients=dtype == torch.float16)
    origins = prepared.train.origins
    return Watch(
        recipe.guards.actions,
        facts,
        record,
        done,
        rows_of=lambda step: row_list([origins[place] for place in order[step - 1]]),
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


MakeTrainer = Callable[[StepOrder, StepRecord, TrainingArguments], PreferenceTrainer]


def _offline_trainer(recipe: RecipeBase, scorer: Scorer, prepared: Prepared) -> MakeTrainer:
    train = _tree_set(recipe, scorer, prepared.train)
    held_out = _tree_set(recipe, scorer, prepared.held_out) if recipe.train.eval_steps else None
    patience = recipe.train.early_stopping_patience
    return partial(PreferenceTrainer, recipe.algorithm, scorer, train, held_out=held_out, patience=patience)


def _tree_set(recipe: RecipeBase, scorer: Scorer, examples: Examples) -> TreeSet:
    """Examples with what the algorithm asks for."""
    needs, dtype = recipe.algorithm, choose_dtype(recipe.model.dtype, choose_device())
    reference = reference_logprobs(scorer, examples.trees, cache_folder(), dtype) if needs.needs_reference else None
    return TreeSet(examples.trees, reference, labels_of(examples) if needs.kind.data == "unpaired" else None)


def _online_trainer(recipe: RecipeBase, scorer: Scorer, prepared: Prepared) -> MakeTrainer:
    assert isinstance(recipe.algorithm, GRPO)
    columns = column_names(prompts_of(prepared.train))
    rewards, tokenizer = loaded_rewards(recipe, columns), tokenizer_of(recipe.model)
    return partial(OnlineTrainer, recipe.algorithm, scorer, prepared.train, rewards, columns, tokenizer)


def _policy(recipe: RecipeBase) -> torch.nn.Module:
    """The model to train, with its trainable parameters counted aloud."""
    model: torch.nn.Module
    if recipe.lora == "none":
        # Mixed precision keeps the trained weights in float32 and computes in the recipe's dtype.
        model = load_model(recipe.model, dtype="float32", head_seed=head_seed_of(recipe), sharded=recipe.train.fsdp)
    else:
        model = load_policy(recipe.model, recipe.lora, recipe.train.seed, head_seed_of(recipe), recipe.train.fsdp)
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
