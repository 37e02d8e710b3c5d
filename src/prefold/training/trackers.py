"""W&B and TensorBoard as callbacks that may fail: what is lost then is their curves, never the run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from prefold.errors import UserError
from prefold.terminal import say

logger = logging.getLogger("prefold")

EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]


def open_trackers(names: Sequence[str]) -> list[TrainerCallback]:
    """transformers' callbacks for the trackers of a recipe.

    Raises:
        UserError: one of them is not installed.
    """
    return [_forgiven(name, make) for name, make in zip(names, get_reporting_integration_callbacks(names), strict=True)]


def _forgiven(name: str, make: Callable[[], TrainerCallback]) -> TrainerCallback:
    """The tracker's callback, left alone after its first failure."""
    try:
        tracker = make()
    except (RuntimeError, ImportError):
        what, advice = f"`{name}` is not installed", "`pip install 'prefold[trackers]'`, or take it out"
        raise UserError(what, where="`train.report_to`", advice=advice) from None
    failed = False

    def forgiving(event: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            nonlocal failed
            if failed:
                return None
            try:
                return event(*args, **settings)
            except Exception as error:  # whatever a client of a server can think of
                failed = True
                _say_failed(name, error)
                return None

        return call

    for event in EVENTS:
        setattr(tracker, event, forgiving(getattr(tracker, event)))
    return tracker


def _say_failed(name: str, error: Exception) -> None:
    text = f"{name} failed ({type(error).__name__}); the run goes on without it, the run folder has it all"
    logger.warning(text)
    say(f"  {text}")


def send_completions(step: int, groups: Sequence[dict[str, Any]]) -> None:
    """Show groups, as they are in the run folder, in a table of the W&B run that is open, if there is one."""
    wandb: Any = sys.modules.get("wandb")
    if wandb is None or wandb.run is None:
        return
    names = list(groups[0]["completions"][0]["scores"])
    rows = [
        [
            step,
            "\n\n".join(message["content"] for message in group["prompt"]),
            *(completion[name] for name in ("text", "tokens")),
            *(completion["scores"][name] for name in names),
            *(completion[name] for name in ("reward", "advantage")),
        ]
        for group in groups
        for completion in group["completions"]
    ]
    scores = (f"rewards/{name}" for name in names)
    columns: list[str | int] = ["step", "prompt", "completion", "tokens", *scores, "reward", "advantage"]
    try:
        # Not by itself: it belongs to the metrics of the step, which follow.
        wandb.log({"completions": wandb.Table(columns=columns, data=rows)}, commit=False)
    except Exception as error:
        _say_failed("wandb", error)
