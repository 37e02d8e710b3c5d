"""Checkpoints of trained weights that are sharded (FSDP2): whole on disk, as those of any other run.

So a run may go on with another number of processes. Frozen weights that are sharded are in no checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def has_shards(model: nn.Module) -> bool:
    """Whether this process trains only a part of some weights."""
    return any(isinstance(weight, DTensor) and weight.requires_grad for weight in model.parameters())


def keep_own_parts(model: nn.Module) -> None:
    """Have this process hold its own parts and nothing else: the last layers stay whole after a pass without gradients.

    All processes must do this where one of them is to look at the weights by itself.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """By name, the weights that every process has whole; peft would fetch all others to save those."""
    return {name: weight for name, weight in model.state_dict().items() if not isinstance(weight, DTensor)}


def load_whole_weights(model: nn.Module, folder: Path) -> bool:
    """Give each process its part of the weights that lie in a folder. False, and nothing is done, where the model has
    no shards."""
    if not has_shards(model):
        return False
    weights: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
    # Not strict: of tied weights the folder holds one.
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=False))
    return True


STATES = StateDictOptions(full_state_dict=True, cpu_offload=True)


@contextmanager
def giving_whole_states(optimizer: Any, model: nn.Module) -> Iterator[None]:
    """While open, an optimizer of sharded weights gives whole states, by the names of the weights, in the first
    process. All of them must open this."""
    if not has_shards(model):
        yield
        return
    states = get_optimizer_state_dict(model, optimizer.optimizer, options=STATES)
    optimizer.state_dict = lambda: states
    try:
        yield
    finally:
        del optimizer.state_dict


@contextmanager
def taking_whole_states(optimizer: Any, model: nn.Module) -> Iterator[None]:
    """While open, an optimizer of sharded weights takes such states, each process its part."""
    if not has_shards(model):
        yield
        return
    inner = optimizer.optimizer
    optimizer.load_state_dict = lambda states: set_optimizer_state_dict(model, inner, states, options=STATES)
    try:
        yield
    finally:
        del optimizer.load_state_dict
