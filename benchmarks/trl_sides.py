"""TRL's side: its trainers with their defaults, but for what must be equal."""

from __future__ import annotations

import tempfile
from multiprocessing.connection import Connection
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from benchmarks.results import quieten
from benchmarks.sides import Turns
from benchmarks.workloads import LEARNING_RATE, TARGET_LENGTH, Workload, lora_settings


def dpo(connection: Connection, workload: Workload) -> None:
    """The reference is the model with its adapter off, in each step."""

    class TokenDPOTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
            return dataset

        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(workload.order)

    rows = [
        {"prompt_ids": list(t.prompt), "chosen_ids": list(t.completions[0]), "rejected_ids": list(t.completions[1])}
        for t in workload.order
    ]
    train(TokenDPOTrainer, DPOConfig, rows, workload, Turns(connection), {"max_length": None})


def orpo(connection: Connection, workload: Workload) -> None:
    """On pairs that are tokens already."""

    class TokenORPOTrainer(ORPOTrainer):
        def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
            """Labels are the completion's tokens; its trainer takes the prompt's from the attention mask."""
            tree = workload.order[feature["index"]]
            row: dict[str, Any] = {"prompt_input_ids": list(tree.prompt)}
            for side, ids in zip(("chosen", "rejected"), tree.completions, strict=True):
                row[f"{side}_input_ids"] = [*tree.prompt, *ids]
                row[f"{side}_attention_mask"] = [1] * (len(tree.prompt) + len(ids))
                row[f"{side}_labels"] = [-100] * len(tree.prompt) + list(ids)
            return row

        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(workload.order)

    rows = [{"index": i, "prompt": "", "chosen": "", "rejected": ""} for i in range(len(workload.order))]
    settings = {"max_length": 4096, "disable_dropout": True}
    train(TokenORPOTrainer, ORPOConfig, rows, workload, Turns(connection), settings)


def grpo(connection: Connection, workload: Workload) -> None:
    """Prompts that are tokens already, transformers' `generate` of all completions at once, then a backward pass for
    each prompt's completions.

    Neither side computes old log-probs, as each rollout serves one step; both compute the reference's in the step, and
    the entropy.
    """
    turns = Turns(connection)

    class TokenGRPOTrainer(GRPOTrainer):
        def _tokenize_prompts(self, prompts: list[str]) -> Any:
            return [list(workload.order[int(index)].prompt) for index in prompts], None, {}

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            with turns.rollouts:
                return super()._generate_single_turn(*args, **kwargs)

    group, longest = workload.settings["num_generations"], workload.settings["max_completion_length"]
    settings = {
        "shuffle_dataset": False,
        "per_device_train_batch_size": group,
        "gradient_accumulation_steps": workload.batch,
        **({} if workload.natural_stops else {"generation_kwargs": {"min_new_tokens": longest}}),
    }
    rows = [{"prompt": str(index)} for index in range(len(workload.order))]
    train(TokenGRPOTrainer, GRPOConfig, rows, workload, turns, settings, reward_funcs=closeness_to_target)


def closeness_to_target(completions: list[str], **columns: Any) -> list[float]:
    return [-float(abs(TARGET_LENGTH - len(text))) for text in completions]


def policy_of(workload: Workload) -> Any:
    model = AutoModelForCausalLM.from_pretrained(workload.model, dtype=torch.float32)
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora_settings()))


def train(
    trainer_class: Any,
    config_class: Any,
    rows: list[dict[str, Any]],
    workload: Workload,
    turns: Turns,
    settings: dict[str, Any],
    **more: Any,
) -> None:
    quieten()
    tokenizer = AutoTokenizer.from_pretrained(workload.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            policy_of(workload),
            args=config_class(**{**common_settings(folder, workload), **settings}),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            **more,
        )
        turns.start()
        trainer.train()
        turns.end([line for line in trainer.state.log_history if "loss" in line])


def common_settings(folder: str, workload: Workload) -> dict[str, Any]:
    """What must be equal on both sides; the rest is TRL's own."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": workload.batch,
        "max_steps": workload.steps + 1,
        "learning_rate": LEARNING_RATE,
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
