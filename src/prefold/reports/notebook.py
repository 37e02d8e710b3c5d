"""What a notebook shows of a run: its report in a frame, which keeps styles and scripts of the two apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from markupsafe import escape

from prefold.reports.page import render
from prefold.reports.run_files import read_run
from prefold.reports.run_table import summary
from prefold.terminal import as_text


@dataclass(frozen=True, repr=False)
class Shown:
    """The report of a run: in a notebook the page, elsewhere what a terminal would show."""

    text: str
    page: str

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return framed(self.page)


def show(run: str | Path) -> Shown:
    """The report of a run folder, to be shown by a notebook: verdict, before and after, curves, answers side by side.

    It is made from what the run has written so far, and writes nothing. Raises UserError: see `read_run`.
    """
    folder = Path(run).expanduser()
    return Shown(as_text(lambda console: console.print(summary(folder))), render(read_run(folder)))


def framed(page: str) -> str:
    """A whole page of HTML as an element of another page, sandboxed so that it cannot reach that."""
    style = "width: 100%; height: 46rem; border: 0; resize: vertical"
    return f'<iframe srcdoc="{escape(page)}" sandbox="allow-scripts" style="{style}"></iframe>'
