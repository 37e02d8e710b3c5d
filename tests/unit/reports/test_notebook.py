"""What a notebook gets to see of a run."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fake_run import HOSTILE, sample, write_run

import prefold
from prefold.errors import UserError
from prefold.reports.notebook import framed
from prefold.reports.page import write_report


class Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def numbered(page: str) -> str:
    """Without the numbers that bokeh counts its objects by."""
    return re.sub(r"p\d{4,}", "p", page)


def test_the_report_stands_in_a_frame(tmp_path: Path) -> None:
    write_run(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    shown = prefold.show(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    assert "held-out pairs" in repr(shown) and "accuracy" in repr(shown) and "\x1b" not in repr(shown)
    [(tag, attributes)] = Elements(shown._repr_html_()).found
    assert tag == "iframe" and attributes["sandbox"] == "allow-scripts"
    assert numbered(attributes["srcdoc"] or "") == numbered(write_report(tmp_path).read_text(encoding="utf-8"))


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_leaves_the_frame(text: str) -> None:
    [(_, attributes)] = Elements(framed(text)).found
    assert attributes["srcdoc"] == text


def test_hostile_answers_stay_in_it(tmp_path: Path) -> None:
    write_run(tmp_path, samples=[sample(text, text, text) for text in HOSTILE])
    assert len(Elements(prefold.show(str(tmp_path))._repr_html_()).found) == 1


def test_a_folder_without_a_run_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        prefold.show(tmp_path)
