"""Optimizer and schedule, as transformers' Trainer makes them, with explained errors."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler

from prefold.errors import UserError, first_line

WITHOUT_SETTINGS = (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP)

logger = logging.getLogger("prefold")


def optimizer_and_schedule(trainer: Trainer, steps: int) -> tuple[Any, Any]:
    """The optimizer, prepared by accelerate, and its learning-rate schedule.

    Raises:
        UserError: the optimizer is not available here, or the schedule needs other settings.
    """
    args = trainer.args
    name = str(getattr(args.optim, "value", args.optim))
    if "paged" in name and args.device.type == "cpu":
        # All optimizers of bitsandbytes run on a CPU too.
        logger.warning("`train.optim: %s` keeps its states in RAM like any other on a CPU: nothing is paged", name)
        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU", UserWarning)
    with _explained_optimizer(name):
        optimizer = trainer.accelerator.prepare_optimizer(trainer.create_optimizer())
    with _explained_schedule():
        return optimizer, trainer.create_scheduler(steps, optimizer)


def require_optimizer(args: TrainingArguments) -> None:
    """Take a step of the optimizer on a parameter of its own, and set its schedule up. Raises UserError as above."""
    with _explained_optimizer(str(getattr(args.optim, "value", args.optim))):
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        weight = nn.Parameter(torch.ones(8, 8, device=args.device))
        weight.grad = torch.ones_like(weight)
        optimizer = kind([weight], **settings)
        optimizer.step()
    schedule, given = SchedulerType(args.lr_scheduler_type), cast("dict[str, Any]", args.lr_scheduler_kwargs)
    if given and schedule in WITHOUT_SETTINGS:
        what = f"would be ignored: `{schedule.value}` has no settings"
        raise UserError(what, where="`train.lr_scheduler_kwargs`", advice="remove them, or take another schedule")
    with _explained_schedule():
        get_scheduler(schedule, optimizer, args.get_warmup_steps(args.max_steps), args.max_steps, given)


@contextmanager
def _explained_optimizer(name: str) -> Iterator[None]:
    try:
        yield
    except (ImportError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"`{name}` is not available here: {first_line(error)}",
            where="`train.optim`",
            advice="install what it needs, or take `adamw_torch`, or one of bitsandbytes such as `adamw_bnb_8bit`",
        ) from None


@contextmanager
def _explained_schedule() -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UserError(
            f"cannot be set up: {error}",
            where="`train.lr_scheduler_type`",
            advice="give its settings in `train.lr_scheduler_kwargs`",
        ) from None
