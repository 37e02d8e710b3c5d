"""The terminal summary: 80 columns, what it says, and hostile text that steers nothing."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_run import HELDOUT, HOSTILE, RECIPE, write_run
from rich.console import Console

from prefold.reports.run_table import summary


def printed(folder: Path, **changes: Any) -> str:
    """The summary as a dumb terminal of 80 columns shows it."""
    file = io.StringIO()
    Console(file=file, width=80, color_system=None, force_terminal=False).print(summary(write_run(folder, **changes)))
    return file.getvalue().replace("\u00a0", " ").replace("\u2212", "-")


def words(text: str) -> str:
    return " ".join(text.split())


def test_the_summary_holds_verdict_table_and_places(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_run(folder)
    (folder / "report.html").touch()
    (folder / "merged").mkdir()
    text = printed(folder)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "Held-out accuracy rose from 31 % to 92 %" in text
    assert "accuracy 31 % 92 % +61 points 22 % to 41 % 84 % to 96 % +50 to +70" in words(text)
    assert "margin -0.40 +0.83 +1.23" in words(text)
    joined = "".join(text.split())
    assert str(folder / "report.html") in joined and str(folder / "merged") in joined


def test_what_is_taught_stands_before_the_verdict(tmp_path: Path) -> None:
    text = words(printed(tmp_path, recipe=f"description: >\n  It learns\n  [bold]plain[/] words.\n{RECIPE}"))
    assert text.startswith("It learns [bold]plain[/] words. Held-out accuracy rose")


def test_what_is_not_there_is_not_named(tmp_path: Path) -> None:
    text = printed(tmp_path, heldout=None)
    assert text.strip() == "Not evaluated yet"


def test_the_home_folder_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "merged").mkdir(parents=True)
    (tmp_path / "runs" / "merged").mkdir(parents=True)
    assert f"~{os.sep}runs{os.sep}merged" in printed(tmp_path / "runs")


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_steers_no_terminal(text: str, tmp_path: Path) -> None:
    name = text.encode("utf-8", "ignore").decode().replace("/", "|").replace("\0", "")[:60]
    recipe = yaml.safe_dump(yaml.safe_load(RECIPE) | {"model": {"name": text}})
    (tmp_path / name / "merged").mkdir(parents=True)
    shown = printed(tmp_path / name, recipe=recipe, heldout=HELDOUT | {text: text})
    assert not [letter for letter in shown if (ord(letter) < 32 and letter != "\n") or 0x7F <= ord(letter) < 0xA0]
    assert "rose from 31 % to 92 %" in shown
    if name.isascii() and name.isprintable():
        assert "".join(name.split()) in "".join(shown.split())


def test_a_reward_model_has_one_column(tmp_path: Path) -> None:
    after = {"accuracy": 0.85, "accuracy_ci": [0.76, 0.91], "margin": 1.5}
    chance = {"accuracy": 0.5, "p_value": 1e-6, "verdict": "better"}
    text = words(printed(tmp_path, heldout={"pairs": 84, "after": after, "chance": chance}))
    assert text == (
        "Held-out accuracy is 85 %, and 50 % by chance 95 % interval 76 % to 91 %, p < 0.001, 84 pairs "
        "held-out pairs after accuracy 85 % 76 % to 91 % margin +1.50"
    )
