"""What a run was computed with."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from prefold.device import choose_device

PACKAGES = (
    *("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "bitsandbytes"),
    "lm_eval",
)


def environment() -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    device = choose_device()
    processor = torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()
    return {
        "prefold": version("prefold"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device.type,
        "device_name": torch.cuda.get_device_name() if device.type == "cuda" else str(processor),
        "cpu_threads": torch.get_num_threads(),
        "packages": versions,
    }
