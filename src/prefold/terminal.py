"""What a person sees while something runs. Everything goes to stderr, so that stdout can carry results."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Of several processes the first one talks.
console = Console(stderr=True, highlight=False, quiet=os.environ.get("RANK", "0") != "0")

Advance = Callable[[int, str], None]
"""Moves a bar on by so many items and shows a short text beside it."""


@contextmanager
def progress_bar(description: str, total: int, done: int = 0) -> Iterator[Advance]:
    """A progress bar that fits 80 columns; on a stream that is no terminal, one line when it ends."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, TextColumn("{task.fields[text]}"), console=console) as progress:
        task = progress.add_task(description, total=total, completed=done, text="")

        def advance(amount: int, text: str) -> None:
            progress.update(task, advance=amount, text=text)

        yield advance


def say(text: str) -> None:
    console.print(text, markup=False, soft_wrap=False)
