"""Train: assembles policy, scorer, reference, source of trees, guards and trackers, and runs the training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from prefold import ranks
from prefold.data.examples import Examples, prompts_of
from prefold.data.mixture import Prepared
from prefold.device import choose_device, choose_dtype
from prefold.errors import StageError, UserError, counted
from prefold.files import cache_folder, new_file, new_folder
from prefold.generation.servers import Servers
from prefold.launch import launched_here, shards
from prefold.models.load import trainable_parameters
from prefold.models.merge import logits_of
from prefold.models.tokenizer import tokenizer_of
from prefold.publishing.hub import push_checkpoint
from prefold.recipe import RecipeBase
from prefold.rewards.scoring import column_names
from prefold.runs.context import Run
from prefold.runs.fingerprints import row_list
from prefold.runs.opened import (
    TRAINED_LOGITS,
    compared_rows,
    loaded_rewards,
    order_of,
    policy_of,
    require_openable,
    scorer_of,
    served_folder,
)
from prefold.terminal import progress_bar, say
from prefold.training.arguments import training_arguments
from prefold.training.checkpoints import last_checkpoint, step_of
from prefold.training.guards import Facts, Guards, RolledBack
from prefold.training.loop import StepOrder, StoredTrees, TrainingLoop, TreeSet
from prefold.training.pushes import Pushes
from prefold.training.record import StepRecord
from prefold.training.sampled_trees import SampledTrees, sampling_of
from prefold.training.saved_state import save_weights
from prefold.training.served import ServedCompletions
from prefold.training.trackers import send_completions, trackers
from prefold.trees.memory import free_memory
from prefold.trees.reference import Reference
from prefold.trees.scorer import Scorer, can_be_reference

BETWEEN_WRITES = 300.0
"""Least seconds between two files of the reference's log-probs, so that a long run does not leave thousands."""

TELLING = ("length_bias", "telling_opening")
"""Findings of `check` about superficial features that tell chosen from rejected."""


def train(run: Run) -> None:
    """Train; after a guard has rolled back, again from the last checkpoint."""
    _require_sharing(run.recipe)
    with ranks.first_ahead():
        require_openable(run)
        prepared = run.checked_data()
    while True:
        with suppress(RolledBack):
            return _train(run.recipe, prepared)
        free_memory()


def _train(recipe: RecipeBase, prepared: Prepared) -> None:
    algorithm, folder = recipe.algorithm, recipe.run_folder
    model, dtype = policy_of(recipe), choose_dtype(recipe.model.dtype, choose_device())
    trainable, total = trainable_parameters(model)
    say(f"  {trainable:,} of {total:,} parameters are trained ({trainable / total:.2%})")
    scorer = scorer_of(recipe, model, prepared.train, dtype)
    if scorer.sharded and not scorer.packed:
        raise StageError(f"`train.fsdp` needs a model whose trees can be packed; here: {scorer.reason}")
    checkpoint = _last_checkpoint(recipe)
    done, order = step_of(checkpoint), order_of(recipe, len(prepared.train))
    reference = None
    if algorithm.needs_reference and not algorithm.draws:
        reference = Reference(scorer, prepared.train.trees, cache_folder(), dtype)
    stored = None if algorithm.draws else _tree_set(recipe, prepared.train, reference)
    held_out = None
    if stored and recipe.train.eval_steps:
        of_held_out = reference and reference.of_others(prepared.held_out.trees)
        held_out = _tree_set(recipe, prepared.held_out, of_held_out)
    if reference and not can_be_reference(model):
        _compute_now(reference, [order[step] for step in range(done, len(order))], held_out)
    free_memory()  # of the self-check and the reference
    with (
        _served(recipe, scorer, prepared.train) as served,
        _callbacks(recipe, reference) as callbacks,
        progress_bar("train", len(order), done) as advance,
    ):
        record = StepRecord(folder, done, advance)
        loop = TrainingLoop(
            algorithm,
            scorer,
            StoredTrees(stored, order)
            if stored
            else _sampled_trees(recipe, scorer, prepared.train, order, record, served, dtype),
            order,
            record,
            _guards(recipe, record, done, order, prepared, dtype),
            training_arguments(recipe, len(order)),
            held_out,
            recipe.train.early_stopping_patience,
            callbacks,
        )
        if checkpoint:
            say(f"  going on after step {done}")
        loop.train(checkpoint)
    if recipe.model.load_in_4bit or recipe.model.load_in_8bit:
        _keep_logits(recipe, model, compared_rows(recipe, prepared.train), dtype)
    target = folder / ("trained" if recipe.lora == "none" else "adapter")
    with new_folder(target) if ranks.is_first() else nullcontext(target) as aside:
        save_weights(model, aside)
        if recipe.model.chat_template and ranks.is_first():
            tokenizer_of(recipe.model).save_pretrained(aside)
    del loop, model, scorer, reference, stored, held_out, served
    free_memory()


def _keep_logits(recipe: RecipeBase, model: Any, rows: Sequence[Sequence[int]], dtype: torch.dtype) -> None:
    """Save the logits that the merged model, made of the unquantised base, will be compared with."""
    with torch.autocast(choose_device().type, dtype, enabled=dtype != torch.float32):
        logits = logits_of(model, rows)
    if not ranks.is_first():
        return
    with new_file(recipe.run_folder / TRAINED_LOGITS) as aside:
        save_file({"logits": logits}, aside)


def _tree_set(recipe: RecipeBase, examples: Examples, reference: Reference | None) -> TreeSet:
    """The trees with their reference and the record fields that the algorithm reads."""
    extras: dict[str, Any] = {
        name: torch.tensor([getattr(record, name) for record in examples.records])[:, None]
        for name in recipe.algorithm.record_fields
    }
    return TreeSet(examples.trees, reference, extras)


def _compute_now(reference: Reference, steps: Sequence[Sequence[int]], held_out: TreeSet | None) -> None:
    """Compute all reference log-probs that are still missing, while the weights are still the reference's."""
    measured = range(len(held_out.trees)) if held_out else ()
    with progress_bar("reference", sum(map(len, steps)) + len(measured)) as advance:
        for indices in steps:
            reference.of(indices)
            advance(advance=len(indices))
        if held_out:
            held_out.drawn(measured)
            advance(advance=len(measured))
    reference.keep()


class _Keeping(TrainerCallback):
    """Writes the reference's log-probs to the cache at the end of training, and with checkpoints now and then."""

    def __init__(self, reference: Reference):
        self.reference, self.kept = reference, time.monotonic()

    def on_save(self, *args: Any, **news: Any) -> None:
        if time.monotonic() - self.kept > BETWEEN_WRITES:
            self.on_train_end()

    def on_train_end(self, *args: Any, **news: Any) -> None:
        self.reference.keep()
        self.kept = time.monotonic()


def _sampled_trees(
    recipe: RecipeBase,
    scorer: Scorer,
    prompts: Examples,
    order: StepOrder,
    record: StepRecord,
    served: ServedCompletions | None,
    dtype: torch.dtype,
) -> SampledTrees:
    assert recipe.algorithm.draws is not None
    scorer.temperature = recipe.algorithm.draws.temperature
    columns = column_names(prompts_of(prompts))
    rewards, tokenizer, seed = loaded_rewards(recipe, columns), tokenizer_of(recipe.model), recipe.train.seed
    show = [record.rollout, *([send_completions] if "wandb" in recipe.train.report_to else [])]
    return SampledTrees(
        recipe.algorithm, scorer, prompts, rewards, columns, tokenizer, order, show, seed, dtype, served
    )


@contextmanager
def _served(recipe: RecipeBase, scorer: Scorer, prompts: Examples) -> Iterator[ServedCompletions | None]:
    """Completions sampled by vLLM servers, if the recipe names any."""
    section, draws = recipe.generation, recipe.algorithm.draws
    if draws is None or not section.by_servers:
        yield None
        return
    tokenizer = tokenizer_of(recipe.model)
    longest = max(prompt for prompt, *_ in prompts.lengths) + draws.max_completion_length
    servers, folder = Servers(section, tokenizer), served_folder(recipe)
    servers.require_length(longest)
    served = ServedCompletions(servers, scorer, tokenizer, sampling_of(draws), folder, recipe.run_folder.name)
    settings = {name: getattr(recipe.algorithm, name) for name in recipe.algorithm.for_servers}
    weighed = ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
    number = counted(len(section.urls), "vLLM server")
    say(f"  completions by {number}; losses are weighed by policy over server: {weighed}")
    with served:
        yield served


@contextmanager
def _callbacks(recipe: RecipeBase, reference: Reference | None) -> Iterator[list[TrainerCallback]]:
    """Callbacks of the first process: trackers, saving the reference, pushing checkpoints."""
    if not ranks.is_first():
        yield []
        return
    keeping = [_Keeping(reference)] if reference else []
    pushes = [Pushes(partial(push_checkpoint, recipe))] if recipe.publish and recipe.publish.checkpoints else []
    with trackers(recipe.train, recipe.run_folder) as callbacks:
        yield [*callbacks, *keeping, *pushes]


def _guards(
    recipe: RecipeBase, record: StepRecord, done: int, order: StepOrder, prepared: Prepared, dtype: torch.dtype
) -> Guards:
    settings, origins = recipe.train, prepared.train.origins
    telling = [finding.message for finding in prepared.report.findings if finding.kind in TELLING]
    facts = Facts(len(order), settings.learning_rate, settings.batch_size, telling, dtype == torch.float16)
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
    """Raises UserError if the recipe does not go with the number of processes."""
    if ranks.processes() > 1:
        say(f"  {ranks.processes()} processes, each with a share of every step")
        if recipe.model.device_map:
            what = "places one model on several devices, and here each process has its own"
            raise UserError(what, where="`model.device_map`", advice="remove it, or start one process")
    if not recipe.train.fsdp:
        return
    here = sorted(set(ranks.gather(launched_here())))
    if recipe.train.fsdp == "hybrid" and len(here) > 1:
        what = f"needs as many processes on each machine, and there are {' and '.join(map(str, here))}"
        raise UserError(what, where="`train.fsdp: hybrid`", advice="set `train.fsdp: true`, or start as many on each")
    if (parts := shards(recipe.train.fsdp)) == 1:
        what = "shards weights over processes, and there is one on this machine"
        raise UserError(what, where="`train.fsdp`", advice="start several, e.g. `prefold run RECIPE --nproc 2`")
    say(f"  every weight is divided over {parts} processes")
