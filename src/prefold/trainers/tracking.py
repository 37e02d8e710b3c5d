"""Sampled completions for the trackers, which get every step's metrics from the Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def send_completions(step: int, groups: Sequence[dict[str, Any]]) -> None:
    """Show groups, as they are in the run folder, in a table of the W&B run that is open."""
    import wandb

    if wandb.run is None:
        return
    names = list(groups[0]["completions"][0]["scores"])
    rows = [
        [
            step,
            "\n\n".join(message["content"] for message in group["prompt"]),
            one["text"],
            one["tokens"],
            *(one["scores"][name] for name in names),
            one["reward"],
            one["advantage"],
        ]
        for group in groups
        for one in group["completions"]
    ]
    scores = (f"rewards/{name}" for name in names)
    columns: list[str | int] = ["step", "prompt", "completion", "tokens", *scores, "reward", "advantage"]
    # Not by itself: it belongs to the metrics of the step, which follow.
    wandb.log({"completions": wandb.Table(columns=columns, data=rows)}, commit=False)
