"""Optimizer and schedule by transformers' own functions, with the groups of weights that its Trainer makes."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from prefold.errors import UserError

NOT_DECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Patterns of names of weights without weight decay: those of `Trainer.get_decay_parameter_names`."""


def make_optimizer(model: Any, args: TrainingArguments) -> torch.optim.Optimizer:
    """An optimizer of the weights that are trained."""
    decayed = set(get_parameter_names(model, [nn.LayerNorm], NOT_DECAYED))
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    groups: Any = [
        {"params": [weight for name, weight in trained if name in decayed], "weight_decay": args.weight_decay},
        {"params": [weight for name, weight in trained if name not in decayed], "weight_decay": 0.0},
    ]
    if len({mesh_of(weight) for _, weight in trained}) > 1:
        # Fused kernels cannot span sharded weights and whole ones.
        groups = [{**group, "params": weights} for group in groups for weights in by_mesh(group["params"])]
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
    for name in ("params", "model", "optimizer_dict"):  # of GaLore, LOMO and the like
        groups = settings.pop(name, groups)
    optimizer: torch.optim.Optimizer = kind(groups, **settings)
    if "bitsandbytes" in str(kind) and settings.get("optim_bits") == 8:
        from bitsandbytes.optim import GlobalOptimManager

        for module in model.modules():
            if isinstance(module, nn.Embedding):
                GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer


def mesh_of(weight: torch.Tensor) -> Any:
    return weight.device_mesh if isinstance(weight, DTensor) else None


def by_mesh(weights: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    groups = defaultdict(list)
    for weight in weights:
        groups[mesh_of(weight)].append(weight)
    return list(groups.values())


def make_schedule(optimizer: Any, args: TrainingArguments, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """
    Raises:
        UserError: the schedule wants other `lr_scheduler_kwargs`.
    """
    try:
        schedule: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except (TypeError, ValueError) as error:
        raise UserError(
            f"cannot be set up: {error}",
            where="`train.lr_scheduler_type`",
            advice="give its settings in `train.lr_scheduler_kwargs`",
        ) from None
    return schedule
