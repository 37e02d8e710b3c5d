"""The recipe's `train` section as transformers' `TrainingArguments`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainingArguments

from prefold.device import choose_device, choose_dtype
from prefold.recipe import RecipeBase
from prefold.trees.attention import CHECKPOINTING


def training_arguments(recipe: RecipeBase, steps: int) -> TrainingArguments:
    """The arguments that optimizers, schedules and trackers read."""
    settings, device = recipe.train, choose_device()
    dtype = choose_dtype(recipe.model.dtype, device)
    checkpointing: dict[str, Any] = {CHECKPOINTING: settings.gradient_checkpointing}
    if settings.gradient_checkpointing:
        checkpointing[f"{CHECKPOINTING}_kwargs"] = {"use_reentrant": False}
    arguments = TrainingArguments(
        output_dir=str(recipe.run_folder / "checkpoints"),
        run_name=settings.run_name or recipe.run_folder.resolve().name,
        report_to="none",  # see `trackers`
        project=settings.project,
        use_cpu=device.type == "cpu",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        seed=settings.seed,
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        lr_scheduler_kwargs=dict(settings.lr_scheduler_kwargs),
        warmup_steps=settings.warmup_steps,
        optim=settings.optim,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_epsilon=settings.adam_epsilon,
        max_grad_norm=settings.max_grad_norm,
        eval_strategy="steps" if settings.eval_steps else "no",
        eval_steps=settings.eval_steps,
        metric_for_best_model=settings.metric_for_best_model or ("loss" if settings.load_best_model_at_end else None),
        greater_is_better=settings.greater_is_better,
        save_strategy="steps",
        save_only_model=True,  # the loop writes checkpoints, not the Trainer
        save_steps=settings.save_steps,
        save_total_limit=settings.save_total_limit,
        logging_steps=1,
        **checkpointing,
    )
    # Set afterwards, as it requires a checkpoint at each evaluation; the loop writes one at the best evaluations.
    arguments.load_best_model_at_end = settings.load_best_model_at_end
    return arguments
