"""Optimizer and schedule, as transformers' Trainer makes them, with what cannot be had explained."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from transformers import Trainer

from prefold.errors import UserError, first_line

logger = logging.getLogger("prefold")


def optimizer_and_schedule(trainer: Trainer, steps: int) -> tuple[Any, Any]:
    """
    Raises:
        UserError: the optimizer cannot be had here, or the schedule wants other settings.
    """
    args = trainer.args
    name = str(getattr(args.optim, "value", args.optim))
    if "paged" in name and args.device.type == "cpu":
        # Those of bitsandbytes all run on a CPU too.
        logger.warning("`train.optim: %s` keeps its states in RAM like any other on a CPU: nothing is paged", name)
        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU", UserWarning)
    try:
        optimizer = trainer.accelerator.prepare_optimizer(trainer.create_optimizer())
    except (ImportError, ValueError, TypeError) as error:
        raise UserError(
            f"`{name}` cannot be had here: {first_line(error)}",
            where="`train.optim`",
            advice="install what it needs, or take `adamw_torch`, or one of bitsandbytes such as `adamw_bnb_8bit`",
        ) from None
    try:
        return optimizer, trainer.create_scheduler(steps, optimizer)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"cannot be set up: {error}",
            where="`train.lr_scheduler_type`",
            advice="give its settings in `train.lr_scheduler_kwargs`",
        ) from None
