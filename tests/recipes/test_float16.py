"""Training in float16, as older GPUs have it: losses are scaled, and a step whose gradients overflow is left out."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from run_files import lines

import prefold
from prefold.recipe import RecipeBase

MakeRecipe = Callable[..., RecipeBase]
Trained = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def trained(recipe: MakeRecipe, tmp_path: Path) -> Trained:
    """The metrics of a run in a dtype, in a folder of that name."""

    def train(dtype: str, **changes: Any) -> list[dict[str, Any]]:
        folder = tmp_path / dtype
        prefold.train(recipe(model={"dtype": dtype}, output_dir=str(folder), **changes))
        return lines(folder / "metrics.jsonl")

    return train


@pytest.fixture
def scales(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the gradients of each step are divided by."""
    seen: list[float] = []
    unscale = torch.amp.GradScaler.unscale_

    def recorded(self: torch.amp.GradScaler, optimizer: Any) -> None:
        seen.append(self.get_scale())
        unscale(self, optimizer)

    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", recorded)
    return seen


@pytest.mark.parametrize("lora", [{"r": 4}, "none"], ids=["lora", "whole"])
def test_the_numbers_are_those_of_float32(trained: Trained, lora: Any, scales: list[float]) -> None:
    exact = trained("float32", lora=lora, train={"max_steps": 3})
    assert scales == []
    half = trained("float16", lora=lora, train={"max_steps": 3})
    assert scales == [2.0**16] * 3
    assert half[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # policy and reference compute alike
    for name in ("loss", "grad_norm", "rewards/margins"):
        assert [step[name] for step in half] == pytest.approx([step[name] for step in exact], rel=5e-3, abs=1e-4)


def test_gradients_that_vanish_in_float16_are_there(trained: Trained) -> None:
    """A millionth of a loss: what its gradients have below 6e-8 is nothing in float16."""
    small = {"dpo": {"beta": 1e-7}, "train": {"max_steps": 1}}
    [exact], [half] = trained("float32", **small), trained("float16", **small)
    assert half["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.02)


def test_steps_that_overflow_are_left_out_and_the_scale_is_lowered(
    trained: Trained, scales: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**19))
    steps = trained("float16", train={"max_steps": 8, "warmup_steps": 4})
    left_out = [not math.isfinite(step["grad_norm"]) for step in steps]
    assert left_out[0] and not left_out[-1]
    lowered = [2.0**19 / 2 ** sum(left_out[:step]) for step in range(8)]
    assert scales == lowered
    rates = [step["learning_rate"] for step in steps]
    assert all((rates[step] == rates[step + 1]) == left_out[step] for step in range(7))
    kept = torch.load(tmp_path / "float16" / "checkpoints" / "checkpoint-8" / "scaler.pt", weights_only=True)
    assert kept["scale"] == lowered[-1]
