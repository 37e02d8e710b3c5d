"""Models that are asked tasks beside a run's own, and `prefold compare` of runs and models, as a user meets them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from harness_tasks import write_tasks

import prefold
from prefold.cli import main
from prefold.errors import UserError
from prefold.recipe import RecipeBase

MakeRecipe = Callable[..., RecipeBase]


@pytest.fixture
def asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = write_tasks(tmp_path / "tasks")
    return {"tasks": ["tiny_passages", "tiny_sums"], "include_path": str(folder), "limit": 3}


def test_runs_and_models_are_compared(
    recipe: MakeRecipe,
    asks: dict[str, Any],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    first = str(prefold.run(recipe(evaluate=asks, output_dir=str(tmp_path / "first"))))
    beside = asks | {"compare_with": [str(tiny_model), first]}
    second = prefold.run(recipe(evaluate=beside, output_dir=str(tmp_path / "second")))

    # The base beside itself: it is the same model, asked the same.
    compared = json.loads((second / "evaluation" / "compared.json").read_text())["models"]
    assert list(compared) == [str(tiny_model), first]
    assert all(one["difference"] == 0 for one in compared[str(tiny_model)]["tasks"].values())
    assert 'id="others"' in (second / "report.html").read_text()

    # Two runs and a model, which is asked what the runs were asked.
    found = prefold.compare([first, str(second), str(tiny_model)])
    assert found["baseline"] == first and list(found["models"]) == [str(second), str(tiny_model)]
    assert found["models"][str(second)]["tasks"]["tiny_passages"]["n"] == 3
    pairs = [json.loads(line)["key"] for line in (second / "evaluation" / "heldout.jsonl").read_text().splitlines()]
    facts = found["models"][str(second)]["measures"]["held-out pairs"]
    assert facts["n"] == len(set(pairs)) > 0 and facts["changed"] == 0
    assert found["models"][str(tiny_model)]["left_out"] == {"held-out pairs": f"only {first} has measured it"}
    after = {name: one["after"] for name, one in found["models"][str(tiny_model)]["tasks"].items()}
    own = json.loads((second / "evaluation" / "tasks.json").read_text())["tasks"]
    assert after == {name: one["before"] for name, one in own.items()}

    # Tasks that are named are asked of all of them, a run folder's merged model included.
    page = tmp_path / "page.html"
    arguments = ["--tasks", "tiny_sums", "--include-path", asks["include_path"], "--html", str(page), "--json"]
    monkeypatch.setattr(sys, "argv", ["prefold", "compare", str(tiny_model), str(second), *arguments])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    told = json.loads(capfd.readouterr().out)
    assert told["baseline"] == str(tiny_model) and list(told["models"][str(second)]["tasks"]) == ["tiny_sums"]
    assert "tiny_sums" in page.read_text()


def test_other_models_are_asked_of_a_run_that_is_done(
    recipe: MakeRecipe, asks: dict[str, Any], tiny_model: Path
) -> None:
    folder = prefold.run(recipe(evaluate=asks))
    scores = (folder / "evaluation" / "scores_after.json").stat().st_mtime_ns
    prefold.run(recipe(evaluate=asks | {"compare_with": [str(tiny_model)]}))
    assert (folder / "evaluation" / "compared.json").is_file()
    assert (folder / "evaluation" / "scores_after.json").stat().st_mtime_ns == scores


def test_a_model_that_is_not_there_is_refused_before_training(recipe: MakeRecipe, asks: dict[str, Any]) -> None:
    wrong = recipe(evaluate=asks | {"compare_with": ["./nowhere"]})
    with pytest.raises(UserError, match=r"\./nowhere: no such folder or file"):
        prefold.run(wrong)
    assert not (wrong.run_folder / "adapter").exists()
