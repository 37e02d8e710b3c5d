"""The comparison of a sweep, on its page and in the terminal: the best run, and how far to believe it."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_run import HOSTILE, write_run
from fake_tasks import ASKED, measured
from rich.console import Console
from statsmodels.stats.proportion import proportion_confint
from test_report_html import Page

from prefold.reports.run_files import readable
from prefold.reports.sweep import _to_best, summary, write_sweep
from prefold.reports.tasks import outcome_of
from prefold.reports.verdict import change_sentence
from prefold.runs.sweep import _compared, _confirm

ACCURACIES = {
    "learning_rate=1e-5,beta=0.1": 0.6,
    "learning_rate=1e-5,beta=0.3": 0.5,
    "learning_rate=5e-5,beta=0.1": 0.75,
    "learning_rate=5e-5,beta=0.3": 0.72,
}
PAIRS = 84


def facts_of(before: Any, after: Any) -> dict[str, Any]:
    """As a run leaves them."""
    return {
        "before": float(before.mean()),
        "after": float(after.mean()),
        "after_ci": list(proportion_confint(after.sum(), len(after), method="wilson")),
        "margin": 0.4,
        "shares": True,
        "by_unit": {"before": before, "after": after},
    }


def sweep(accuracies: dict[str, float] = ACCURACIES, **changes: Any) -> dict[str, Any]:
    """The content of `sweep.json`; runs of the same accuracy have the same answers."""
    hard = np.random.default_rng(5).random(PAIRS)
    noise = np.random.default_rng(6)
    before = (hard < 0.45).astype(float)
    drawn = {accuracy: 0.8 * hard + 0.2 * noise.random(PAIRS) < accuracy for accuracy in accuracies.values()}
    found = {name: facts_of(before, drawn[accuracy].astype(float)) for name, accuracy in accuracies.items()}
    compared = _compared(found)
    points = [{"name": name, "settings": {}, "status": "done", "held_out": facts} for name, facts in found.items()]
    about = {"recipe": "demo", "folder": "runs/demo-sweep", "fields": {}, "overrides": []}
    confirm = _confirm(Path("runs/demo-sweep"), compared["best"])
    return {**about, **compared, "confirm": confirm, "points": points, **changes}


def folder_of(found: dict[str, Any], folder: Path, **changes: Any) -> Path:
    for point in found["points"]:
        if point["status"] == "done":
            write_run(folder / point["name"], **changes)
    return folder


def page(found: dict[str, Any], folder: Path, **changes: Any) -> Page:
    return Page(write_sweep(folder_of(found, folder, **changes), found).read_text(encoding="utf-8"))


def printed(found: dict[str, Any]) -> str:
    file = io.StringIO()
    Console(file=file, width=80, color_system=None, force_terminal=False).print(summary(found))
    return file.getvalue()


def squeezed(text: str) -> str:
    text = text.replace("\u2060", "")
    for space in ("\u202f", "\u00a0"):
        text = text.replace(space, " ")
    return " ".join(text.replace("\u2212", "-").split())


def test_the_best_run_is_shown_with_what_it_is_worth(tmp_path: Path) -> None:
    found = sweep()
    shown, text = page(found, tmp_path), squeezed(printed(found))
    for said in (squeezed(shown.text), text):
        assert "No clear best of 4: learning_rate=5e-5, beta=0.1 is the highest" in said
        assert "Chosen by the 84 pairs that it is measured on: the best of 4 equally good runs would look" in said
        assert "84 pairs do not show it to be better than learning_rate=5e-5, beta=0.3" in said
        assert "prefold run runs/demo-sweep/learning_rate=5e-5,beta=0.1 \\ data.eval=" in said
        assert "With allowance for the choice, its accuracy is" in said
    assert re.search(r"-\d+\.\d points to the highest \(-\d+\.\d to [+-]\d+\.\d\), p [=<]", squeezed(shown.text))
    links = [attributes["href"] for tag, attributes in shown.elements if tag == "a"]
    assert links[0] == "learning_rate%3D1e-5%2Cbeta%3D0.1/report.html" and len(links) == 4
    assert max(map(len, printed(found).splitlines())) <= 80


@pytest.mark.parametrize(
    ("accuracies", "headline"),
    [
        ({"a=1": 0.95, "a=2": 0.6}, "Best of 2: a=1"),
        ({"a=1": 0.47, "a=2": 0.44}, "No clear best of 2: a=1 is the highest, not clearly better than before training"),
        ({"a=1": 0.15, "a=2": 0.1}, "No clear best of 2: a=1 is the highest, worse than before training"),
        ({"a=1": 0.95}, "a=1 is better than before training"),
        ({"a=1": 0.95, "a=2": 0.95}, "No best of 2: both have the same held-out accuracy a=1: held-out"),
        (
            {"a=1": 0.9, "a=2": 0.9, "a=3": 0.2},
            "No best of 3: a=1 and a=2 have the same held-out accuracy a=1: held-out",
        ),
        (
            dict.fromkeys(("a=1", "a=2", "a=3"), 0.2),
            "No best of 3: all have the same held-out accuracy, worse than before training",
        ),
    ],
)
def test_headlines(accuracies: dict[str, float], headline: str) -> None:
    found = sweep(accuracies)
    text = squeezed(printed(found))
    assert text.startswith(headline)
    equal = len(set(accuracies.values())) < len(accuracies)
    assert ("by luck alone" in text) == (len(accuracies) > 1 and not equal) and "0.0 points too good" not in text
    assert (found["best"] is None) == equal == ("equal highest" in text) and (found["confirm"] is None) == equal


def test_what_is_printed_agrees_in_1000_sweeps() -> None:
    """Of each run against the model before training, and against the highest one: on few pairs and many, with ties."""
    draw, shown, behind_shown = np.random.default_rng(3), 0, 0
    for _ in range(1000):
        n, runs = int(draw.choice((3, 6, 9, 20, 60))), int(draw.integers(1, 5))
        hard, skill = draw.random(n), draw.choice((0.05, 0.3, 0.5, 0.7, 0.98), runs + 1)
        sides = [(0.7 * hard + 0.3 * draw.random(n) < quality).astype(float) for quality in skill]
        found = {f"a={run}": facts_of(sides[-1], sides[run]) for run in range(runs)}
        compared = _compared(found)
        for name, facts in found.items():
            low, high, p_value, differs = read(change_sentence(facts))
            assert (low > 0 or high < 0) == differs == (outcome_of(facts) in ("better", "worse"))
            shown += differs
            text = _to_best(facts, compared["best"], bool(compared["as_good"]))
            if " to the highest" not in text:
                assert text == {True: "equal highest"}.get(name in compared["tied"], text) and facts["to_best"] is None
                continue
            low, high, p_value, differs = read(text)
            assert (high < 0) == differs == (name not in compared["as_good"]) and p_value != 0.05
            behind_shown += differs
        names = {name for name, facts in found.items() if facts["after"] == max(one["after"] for one in found.values())}
        assert names == set(compared["tied"] or [compared["best"]])
    assert shown > 300 and behind_shown > 100


def read(text: str) -> tuple[float, float, float, bool]:
    """Interval and p-value as they are written, and whether that is below 0.05."""
    text = squeezed(text)
    interval, p_value = re.search(r"([+-][\d.]+) to ([+-][\d.]+)", text), re.search(r"p [<=] ([\d.e-]+)", text)
    assert interval and p_value, text
    return float(interval[1]), float(interval[2]), float(p_value[1]), float(p_value[1]) < 0.05


def test_a_run_that_is_better_than_all_others_is_said_to_be() -> None:
    text = squeezed(printed(sweep({"a=1": 0.98, "a=2": 0.3, "a=3": 0.2})))
    assert "Better than each of the others, after correction for all comparisons" in text


def test_what_failed_and_what_waits_is_shown(tmp_path: Path) -> None:
    failed = {"name": "a=1", "settings": {}, "status": "failed", "error": "out of memory", "held_out": None}
    waiting = {"name": "a=2", "settings": {}, "status": "waiting", "held_out": None}
    nothing = {"best": None, "confirm": None}
    found = sweep(points=[failed, waiting], **nothing)
    assert "No run is done yet" in printed(found)
    text = squeezed(page(found, tmp_path).text)
    assert "out of memory" in text and "Not done yet." in text and "What to do now" not in text
    assert "All 1 runs failed" not in printed(found)
    assert "The only run failed" in printed(sweep(points=[failed], **nothing))
    assert "All 2 runs failed" in printed(sweep(points=[failed, failed | {"name": "a=3"}], **nothing))


def test_tasks_stand_beside_the_model_before_training(tmp_path: Path) -> None:
    assert 'id="tasks"' not in str(write_sweep(folder_of(sweep(), tmp_path / "a"), sweep()).read_text())
    tasks = {"recipe": ASKED, "tasks": measured()["tasks"]}
    text = squeezed(page(sweep(), tmp_path / "b", **tasks).text)
    assert "hellaswag" in text and "gsm8k" in text


def test_text_stays_text(tmp_path: Path) -> None:
    pages = []
    for name, texts in (("plain", [f"x{number}" for number in range(len(HOSTILE))]), ("odd", HOSTILE)):
        found = sweep({"a=1": 0.9})
        failures = [{"name": text, "settings": {}, "status": "failed", "error": text} for text in texts]
        everything = "".join(texts)
        found |= {"recipe": everything, "folder": everything, "confirm": everything}
        found["points"] += failures
        pages.append(page(found, tmp_path / name))
    wanted, shown = pages
    assert shown.skeleton == wanted.skeleton and shown.raw["script"] == []
    assert all(readable(text) in shown.text for text in HOSTILE)
    assert not set("\x1b\x07\x9b\x00") & set(printed(found))
