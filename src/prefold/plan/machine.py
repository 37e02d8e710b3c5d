"""The machine of a run: its device and the memory at hand."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from prefold.device import choose_device
from prefold.errors import UserError
from prefold.launch import launched_here
from prefold.memory import available, held, left_by_ulimit
from prefold.trees.memory import free_memory

CUDA_BYTES = 750 * 2**20
"""GPU memory that CUDA and its libraries take before the first tensor; not verified on this version."""
UNITS = {"GB": 10**9, "G": 10**9, "GIB": 2**30, "MB": 10**6, "M": 10**6, "MIB": 2**20}


@dataclass(frozen=True)
class Machine:
    """`device` is `cpu`, `cuda` or `mps`, `memory` the bytes at hand, `process` those in use before a model is loaded.
    `counts_mapped`: the limit on memory, a ulimit, counts mapped files too."""

    device: str
    memory: int
    process: int
    counts_mapped: bool = False

    @staticmethod
    def planned(device_memory: int | None) -> Machine:
        """A machine with a GPU of `device_memory` bytes; unset: this machine."""
        if device_memory:
            return Machine("cuda", device_memory, CUDA_BYTES)
        return Machine.here(choose_device().type)

    @staticmethod
    def here(device: str) -> Machine:
        """This machine, computing on `device`."""
        if device == "cuda":
            free, _ = torch.cuda.mem_get_info()
            return Machine(device, free + torch.cuda.memory_reserved(), 0)
        free_memory()
        # Interpreter, libraries, tokenizer.
        process = held() or 0
        if device == "mps":
            return Machine(device, int(torch.mps.recommended_max_memory()), process)
        limit, free = left_by_ulimit(), available()
        # Processes of one machine share what it has. What is left changes a little from one reading to the next.
        memory, bound_by_ulimit = free // launched_here() + process, limit is not None and limit - free < 2**24
        return Machine(device, memory, process, bound_by_ulimit)

    def evaluation_dtype(self, computed: torch.dtype) -> torch.dtype:
        """The dtype in which a model that is trained in `computed` is evaluated."""
        return torch.float32 if self.device == "cpu" else computed


def bytes_of(text: str) -> int:
    """An amount of memory, such as `24GB` or `79.6GiB`, in bytes. Raises UserError: `text` is no positive amount."""
    number, what = text.strip().upper().rstrip("GIMB"), f"`{text}` is no amount of memory"
    with suppress(ValueError, KeyError, OverflowError):
        size = int(float(number) * UNITS[text.strip().upper()[len(number) :]])
        if size > 0:
            return size
        what = f"`{text}` is no memory at all"
    raise UserError(what, where="`--device-memory`", expected="e.g. 24GB or 80GiB")


def free_disk(folder: Path) -> int:
    """Bytes that are free where a folder is, or would be."""
    folder = folder.absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
