"""What a run has: the device, and the memory at hand."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from prefold.errors import UserError
from prefold.models.device import choose_device
from prefold.trees.memory import free_memory

CUDA_BYTES = 750 * 2**20
"""What CUDA and its libraries take of a GPU before the first tensor; not verified on this version."""
UNITS = {"GB": 10**9, "G": 10**9, "GIB": 2**30, "MB": 10**6, "M": 10**6, "MIB": 2**20}


@dataclass(frozen=True)
class Machine:
    """`device` is `cpu`, `cuda` or `mps`, `memory` the bytes at hand, `process` those that are taken before a model is
    loaded."""

    device: str
    memory: int
    process: int

    @staticmethod
    def planned(device_memory: int | None) -> Machine:
        """A machine with a GPU of so many bytes; unset: this one."""
        if device_memory:
            return Machine("cuda", device_memory, CUDA_BYTES)
        return Machine.here(choose_device().type)

    @staticmethod
    def here(device: str) -> Machine:
        """This machine, with that device."""
        if device == "cuda":
            free, _ = torch.cuda.mem_get_info()
            return Machine(device, free + torch.cuda.memory_reserved(), 0)
        free_memory()
        # Interpreter, libraries, tokenizer.
        process: int = psutil.Process().memory_info().rss
        if device == "mps":
            return Machine(device, int(torch.mps.recommended_max_memory()), process)
        return Machine(device, _available_bytes() + process, process)

    def evaluation_dtype(self, computed: torch.dtype) -> torch.dtype:
        """In which a model that is trained in `computed` is evaluated."""
        return torch.float32 if self.device == "cpu" else computed


def _available_bytes() -> int:
    """RAM that can be had without swapping, within the limit of the control group."""
    available: int = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        kinds = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        # Cached files are given up when memory runs short.
        return min(available, max(limit - used + int(kinds["file"]), 0))
    except (OSError, ValueError, KeyError):  # there is none, or it says "max"
        return available


def bytes_of(text: str) -> int:
    """`24GB`, `79.6GiB` in bytes. Raises UserError for what is no amount of memory."""
    number = text.strip().upper().rstrip("GIMB")
    try:
        size = int(float(number) * UNITS[text.strip().upper()[len(number) :]])
    except (ValueError, KeyError, OverflowError):
        size = None
    if size is None or size <= 0:
        what = f"`{text}` is no {'amount of memory' if size is None else 'memory at all'}"
        raise UserError(what, where="`--device-memory`", expected="e.g. 24GB or 80GiB")
    return size


def free_disk(folder: Path) -> int:
    """Bytes that are free where a folder is, or would be."""
    folder = folder.absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
