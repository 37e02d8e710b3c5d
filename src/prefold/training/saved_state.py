"""The state of training as files: weights, optimizer, schedule, gradient scaler, random generators.

Trained weights that are sharded (FSDP2) are whole on disk, like those of any other run, so a run may resume with
another number of processes. Frozen weights that are sharded are in no checkpoint.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.trainer_pt_utils import safe_globals

from prefold import ranks
from prefold.models.messages import quiet

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def has_shards(model: nn.Module) -> bool:
    """Whether this process trains only a part of some weights."""
    return any(isinstance(weight, DTensor) and weight.requires_grad for weight in model.parameters())


def reshard(model: nn.Module) -> None:
    """Free the other processes' parts of sharded weights: the last layers stay whole after a pass without gradients.

    All processes must do this before one of them reads the weights by itself.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


# ---- weights ----------------------------------------------------------------------------------------------------


def save_weights(model: Any, folder: Path) -> None:
    """Save a model's or an adapter's weights and configuration, as safetensors. The first process writes; with sharded
    weights, all of them take part."""
    reshard(model)
    if not (ranks.is_first() or has_shards(model)):
        return
    settings: dict[str, Any] = {}
    if isinstance(model, PeftModel):
        # peft would fetch sharded weights to save whole ones, add the whole embeddings where the vocabulary has grown,
        # and ask the hub whether it has.
        whole = {name: weight for name, weight in model.state_dict().items() if not isinstance(weight, DTensor)}
        settings = {"save_embedding_layers": False, "state_dict": whole}
    with quiet():
        model.save_pretrained(folder, is_main_process=ranks.is_first(), **settings)


def load_weights(model: Any, folder: Path) -> None:
    """Load what `save_weights` left in a folder; of sharded weights each process takes its part."""
    if isinstance(model, PeftModel) and not has_shards(model):
        model.load_adapter(str(folder), model.active_adapter, is_trainable=True)
        return
    weights: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
    # Not strict: of tied weights the folder holds one.
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=False))


# ---- the rest ---------------------------------------------------------------------------------------------------


def save_states(folder: Path, model: nn.Module, optimizer: Any, schedule: Any, scaler: Any) -> None:
    """Save everything but the weights. The first process writes; with sharded weights, all of them take part."""
    if has_shards(model):
        optimizer_state = get_optimizer_state_dict(model, optimizer.optimizer, options=WHOLE)
    else:
        optimizer_state = optimizer.state_dict()
    if not ranks.is_first():
        return
    torch.save(optimizer_state, folder / "optimizer.pt")
    torch.save(schedule.state_dict(), folder / "scheduler.pt")
    if scaler is not None:
        torch.save(scaler.state_dict(), folder / "scaler.pt")
    if ranks.processes() == 1:
        # No number of ours depends on it, but a user's reward may.
        cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
        cpu = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
        torch.save({**cpu, **cuda}, folder / "rng_state.pth")


def load_states(folder: Path, model: nn.Module, optimizer: Any, schedule: Any, scaler: Any) -> None:
    """Load what `save_states` left in a folder. Only tensors and plain values are read: a pickle may hold code."""
    optimizer_state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    if has_shards(model):
        set_optimizer_state_dict(model, optimizer.optimizer, optimizer_state, options=WHOLE)
    else:
        optimizer.load_state_dict(optimizer_state)
    schedule.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
    if scaler is not None and (folder / "scaler.pt").is_file():
        scaler.load_state_dict(torch.load(folder / "scaler.pt", map_location="cpu", weights_only=True))
    if ranks.processes() == 1 and (folder / "rng_state.pth").is_file():
        with safe_globals():
            states = torch.load(folder / "rng_state.pth", weights_only=True)
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])
