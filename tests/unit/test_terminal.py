"""What is said of work that takes long, on a terminal and elsewhere."""

from __future__ import annotations

import gc
import io
import json
import time
from collections.abc import Callable

import pytest
from rich.console import Console

from prefold import terminal


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], io.StringIO]:
    def on(is_terminal: bool) -> io.StringIO:
        text = io.StringIO()
        monkeypatch.setattr(terminal, "console", Console(file=text, width=80, force_terminal=is_terminal))
        return text

    return on


@pytest.mark.parametrize(("between", "lines"), [(0.0, 4), (60.0, 1)])
def test_a_bar_in_a_log_is_a_line_now_and_then(
    between: float, lines: int, shown: Callable[[bool], io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "BETWEEN_LINES", between)
    log = shown(False)
    with terminal.progress_bar("train", 4) as advance:
        for step in range(4):
            time.sleep(0.03)
            advance(advance=1, text=f"loss {step}")
    *before, last = log.getvalue().splitlines()
    assert len(before) == lines - 1
    assert last.startswith("  train: 4 of 4, ") and last.endswith("so far  loss 3")
    if before:
        assert before[2].startswith("  train: 3 of 4, ") and "/s, " in before[2]
        assert " so far, " in before[2] and before[2].endswith(" left  loss 2")


def test_a_bar_on_a_terminal_has_rate_and_end(shown: Callable[[bool], io.StringIO]) -> None:
    seen = shown(True)
    with terminal.progress_bar("held-out prompts before", 400, 100) as advance:
        for _ in range(3):
            time.sleep(0.02)
            advance(advance=50, text="")
    last = seen.getvalue().split("\r")[-1]
    assert "250/400" in last and "/s" in last and "left" in last


def test_what_has_no_end_is_counted(shown: Callable[[bool], io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a log only if it takes long."""
    for between, lines in ((0.0, 2), (30.0, 0)):
        monkeypatch.setattr(terminal, "BETWEEN_LINES", between)
        log = shown(False)
        with terminal.progress_bar("reading [a].jsonl", None) as advance:
            for _ in range(2):
                time.sleep(0.02)
                advance(advance=256)
        assert len(log.getvalue().splitlines()) == lines
        assert not lines or log.getvalue().startswith("  reading [a].jsonl: 256, ")
    seen = shown(True)
    with terminal.progress_bar("reading [a].jsonl", None) as advance:
        advance(advance=256)
    assert "reading [a].jsonl" in seen.getvalue() and "256/?" in seen.getvalue()


def test_what_takes_long_is_said(shown: Callable[[bool], io.StringIO]) -> None:
    log = shown(False)
    with terminal.busy("planning", untold=0.05):
        time.sleep(0.2)
    with terminal.busy("reading", untold=5.0):
        pass
    time.sleep(0.1)
    assert log.getvalue() == "planning ...\n"


def test_on_a_terminal_it_is_said_at_once_and_gone_when_it_is_done(shown: Callable[[bool], io.StringIO]) -> None:
    seen = shown(True)
    with terminal.busy("planning"):
        time.sleep(0.15)
        during = seen.getvalue()
    assert "planning" in during
    assert seen.getvalue().endswith("\x1b[2K")


def test_bars_may_begin_while_something_goes_on(shown: Callable[[bool], io.StringIO]) -> None:
    seen = shown(True)
    with terminal.busy("fetching"), terminal.progress_bar("file", 2) as advance:
        advance(advance=2)
    assert "2/2" in seen.getvalue()


def test_garbage_is_looked_for_again_after_loading() -> None:
    with terminal.loading():
        assert not gc.isenabled()
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("per_second", "text"),
    [
        (None, ""),
        (0.0, ""),
        (4321.0, "4,321/s"),
        (12.34, "12.3/s"),
        (1.0, "1/s"),
        (0.25, "4 s each"),
        (0.001, "1,000 s each"),
    ],
)
def test_rates(per_second: float | None, text: str) -> None:
    assert terminal.rate(per_second) == text


def test_results_are_alone_on_stdout(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal.stdout_for_results(), terminal.busy("planning", untold=0.0):
        time.sleep(0.1)
        terminal.print_json({"ok": True})
    assert json.loads(capfd.readouterr().out) == {"ok": True}
