"""The device to compute on, and the dtype."""

from __future__ import annotations

import os

import torch


def choose_device() -> torch.device:
    """The device to compute on; of several GPUs, the one that the launcher gave this process."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(rank)) if (rank := os.environ.get("LOCAL_RANK")) else torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def is_half(dtype: torch.dtype | None) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


def choose_dtype(setting: str, device: torch.device) -> torch.dtype:
    """The dtype that a recipe's `auto` means on a device: what it computes in natively."""
    if setting != "auto":
        chosen: torch.dtype = getattr(torch, setting)
        return chosen
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32
    return torch.float32
