"""prefold's side against TRL: what `prefold train` does, on the same tokens in the same order."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import prefold
from benchmarks.results import quieten
from benchmarks.sides import Turns
from benchmarks.workloads import Workload, lora_settings
from prefold.files import read_jsonl
from prefold.generation.engine import sample
from prefold.generation.sampling import Completion, Sampling
from prefold.models.adapters import add_lora
from prefold.models.load import load_model
from prefold.recipe import Lora, RecipeBase, make_recipe
from prefold.training import sampled_trees
from prefold.training.arguments import training_arguments
from prefold.training.guards import Facts, Guards
from prefold.training.loop import StepOrder, StepTrees, TrainingLoop, TreeSet
from prefold.training.record import StepRecord
from prefold.trees.attention import unwrapped
from prefold.trees.memory import arrange_allocations, auto_max_tokens
from prefold.trees.reference import compute_reference
from prefold.trees.scorer import choose_scorer


def grpo(connection: Connection, workload: Workload) -> None:
    """`prefold train`, with its sampling timed."""
    turns = Turns(connection)

    def timed(policy: Any, tokenizer: Any, prompts: Any, sampling: Sampling, seeds: Any) -> list[list[Completion]]:
        with turns.rollouts:
            sampling = sampling if workload.natural_stops else replace(sampling, end_tokens=())
            return sample(policy, tokenizer, prompts, sampling, seeds)

    quieten()
    with tempfile.TemporaryDirectory() as folder, patch.object(sampled_trees, "sample", timed):
        turns.start()
        run = prefold.train(make_recipe(workload.recipe(Path(folder))))
        turns.end(read_jsonl(run / "metrics.jsonl"))


def policy_of(recipe: RecipeBase) -> Any:
    return add_lora(load_model(recipe.model), Lora(**lora_settings()), seed=0)


def pairs(connection: Connection, workload: Workload) -> None:
    """On pairs that are tokens already; the reference of a step's pairs is computed inside the timed step."""

    class GivenOrder(StepOrder):
        def _epoch(self, epoch: int) -> list[int]:
            return list(range(self.trees))

    quieten()
    turns, trees = Turns(connection), workload.order
    with tempfile.TemporaryDirectory() as folder:
        recipe = make_recipe(workload.recipe(Path(folder)))
        arrange_allocations(kept=not workload.gradient_checkpointing)
        model = policy_of(recipe)
        budget = auto_max_tokens(unwrapped(model), workload.gradient_checkpointing)
        scorer = choose_scorer(model, trees[:2], budget, recipe.model.attn_implementation)
        order = GivenOrder(len(trees), workload.batch, len(trees), seed=0)
        record = StepRecord(Path(folder), 0, lambda *shown, **named: None)
        arguments = training_arguments(recipe, workload.steps + 1)
        guards = Guards({}, Facts(len(order), recipe.train.learning_rate, workload.batch), record, 0, str, int)

        def with_reference(step: int) -> StepTrees:
            step_trees = [trees[i] for i in order[step]]
            needs, dtype = recipe.algorithm.needs_reference, getattr(torch, workload.dtype)
            reference = compute_reference(scorer, step_trees, dtype) if needs else None
            return StepTrees(TreeSet(step_trees, reference), range(len(step_trees)))

        loop = TrainingLoop(recipe.algorithm, scorer, with_reference, order, record, guards, arguments)
        turns.start()
        loop.train()
        turns.end(record.history)
