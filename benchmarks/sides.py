"""The two sides of a benchmark, each training in a process of its own, one step at a time when told."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from prefold.trees.packing import TokenTree

BATCH = 4
"""Pairs per optimizer step."""


@dataclass(frozen=True)
class Workload:
    method: str
    model: Path
    dtype: str
    gradient_checkpointing: bool
    trees: list[TokenTree]
    lora_rank: int = 16

    @property
    def steps(self) -> int:
        return len(self.trees) // BATCH

    @property
    def order(self) -> list[TokenTree]:
        """The trees of all steps; the first step comes twice, to warm up."""
        return self.trees[:BATCH] + self.trees


@contextmanager
def plain_environment() -> Iterator[None]:
    """Threads wait as OpenMP has them wait by default, which prefold changes when it is imported."""
    changed = os.environ.pop("OMP_WAIT_POLICY", None)
    os.environ["GOMP_SPINCOUNT"] = "300000"
    yield
    del os.environ["GOMP_SPINCOUNT"]
    if changed is not None:
        os.environ["OMP_WAIT_POLICY"] = changed


Target = Callable[[Connection, Workload], None]


@dataclass
class Side:
    """One process, and what was measured of it."""

    name: str
    process: BaseProcess
    connection: Connection
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    @staticmethod
    def start(context: SpawnContext, target: Target, workload: Workload) -> Side:
        here, there = context.Pipe()
        process = context.Process(target=target, args=(there, workload))
        with nullcontext() if target is prefold_side else plain_environment():
            process.start()
        there.close()
        return Side(target.__name__, process, here)

    def await_ready(self) -> None:
        self.connection.recv()

    def take_step(self, counted: bool) -> None:
        self.connection.send("go")
        seconds, loss, self.peak_bytes = self.connection.recv()
        if counted:
            self.seconds.append(round(seconds, 4))
            self.losses.append(loss)

    def finish(self) -> None:
        self.process.join()


def turns(connection: Connection) -> Any:
    """A Trainer callback that waits for its turn before each step and reports the step's time, loss and peak memory."""
    import torch
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def __init__(self) -> None:
            self.elapsed = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            connection.send("ready")

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            connection.recv()
            self.started = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.elapsed = time.perf_counter() - self.started

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                connection.send((self.elapsed, logs["loss"], peak_bytes()))

    return Turns()


def peak_bytes() -> int:
    """Largest memory so far: of the accelerator if there is one, else of the process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def lora_settings(rank: int) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "target_modules": "all-linear"}


def quieten() -> None:
    """Only the table is of interest here."""
    import warnings

    import transformers

    from prefold import terminal

    terminal.console.quiet = True
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def trl_settings(folder: str, workload: Workload) -> dict[str, Any]:
    """What must be equal on both sides; the rest is TRL's own."""
    import torch

    return {
        "output_dir": folder,
        "per_device_train_batch_size": BATCH,
        "max_steps": workload.steps + 1,
        "learning_rate": 5e-5,
        "beta": 0.1,
        "bf16": workload.dtype == "bfloat16",
        "gradient_checkpointing": workload.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if workload.gradient_checkpointing else None,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def train_trl(kind: Any, config: Any, rows: list[dict[str, Any]], workload: Workload, connection: Connection) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

    model = AutoModelForCausalLM.from_pretrained(workload.model, dtype=torch.float32)
    torch.manual_seed(0)
    trainer = kind(
        get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora_settings(workload.lora_rank))),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(workload.model),
        callbacks=[turns(connection)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def trl_dpo(connection: Connection, workload: Workload) -> None:
    """TRL with its defaults, but for what must be equal; the reference is the model with its adapter off, each step."""
    quieten()
    import torch
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class TokenDPOTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
            return dataset

        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    rows = [
        {"prompt_ids": list(t.prompt), "chosen_ids": list(t.completions[0]), "rejected_ids": list(t.completions[1])}
        for t in workload.order
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(max_length=None, **trl_settings(folder, workload))
        train_trl(TokenDPOTrainer, config, rows, workload, connection)


def trl_orpo(connection: Connection, workload: Workload) -> None:
    """TRL's ORPO trainer with its defaults, but for what must be equal, on pairs that are tokens already."""
    quieten()
    import torch
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    class TokenORPOTrainer(ORPOTrainer):
        def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
            """Labels are the completion's tokens; its trainer takes the prompt's from the attention mask."""
            tree = workload.order[feature["place"]]
            row: dict[str, Any] = {"prompt_input_ids": list(tree.prompt)}
            for side, ids in zip(("chosen", "rejected"), tree.completions, strict=True):
                row[f"{side}_input_ids"] = [*tree.prompt, *ids]
                row[f"{side}_attention_mask"] = [1] * (len(tree.prompt) + len(ids))
                row[f"{side}_labels"] = [-100] * len(tree.prompt) + list(ids)
            return row

        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    rows = [{"place": i, "prompt": "", "chosen": "", "rejected": ""} for i in range(len(workload.order))]
    with tempfile.TemporaryDirectory() as folder:
        config = ORPOConfig(max_length=4096, disable_dropout=True, **trl_settings(folder, workload))
        train_trl(TokenORPOTrainer, config, rows, workload, connection)


def prefold_side(connection: Connection, workload: Workload) -> None:
    """prefold as `prefold train` sets it up; the reference of a step's pairs is computed inside the timed step."""
    quieten()
    import torch

    from prefold.models.load import add_lora, load_model
    from prefold.recipe import make_recipe
    from prefold.trainers.arguments import training_arguments
    from prefold.trainers.offline import PreferenceTrainer, StepOrder, TreeSet
    from prefold.trainers.record import StepRecord
    from prefold.trees.memory import auto_max_tokens, keep_allocations
    from prefold.trees.reference import compute_reference
    from prefold.trees.scorer import choose_scorer, unwrapped

    class GivenOrder(StepOrder):
        def _epoch(self, epoch: int) -> list[int]:
            return list(range(self.trees))

    class WithReference(PreferenceTrainer):
        def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            if self.algorithm.needs_reference:
                dtype = getattr(torch, workload.dtype)
                found = compute_reference(self.scorer, [self.data.trees[i] for i in inputs], dtype)
                by_place: Any = dict(zip(inputs, found, strict=True))
                self.data = TreeSet(self.data.trees, by_place)
            return super().training_step(model, inputs, num_items_in_batch)

    keep_allocations()
    with tempfile.TemporaryDirectory() as folder:
        recipe = make_recipe(
            {
                "method": workload.method,
                workload.method: {"beta": 0.1},
                "model": {"name": str(workload.model), "dtype": workload.dtype},
                "lora": lora_settings(workload.lora_rank),
                "data": {"train": [{"path": "unused"}]},
                "train": {
                    "batch_size": BATCH,
                    "max_steps": workload.steps + 1,
                    "learning_rate": 5e-5,
                    "gradient_checkpointing": workload.gradient_checkpointing,
                },
                "output_dir": folder,
            }
        )
        model = add_lora(load_model(recipe.model), recipe.lora, seed=0)
        trees = workload.order
        scorer = choose_scorer(model, trees[:2], auto_max_tokens(unwrapped(model), workload.gradient_checkpointing))
        record = StepRecord(Path(folder), 0, lambda amount, text: None)
        order = GivenOrder(len(trees), BATCH, len(trees), seed=0)
        args = training_arguments(recipe, workload.steps + 1)
        trainer = WithReference(recipe.algorithm, scorer, TreeSet(trees), order, record, args)
        trainer.add_callback(turns(connection))
        with scorer.in_place():
            trainer.train()
