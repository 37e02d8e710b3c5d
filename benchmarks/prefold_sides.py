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
from prefold.generation.groups import sample
from prefold.generation.sampling import Completion, Sampling
from prefold.models.adapters import add_lora
from prefold.models.load import load_model
from prefold.recipe import Lora, make_recipe
from prefold.training import online
from prefold.training.arguments import training_arguments
from prefold.training.offline import PreferenceTrainer, StepOrder, TreeSet
from prefold.training.record import StepRecord
from prefold.trees.memory import arrange_allocations, auto_max_tokens
from prefold.trees.reference import compute_reference
from prefold.trees.scorer import choose_scorer, unwrapped


def grpo(connection: Connection, workload: Workload) -> None:
    """`prefold train`, with its sampling timed."""
    turns = Turns(connection)

    def timed(policy: Any, tokenizer: Any, prompts: Any, sampling: Sampling, seeds: Any) -> list[list[Completion]]:
        with turns.rollouts:
            sampling = sampling if workload.natural_stops else replace(sampling, end_tokens=())
            return sample(policy, tokenizer, prompts, sampling, seeds)

    quieten()
    with tempfile.TemporaryDirectory() as folder, patch.object(online, "sample", timed):
        turns.start()
        run = prefold.train(make_recipe(workload.recipe(Path(folder))))
        turns.end(read_jsonl(run / "metrics.jsonl"))


def pairs(connection: Connection, workload: Workload) -> None:
    """On pairs that are tokens already; the reference of a step's pairs is computed inside the timed step."""

    class GivenOrder(StepOrder):
        def _epoch(self, epoch: int) -> list[int]:
            return list(range(self.trees))

    class WithReference(PreferenceTrainer):
        def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            if self.algorithm.needs_reference:
                step = [self.data.trees[i] for i in inputs]
                logprobs = compute_reference(self.scorer, step, getattr(torch, workload.dtype))
                by_index: Any = dict(zip(inputs, logprobs, strict=True))
                self.data = TreeSet(self.data.trees, by_index)
            return super().training_step(model, inputs, num_items_in_batch)

    quieten()
    turns, trees = Turns(connection), workload.order
    with tempfile.TemporaryDirectory() as folder:
        recipe = make_recipe(workload.recipe(Path(folder)))
        arrange_allocations(kept=not workload.gradient_checkpointing)
        model = add_lora(load_model(recipe.model), Lora(**lora_settings()), seed=0)
        scorer = choose_scorer(model, trees[:2], auto_max_tokens(unwrapped(model), workload.gradient_checkpointing))
        order = GivenOrder(len(trees), workload.batch, len(trees), seed=0)
        record = StepRecord(Path(folder), 0, lambda amount, text: None)
        arguments = training_arguments(recipe, workload.steps + 1)
        trainer = WithReference(recipe.algorithm, scorer, TreeSet(trees), order, record, arguments)
        turns.start()
        with scorer.in_place():
            trainer.train()
        turns.end(record.history)
