"""Pushing checkpoints during training. A push that fails is reported, and the run goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from prefold.errors import Explained, first_line
from prefold.terminal import warn


class Pushes(TrainerCallback):
    """Calls `push` with the folder of every checkpoint that was saved."""

    def __init__(self, push: Callable[[Path], None]):
        self.push = push

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        try:
            self.push(checkpoint)
        except Exception as error:  # a server's client, or the disk that it packs on, may raise anything
            reason = first_line(error) if isinstance(error, Explained) else type(error).__name__
            warn(f"{checkpoint.name} was not pushed, and the run goes on: {reason}")
