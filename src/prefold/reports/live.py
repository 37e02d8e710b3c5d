"""`report.html` while a run is going: the current stage, curves, the latest rollouts, guards and findings. A browser
that has it open reloads it by itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from threading import Event, Thread

from prefold.files import write_text
from prefold.reports.numbers import duration
from prefold.reports.page import REPORT, render_live, stage_costs, write_report
from prefold.reports.run_files import RunRecord, read_run
from prefold.terminal import doing, rate, say, seconds_left, speed

logger = logging.getLogger(__name__)

SHARE = 0.01
"""The largest share of the time that writing the page may take."""
LEAST = 3.0
"""Least seconds between two pages."""
PARTICIPLES = {
    "check": "Checking",
    "train": "Training",
    "merge": "Merging",
    "evaluate": "Evaluating",
    "compare": "Comparing",
    "judge": "Judging",
}
"""Headlines of the stages while they are going."""


class LivePage:
    """Writes the page of a run while its stages are performed, one after another.

    Args:
        stages: their names, in order.
        shown: the path of the page, as it is printed.
    """

    def __init__(self, folder: Path, stages: Sequence[str], shown: str):
        self.folder, self.stages, self.shown = folder, stages, shown
        self.due, self.between, self.cost = 0.0, LEAST, 0.0

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Keep the page current. After the last stage, or when one fails, it becomes the report."""
        if not self.due:
            say(f"page: {self.shown}")
        ended = Event()
        thread = Thread(target=self._keep_current, args=(stage, ended), daemon=True)
        thread.start()
        try:
            yield
        except BaseException as error:
            _end(ended, thread)
            reason = str(error) or type(error).__name__
            if isinstance(error, KeyboardInterrupt | SystemExit):
                reason = "interrupted. The same command continues from there."
            _attempt(partial(write_report, self.folder, f"Stopped in {stage}: {reason}"))
            raise
        _end(ended, thread)
        if stage == self.stages[-1]:
            _attempt(partial(write_report, self.folder))

    def _keep_current(self, stage: str, ended: Event) -> None:
        while not ended.wait(max(self.due - time.monotonic(), 0)):
            began, before = time.thread_time(), self.cost
            _attempt(lambda: write_text(self.folder / REPORT, self.render(stage)))
            self.cost = time.thread_time() - began
            # The first page with curves also imports bokeh: the cheaper of the last two pages counts.
            self.between = max(LEAST, min(before, self.cost) / SHARE)
            self.due = time.monotonic() + self.between

    def render(self, stage: str) -> str:
        run = read_run(self.folder)
        stages = _marked(run, self.stages, stage)
        return render_live(run, state=State.now(stage), stages_of_run=stages, between=round(self.between))


@dataclass(frozen=True)
class State:
    """The state of the current stage; `share` of it is done, None if its end is not known."""

    headline: str
    share: float | None
    pace: str
    written: datetime

    @classmethod
    def now(cls, stage: str) -> State:
        work, written = doing(), datetime.now().astimezone()
        headline, bar = PARTICIPLES.get(stage, stage.capitalize()), work.bar if work else None
        if work and work.text != stage:
            headline += f": {work.text}"
        if bar is None or not bar.total:
            return cls(headline, None, "", written)
        left = seconds_left(bar)
        until = left and (written + timedelta(seconds=left)).strftime("%H:%M" if left < 72_000 else "%d %b, %H:%M")
        pace = (rate(speed(bar)), f"{duration(left)} left, until about {until}" if left else "", bar.fields["text"])
        headline += f", {bar.completed:,.0f} of {bar.total:,.0f}"
        return cls(headline, min(bar.completed / bar.total, 1), " · ".join(filter(None, pace)), written)


def _marked(run: RunRecord, stages: Sequence[str], now: str) -> list[tuple[str, str, str]]:
    """Every stage with `done`, `now` or `later`, and the time that it took."""
    costs, at = stage_costs(run.timing), stages.index(now)
    done = [(name, "done", duration(costs[name][0]) if name in costs else "") for name in stages[:at]]
    return [*done, (now, "now", ""), *((name, "later", "") for name in stages[at + 1 :])]


def _attempt(write: Callable[[], object]) -> None:
    """Write the page; if it cannot be written, the run goes on."""
    try:
        write()
    except Exception as error:
        logger.warning("the page of the run was not written: %s", error)


def _end(ended: Event, thread: Thread) -> None:
    ended.set()
    thread.join()
