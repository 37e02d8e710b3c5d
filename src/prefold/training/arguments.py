"""The recipe's `train` section in transformers' words."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from prefold.errors import UserError
from prefold.models.device import choose_device, choose_dtype
from prefold.recipe import RecipeBase

logger = logging.getLogger("prefold")


def training_arguments(recipe: RecipeBase, steps: int) -> TrainingArguments:
    """Arguments for a Trainer whose dataloader items are whole optimizer steps."""
    settings, device = recipe.train, choose_device()
    dtype = choose_dtype(recipe.model.dtype, device)
    arguments = TrainingArguments(
        output_dir=str(recipe.run_folder / "checkpoints"),
        run_name=settings.run_name or recipe.run_folder.name,
        report_to="none",  # see `open_trackers`
        use_cpu=device.type == "cpu",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        seed=settings.seed,
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
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
        activation_checkpointing=settings.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        eval_strategy="steps" if settings.eval_steps else "no",
        eval_steps=settings.eval_steps,
        metric_for_best_model=settings.metric_for_best_model,
        greater_is_better=settings.greater_is_better,
        load_best_model_at_end=settings.load_best_model_at_end,
        restore_callback_states_from_checkpoint=settings.early_stopping_patience is not None,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=settings.save_total_limit,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        average_tokens_across_devices=False,
    )
    _require_optimizer(arguments, device)
    if arguments.n_gpu > 1:
        # Else the Trainer would wrap the model in DataParallel, which cuts a packed row in two.
        arguments._n_gpu = 1
    return arguments


def _require_optimizer(arguments: TrainingArguments, device: torch.device) -> None:
    """The optimizer can be made here; those of bitsandbytes all run on a CPU too, but nothing is paged there."""
    name = str(getattr(arguments.optim, "value", arguments.optim))
    layer: Any = nn.Linear(1, 1)
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments, layer)
    except (ImportError, ValueError, TypeError) as error:
        raise UserError(
            f"`{name}` cannot be had here: {str(error).splitlines()[0]}",
            where="`train.optim`",
            advice="install what it needs, or take `adamw_torch`, or one of bitsandbytes such as `adamw_bnb_8bit`",
        ) from None
    if "paged" in name and device.type == "cpu":
        logger.warning("`train.optim: %s` keeps its states in RAM like any other on a CPU: nothing is paged", name)
        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU", UserWarning)
