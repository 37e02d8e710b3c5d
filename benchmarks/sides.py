"""The two sides of a benchmark, each training in a process of its own, one step at a time when told."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prefold.trees.packing import TokenTree

if TYPE_CHECKING:
    from prefold.recipe import RecipeBase

BATCH = 4
"""Pairs per optimizer step."""
GROUP_BETA = 0.04
"""Weight of the KL divergence in GRPO."""


@dataclass(frozen=True)
class Workload:
    method: str
    model: Path
    dtype: str
    gradient_checkpointing: bool
    trees: list[TokenTree]
    lora_rank: int = 16
    batch: int = BATCH
    natural_stops: bool = False

    @property
    def steps(self) -> int:
        return len(self.trees) // self.batch

    @property
    def order(self) -> list[TokenTree]:
        """The trees of all steps; the first step comes twice, to warm up."""
        return self.trees[: self.batch] + self.trees

    @property
    def settings(self) -> dict[str, Any]:
        """Of the method, on both sides. The completions of a group's tree stand in for those that will be sampled."""
        if self.method != "grpo":
            return {"beta": 0.1}
        group = self.trees[0].completions
        return {"beta": GROUP_BETA, "num_generations": len(group), "max_completion_length": len(group[0])}


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
    rollout_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    mean_lengths: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    @staticmethod
    def start(context: SpawnContext, target: Target, workload: Workload) -> Side:
        here, there = context.Pipe()
        process = context.Process(target=target, args=(there, workload))
        with nullcontext() if target.__name__.startswith("prefold") else plain_environment():
            process.start()
        there.close()
        return Side(target.__name__, process, here)

    def await_ready(self) -> None:
        self.connection.recv()

    def take_step(self, counted: bool) -> None:
        self.connection.send("go")
        taken = self.connection.recv()
        self.peak_bytes = taken.peak_bytes
        if counted:
            self.seconds.append(round(taken.seconds, 4))
            self.losses.append(taken.loss)
            if taken.mean_length is not None:
                self.rollout_seconds.append(round(taken.rollout_seconds, 4))
                self.mean_lengths.append(taken.mean_length)

    @property
    def training_seconds(self) -> list[float]:
        """What is left of each step without its rollout."""
        return [whole - part for whole, part in zip(self.seconds, self.rollout_seconds, strict=True)]

    def finish(self) -> None:
        self.process.join()


class TakenStep(NamedTuple):
    """`mean_length` is that of the completions that were sampled, in tokens; None where none were."""

    seconds: float
    rollout_seconds: float
    loss: float
    mean_length: float | None
    peak_bytes: int


class Stopwatch:
    """Adds up the time that it runs."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *error: Any) -> None:
        synchronize()
        self.seconds += time.perf_counter() - self._started


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def turns(connection: Connection, rollouts: Stopwatch) -> Any:
    """A Trainer callback that waits for its turn before each step and reports the step."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def __init__(self) -> None:
            self.elapsed = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            connection.send("ready")

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            connection.recv()
            rollouts.seconds, self.started = 0.0, time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            synchronize()
            self.elapsed = time.perf_counter() - self.started

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                length = logs.get("completions/mean_length")
                connection.send(TakenStep(self.elapsed, rollouts.seconds, logs["loss"], length, peak_bytes()))

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
        "per_device_train_batch_size": workload.batch,
        "max_steps": workload.steps + 1,
        "learning_rate": 5e-5,
        **workload.settings,
        "bf16": workload.dtype == "bfloat16",
        "gradient_checkpointing": workload.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if workload.gradient_checkpointing else None,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def train_trl(
    kind: Any, config: Any, rows: list[dict[str, Any]], workload: Workload, callback: Any, **more: Any
) -> None:
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
        callbacks=[callback],
        **more,
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
        train_trl(TokenDPOTrainer, config, rows, workload, turns(connection, Stopwatch()))


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
        train_trl(TokenORPOTrainer, config, rows, workload, turns(connection, Stopwatch()))


def trl_grpo(connection: Connection, workload: Workload) -> None:
    """TRL with its defaults, but for what must be equal: prompts that are tokens already, transformers' `generate` of
    all completions at once, then a backward pass for each prompt's completions.

    Neither side computes old log-probs, as each rollout serves one step; both compute the reference's in the step, and
    the entropy.
    """
    quieten()
    from trl import GRPOConfig, GRPOTrainer

    rollouts = Stopwatch()

    class TokenGRPOTrainer(GRPOTrainer):
        def _tokenize_prompts(self, prompts: list[str]) -> Any:
            return [list(workload.order[int(place)].prompt) for place in prompts], None, {}

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            with rollouts:
                return super()._generate_single_turn(*args, **kwargs)

    group, longest = workload.settings["num_generations"], workload.settings["max_completion_length"]
    rows = [{"prompt": str(place)} for place in range(len(workload.order))]
    with tempfile.TemporaryDirectory() as folder:
        settings = trl_settings(folder, workload)
        settings |= {"per_device_train_batch_size": group, "gradient_accumulation_steps": workload.batch}
        settings |= {} if workload.natural_stops else {"generation_kwargs": {"min_new_tokens": longest}}
        config = GRPOConfig(shuffle_dataset=False, **settings)
        callback = turns(connection, rollouts)
        train_trl(TokenGRPOTrainer, config, rows, workload, callback, reward_funcs=closeness_to_target)


TARGET = 200


def closeness_to_target(completions: list[str], **columns: Any) -> list[float]:
    return [-float(abs(TARGET - len(text))) for text in completions]


def prefold_recipe(workload: Workload, folder: str) -> RecipeBase:
    from prefold.recipe import make_recipe

    rewards = {"rewards": [{"name": "length", "target": TARGET, "unit": "characters"}]}
    return make_recipe(
        {
            "method": workload.method,
            workload.method: workload.settings,
            "model": {"name": str(workload.model), "dtype": workload.dtype},
            "lora": lora_settings(workload.lora_rank),
            "data": {"train": [{"path": "unused"}]},
            **(rewards if workload.method == "grpo" else {}),
            "train": {
                "batch_size": workload.batch,
                "max_steps": workload.steps + 1,
                "learning_rate": 5e-5,
                "gradient_checkpointing": workload.gradient_checkpointing,
            },
            "output_dir": folder,
        }
    )


def prefold_setup(workload: Workload, folder: str) -> tuple[Any, ...]:
    """What every trainer of prefold's is given: the recipe, and scorer, order, record and arguments."""
    from prefold.models.load import add_lora, load_model
    from prefold.training.arguments import training_arguments
    from prefold.training.offline import StepOrder
    from prefold.training.record import StepRecord
    from prefold.trees.memory import auto_max_tokens, keep_allocations
    from prefold.trees.scorer import choose_scorer, unwrapped

    class GivenOrder(StepOrder):
        def _epoch(self, epoch: int) -> list[int]:
            return list(range(self.trees))

    keep_allocations()
    recipe, trees = prefold_recipe(workload, folder), workload.order
    model = add_lora(load_model(recipe.model), recipe.lora, seed=0)
    scorer = choose_scorer(model, trees[:2], auto_max_tokens(unwrapped(model), workload.gradient_checkpointing))
    order = GivenOrder(len(trees), workload.batch, len(trees), seed=0)
    record = StepRecord(Path(folder), 0, lambda amount, text: None)
    return recipe, scorer, order, record, training_arguments(recipe, workload.steps + 1)


def prefold_pairs(connection: Connection, workload: Workload) -> None:
    """prefold as `prefold train` sets it up; the reference of a step's pairs is computed inside the timed step."""
    quieten()
    import torch

    from prefold.training.offline import PreferenceTrainer, TreeSet
    from prefold.trees.reference import compute_reference

    class WithReference(PreferenceTrainer):
        def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            if self.algorithm.needs_reference:
                dtype = getattr(torch, workload.dtype)
                found = compute_reference(self.scorer, [self.data.trees[i] for i in inputs], dtype)
                by_place: Any = dict(zip(inputs, found, strict=True))
                self.data = TreeSet(self.data.trees, by_place)
            return super().training_step(model, inputs, num_items_in_batch)

    with tempfile.TemporaryDirectory() as folder:
        recipe, scorer, *rest = prefold_setup(workload, folder)
        trainer = WithReference(recipe.algorithm, scorer, TreeSet(workload.order), *rest)
        trainer.add_callback(turns(connection, Stopwatch()))
        with scorer.in_place():
            trainer.train()


def prefold_grpo(connection: Connection, workload: Workload) -> None:
    """prefold as `prefold train` sets it up, on prompts that are tokens already."""
    quieten()
    from prefold.data.examples import Example, Examples
    from prefold.data.preference import Message, Prompt, RowId
    from prefold.models.load import load_tokenizer
    from prefold.rewards.load import load_rewards
    from prefold.training import online

    rollouts, sampling_of = Stopwatch(), online.sampling_of

    class Timed(online.OnlineTrainer):
        def completions_of(self, *args: Any) -> Any:
            with rollouts:
                return super().completions_of(*args)

    if not workload.natural_stops:
        online.sampling_of = lambda algorithm: replace(sampling_of(algorithm), end_tokens=())
    examples = Examples.of(
        Example(Prompt((Message(role="user", content=str(place)),), {}, RowId("", place)), TokenTree(tree.prompt, ()))
        for place, tree in enumerate(workload.order)
    )
    with tempfile.TemporaryDirectory() as folder:
        recipe, scorer, *rest = prefold_setup(workload, folder)
        rewards = load_rewards(recipe.rewards, ["completions"])
        tokenizer = load_tokenizer(workload.model)
        trainer = Timed(recipe.algorithm, scorer, examples, rewards, [], tokenizer, *rest)
        trainer.add_callback(turns(connection, rollouts))
        with scorer.in_place():
            trainer.train()
