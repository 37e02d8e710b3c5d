"""How many files of the package run between the ends of two optimizer steps: what a reader of a step must follow."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prefold
from prefold.recipe import RecipeBase
from prefold.training.loop import TrainingLoop

PACKAGE = Path(prefold.__file__).parent
BESIDE = ("memory.py", "terminal.py")
"""What measures a step and shows that it was done."""
PAGE = (Path(__file__).parents[2] / "docs" / "step.md").read_text(encoding="utf-8")


def files_of_a_step(recipe: RecipeBase, monkeypatch: pytest.MonkeyPatch, after: int = 2) -> list[str]:
    """Train; the files of which a function is called from the end of step `after` to the end of the next one."""
    called: set[str] = set()
    step = TrainingLoop.step

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            called.add(frame.f_code.co_filename)

    def profiled(self: TrainingLoop) -> None:
        if self.state.global_step != after:
            return step(self)
        sys.setprofile(profile)
        try:
            step(self)
        finally:
            sys.setprofile(None)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "step", profiled)
        prefold.train(recipe)
    files = {str(Path(name).relative_to(PACKAGE)) for name in called if Path(name).is_relative_to(PACKAGE)}
    return sorted(files - {*BESIDE})


def test_of_dpo(recipe: Callable[..., RecipeBase], monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter as by default, without dropout: the engine's own pass through it counts, and the reference's."""
    files = files_of_a_step(recipe(train={"save_steps": 100}, lora={"lora_dropout": 0.0}), monkeypatch)
    assert len(files) <= 16, "\n".join(files)
    assert [file for file in files if f"`{file}" not in PAGE] == []


def test_of_grpo(recipe: Callable[..., RecipeBase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "Say word {i}"}}\n' for i in range(12)))
    files = files_of_a_step(
        recipe(
            method="grpo",
            grpo={"num_generations": 4, "max_completion_length": 8},
            rewards=[{"name": "length", "target": 3, "unit": "characters"}],
            data={"train": [{"path": str(prompts)}]},
            lora={"lora_dropout": 0.0},
            train={"batch_size": 3, "max_steps": 4, "save_steps": 100},
        ),
        monkeypatch,
    )
    assert len(files) <= 20, "\n".join(files)
    assert [file for file in files if f"`{file}" not in PAGE] == []
