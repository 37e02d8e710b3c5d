"""What tells models apart: a digest of all that decides what they compute."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from prefold.trees.attention import unwrapped


def model_digest(
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    state: Callable[[nn.Module], object] = lambda module: "",
    salt: str = "",
) -> Any:
    """A digest, to which more may be added, of a model's configuration, tensors and the dtypes that it computes in.

    Args:
        tensors: with their names; of each its dtype, shape, kind of device and every byte counts, of a sharded one
            those of this process.
        state: what else counts of each module.
        salt: what else decides the numbers.
    """
    digest: Any = hashlib.sha256(f"{salt} torch={torch.__version__}".encode())
    settings = unwrapped(model).config.to_dict()
    config = {name: value for name, value in settings.items() if name != "_name_or_path"}
    digest.update(json.dumps(config, default=str, sort_keys=True).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.device.type}".encode())
        own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        digest.update(own.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for module in model.modules():
        digest.update(f"{getattr(module, 'compute_dtype', '')}{state(module)}".encode())
    return digest
