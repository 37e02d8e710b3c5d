"""What a person sees while something runs. It goes to stderr, so that stdout is left to results; in a notebook to
stdout, since notebooks show stderr like an error."""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from io import StringIO
from threading import Timer
from typing import Any, NamedTuple, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

IN_NOTEBOOK = Console().is_jupyter
# Only the first of several processes prints. Not as Jupyter, where rich would make an output of each line.
console = Console(
    stderr=not IN_NOTEBOOK, force_jupyter=False, highlight=False, quiet=os.environ.get("RANK", "0") != "0"
)

Advance = Callable[..., None]
"""Advances a bar; keywords as in rich: `advance` is a number of items, `text` is shown beside the bar."""
BETWEEN_UPDATES = 0.5
"""Seconds between two updates of a bar in a notebook."""
BETWEEN_LINES = 30.0
"""Seconds between two lines about the same work, without a terminal."""
UNTOLD = 1.0
"""Seconds that work may take before a line says what it is, without a terminal."""
SOON = 0.2
"""The same at the start of a command."""


class Doing(NamedTuple):
    """Work in progress: what it is, and its bar if it has one."""

    text: str
    bar: Task | None = None


_doing: list[Doing] = []


def doing() -> Doing | None:
    """The innermost work in progress; None if there is none."""
    return next(reversed(_doing), None)  # another thread may end it meanwhile


@contextmanager
def _in_progress(text: str, bar: Task | None = None) -> Iterator[None]:
    work = Doing(text, bar)
    _doing.append(work)
    try:
        yield
    finally:
        _doing.remove(work)


@contextmanager
def busy(text: str, untold: float = UNTOLD) -> Iterator[None]:
    """Show work of unknown length: a spinner with a clock, removed at the end; without a terminal a line, if it takes
    longer than `untold` seconds."""
    if console.is_terminal and not IN_NOTEBOOK:
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(*columns, console=console, transient=True) as progress:
            progress.add_task(text, total=None)
            with _in_progress(text):
                yield
        return
    timer = Timer(untold, say, [f"{text} ..."])
    timer.daemon = True
    timer.start()
    try:
        with _in_progress(text):
            yield
    finally:
        timer.cancel()


@contextmanager
def loading() -> Iterator[None]:
    """For imports of libraries: without garbage collection, which takes an eighth of their time and finds nothing. In a
    command of prefold, what they have made is also left out of later collections."""
    collects = gc.isenabled()
    gc.disable()
    try:
        with busy("loading libraries", SOON):
            yield
    finally:
        if "prefold.cli" in sys.modules:
            gc.freeze()
        if collects:
            gc.enable()


@contextmanager
def progress_bar(description: str, total: int | None, done: int = 0) -> Iterator[Advance]:
    """A progress bar that fits 80 columns; without a terminal, a line now and then and at the end. Without a total it
    counts, and is removed at the end."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        _Left(),
        TextColumn("{task.fields[text]}"),
    )
    progress = Progress(*columns, console=console, transient=total is None)
    task = progress.add_task(description, total=total, completed=done, text="", done=done)
    going_on = _in_progress(description, progress.tasks[0])
    if console.is_terminal and not IN_NOTEBOOK:
        with progress, going_on:
            yield partial(progress.update, task)
        return
    show, between = (_lines(progress), BETWEEN_LINES) if not IN_NOTEBOOK else (_cell(progress), BETWEEN_UPDATES)
    last = time.monotonic()
    shown: float | None = None

    def advance(**changes: Any) -> None:
        nonlocal last, shown
        progress.update(task, **changes)
        if time.monotonic() - last >= between:
            show()
            last, shown = time.monotonic(), progress.tasks[0].completed

    try:
        with going_on:
            yield advance
    finally:
        if total is not None and shown != progress.tasks[0].completed:
            show()


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(rate(speed(task)), style="progress.data.speed")


class _Left(ProgressColumn):
    def render(self, task: Task) -> Text:
        seconds = seconds_left(task)
        return Text("" if seconds is None else f"left {clock(seconds)}", style="progress.remaining")


def speed(bar: Task) -> float | None:
    """The mean of items a second since the start, as they come in bursts. None if none is done."""
    moved = bar.completed - bar.fields["done"]
    return moved / bar.elapsed if moved and bar.elapsed else None


def seconds_left(bar: Task) -> float | None:
    per_second = speed(bar)
    return None if per_second is None or bar.remaining is None else bar.remaining / per_second


def rate(per_second: float | None) -> str:
    """Items a second, or seconds an item."""
    if not per_second:
        return ""
    number, unit = (per_second, "/s") if per_second >= 1 else (1 / per_second, " s each")
    return f"{number:,.0f}{unit}" if number >= 100 else f"{number:.3g}{unit}"


def _lines(progress: Progress) -> Callable[[], None]:
    def show() -> None:
        task = progress.tasks[0]
        of = "" if task.total is None else f" of {task.total:,.0f}"
        parts = [f"{task.completed:,.0f}{of}", rate(speed(task)), f"{clock(task.elapsed)} so far"]
        parts += [f"{clock(left)} left"] if (left := seconds_left(task)) else []
        say(f"  {task.description}: {', '.join(filter(None, parts))}  {task.fields['text']}".rstrip())

    return show


def clock(seconds: float | None) -> str:
    return str(timedelta(seconds=round(seconds or 0)))


def _cell(progress: Progress) -> Callable[[], None]:
    # One output that is replaced, since rich's own bar needs widgets, which not every notebook has.
    from IPython.display import display

    shown = display(progress, display_id=True)
    return lambda: shown.update(progress)


def say(text: str) -> None:
    """Print a line; outside a terminal it is not wrapped."""
    console.print(text, markup=False, soft_wrap=not console.is_terminal)


def warn(text: str) -> None:
    """Print a line of a stage, and log it as a warning."""
    logging.getLogger("prefold").warning(text)
    say(f"  {text}")


def as_text(show: Callable[[Console], None]) -> str:
    """What `show` prints on a console of 80 columns."""
    printed = StringIO()
    show(Console(file=printed, width=80, highlight=False, force_jupyter=False, force_terminal=False))
    return "\n".join(line.rstrip() for line in printed.getvalue().splitlines())


# ---- stdout for other programs ----------------------------------------------------------------------------------

_results: TextIO | None = None


@contextmanager
def stdout_for_results() -> Iterator[None]:
    """Redirect stdout to stderr for everything but `print_json`: Python, libraries in C, child processes. File
    descriptor 1 stays redirected until the process ends, since libraries may print then."""
    global _results
    stdout = sys.stdout
    stdout.flush()
    own = stdout is sys.__stdout__
    _results = os.fdopen(os.dup(1), "w", encoding=stdout.encoding, errors=stdout.errors) if own else stdout
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        _results.flush()
        sys.stdout, _results = stdout, None


def print_json(value: Any, **options: Any) -> None:
    """One object on stdout; `options` are of `json.dumps`."""
    print(json.dumps(value, **{"indent": 2, **options}), file=_results or sys.stdout, flush=True)
