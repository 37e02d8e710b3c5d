"""What losses read beside log-probs, on a device without float64."""

from __future__ import annotations

import torch
from emulated_devices import emulated

from prefold.training.loop import on


def test_advantages_reach_mps() -> None:
    with emulated():
        mps, values = torch.device("mps"), torch.tensor([0.1, -2.0], dtype=torch.float64)
        moved = on(mps, values)
        assert (moved.device, moved.dtype) == (mps, torch.float32)
        assert on(torch.device("cpu"), values).dtype == torch.float64
        assert on(mps, torch.tensor([True])).dtype == torch.bool
