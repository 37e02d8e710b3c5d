"""The page of a run while it goes on: what it shows, what writing it costs, and what it becomes."""

from __future__ import annotations

import itertools
import re
import time
from pathlib import Path
from typing import Any

import pytest
from fake_run import HOSTILE, metrics, write_run

from prefold.errors import StageError
from prefold.reports import live
from prefold.reports.live import LivePage
from prefold.terminal import progress_bar

STAGES = ["check", "train", "merge", "evaluate", "report"]
EVALUATED: dict[str, Any] = dict.fromkeys(("heldout", "samples", "merge"))


def page_of(folder: Path, **changes: Any) -> LivePage:
    return LivePage(write_run(folder, **EVALUATED | changes), STAGES, "runs/x/report.html")


def written(page: LivePage, stage: str = "train") -> str:
    """The page as it is first written."""
    file = page.folder / "report.html"
    with page.during(stage):
        until = time.monotonic() + 30
        while not file.is_file():
            assert time.monotonic() < until
            time.sleep(0.01)
        return file.read_text(encoding="utf-8")


def test_it_shows_what_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = page_of(tmp_path)
    with progress_bar("train", 200) as advance:
        advance(advance=30, text="loss 0.5")
        text = written(page)
        assert "<h1>Training, 30 of 200</h1>" in text and 'style="width: 15.0%"' in text and "loss 0.5" in text
        advance(advance=20)
        assert "<h1>Training, 50 of 200</h1>" in page.render("train")
    assert '<li class="done">check' in text and '<li class="now" aria-current="step">train' in text
    assert '<li class="later">merge' in text
    assert "Reward margin" in text and "more_pairs.jsonl" in text and "Not done yet" not in text
    assert capsys.readouterr().err.startswith("page: runs/x/report.html\n")


def test_it_loads_itself_anew_until_the_stages_end(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert 'http-equiv="refresh" content="3"' in written(page)
    page.stages = ["check", "train"]
    with page.during("train"):
        pass
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "refresh" not in text and "Not evaluated yet" in text


@pytest.mark.parametrize("error", [StageError("the reward <b>ended</b>"), KeyboardInterrupt()])
def test_a_run_that_stops_says_so(tmp_path: Path, error: BaseException) -> None:
    page = page_of(tmp_path)
    with pytest.raises(type(error)), page.during("train"):
        raise error
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    reason = "the reward &lt;b&gt;ended&lt;/b&gt;" if isinstance(error, StageError) else "interrupted"
    assert f"Stopped in train: {reason}" in text and "refresh" not in text


def test_writing_it_takes_a_hundredth_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = page_of(tmp_path)
    monkeypatch.setattr(live.time, "thread_time", itertools.count(step=0.25).__next__)
    written(page)
    assert (page.between, page.cost) == (live.LEAST, 0.25)  # what is imported for the first one counts once
    (tmp_path / "report.html").unlink()
    page.due, began = 0.0, time.monotonic()
    written(page)
    assert page.between == 25 and page.due >= began + 25


def test_files_that_cannot_be_read_do_not_stop_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    page = page_of(tmp_path)
    (tmp_path / "data.json").write_text("{", encoding="utf-8")
    with page.during("train"):
        time.sleep(0.2)
    assert "data.json" in caplog.text


def test_hostile_texts_stay_text(tmp_path: Path) -> None:
    rows = [row | dict.fromkeys(HOSTILE, 1.0) for row in metrics(5)]
    with progress_bar(HOSTILE[0], 9) as advance:
        advance(advance=1, text=HOSTILE[0])
        text = page_of(tmp_path, metrics=rows).render("train")
    plain = page_of(tmp_path / "plain", metrics=metrics(5)).render("train")
    assert re.findall(r"<script[ >]", text) == re.findall(r"<script[ >]", plain)
    assert "&lt;script&gt;document.title=" in re.findall(r"<h1>.*</h1>", text)[0]
