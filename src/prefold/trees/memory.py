"""Memory: the token budget of a micro-batch, what the allocator keeps between steps, and errors of allocation."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CPU_TOKENS = 1024
"""Tokens of the fastest rows on a CPU: few enough for its caches, enough for its matrix products."""
LEAST, MOST = 1024, 32768
"""Bounds of the budget that is derived for an accelerator."""
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "_ALLOC_FAILED", "out of resource")
"""Parts of error messages: of the host (the first two), an accelerator, CUDA's libraries, a Triton kernel."""

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4
_kept = False
"""The last argument of `arrange_allocations`."""


def arrange_allocations(kept: bool) -> None:
    """Have glibc keep large blocks that are freed, or return each to the system.

    Training on a CPU allocates the same large tensors at every step. Kept blocks are reused at once, but blocks of
    other sizes fragment them, and the process comes to hold several times what is in use. If blocks are returned, it
    holds what is in use, and each new page costs a page fault: up to a fifth of the time. Other C libraries and systems
    are left as they are.
    """
    global _kept
    _kept = kept
    if mallopt := _of_glibc("mallopt"):
        mallopt(M_MMAP_MAX, 0 if kept else 2**16)
        mallopt(M_MMAP_THRESHOLD, 2**20)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1 if kept else 2**20)
        mallopt(M_TOP_PAD, 2**28 if kept else 2**20)


@contextmanager
def returning_allocations() -> Iterator[None]:
    """While open, blocks that are freed go back to the system, whatever `arrange_allocations` has set. For code that
    makes large tensors of many sizes and keeps a small part of each, such as loading in 4 bits: what remains would
    fragment kept blocks, no later one would fit, and the process would hold several times what is in use."""
    kept = _kept
    if kept:
        free_memory()
        arrange_allocations(kept=False)
    try:
        yield
    finally:
        if kept:
            arrange_allocations(kept=True)


def auto_max_tokens(model: PreTrainedModel, gradient_checkpointing: bool) -> int:
    """The token budget for a model on its devices, by their total memory, so that it is the same in every run."""
    if model.device.type != "cuda":
        return CPU_TOKENS
    from torch.distributed.tensor import DTensor

    own = (weight.to_local() if isinstance(weight, DTensor) else weight for weight in model.parameters())
    weights = sum(weight.numel() * weight.element_size() for weight in own)
    total = sum(torch.cuda.get_device_properties(device).total_memory for device in gpus_of(model))
    return budget_for(model.config, weights, total, gradient_checkpointing)


def gpus_of(model: torch.nn.Module) -> set[torch.device]:
    """The GPUs that hold a model's weights."""
    return {weight.device for weight in model.parameters() if weight.device.type == "cuda"}


def free_on(device: torch.device) -> int:
    """Bytes of a GPU that can be allocated: those free, and those that torch's allocator holds of freed tensors."""
    unreserved, _ = torch.cuda.mem_get_info(device)
    return unreserved + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def budget_for(config: Any, weights: int, total: int, gradient_checkpointing: bool) -> int:
    """The token budget on an accelerator of `total` bytes for a model whose weights take `weights`.

    Half of what the weights leave is divided by the activations of a token. This is an estimate: a budget that turns
    out too large is halved on the way.
    """
    tokens = int(0.5 * (total - weights) / token_bytes(config, gradient_checkpointing))
    return max(LEAST, min(MOST, tokens // 256 * 256))


def token_bytes(config: Any, gradient_checkpointing: bool) -> int:
    """Bytes of a token's activations in half precision, roughly, for any decoder. With checkpointing, a layer keeps its
    part of the residual stream alone, which is float32 in training."""
    config = config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    layer = (14 * config.hidden_size + 6 * inner) * 2
    kept = config.hidden_size * 4 * config.num_hidden_layers
    return int(kept + layer if gradient_checkpointing else layer * config.num_hidden_layers)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on an accelerator or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    of_a_device = isinstance(error, RuntimeError) or type(error).__name__ == "OutOfResources"  # Triton's
    return of_a_device and any(words in str(error) for words in OUT_OF_MEMORY)


def free_memory() -> None:
    """Collect garbage, and return what allocators keep of freed memory, on the host and on accelerators."""
    gc.collect()
    if malloc_trim := _of_glibc("malloc_trim"):
        malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def _of_glibc(name: str) -> Any:
    """A function of glibc; None with another C library."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
