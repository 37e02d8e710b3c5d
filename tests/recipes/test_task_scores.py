"""Tasks before and after training, in a run and in `check`."""

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
from prefold.evaluation.scores import TaskScores
from prefold.recipe import RecipeBase

MakeRecipe = Callable[..., RecipeBase]


@pytest.fixture
def asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = write_tasks(tmp_path / "tasks")
    return {"tasks": ["tiny_passages", "tiny_sums"], "include_path": str(folder), "limit": 3}


def scores(folder: Path, when: str) -> list[TaskScores]:
    return [
        TaskScores.from_json(one) for one in json.loads((folder / "evaluation" / f"scores_{when}.json").read_text())
    ]


def test_a_run_asks_before_and_after(recipe: MakeRecipe, asks: dict[str, Any]) -> None:
    folder = prefold.run(recipe(evaluate=asks))
    compared = json.loads((folder / "evaluation" / "tasks.json").read_text())
    assert set(compared["tasks"]) == {"tiny_passages", "tiny_sums"}
    assert {"metric", "before", "after", "difference", "ci", "p_value", "n"} <= set(compared["tasks"]["tiny_passages"])
    assert compared["settings"]["apply_chat_template"] is False and compared["settings"]["limit"] == 3
    before, after = scores(folder, "before"), scores(folder, "after")
    assert [one.questions for one in before] == [one.questions for one in after]
    assert compared["tasks"]["tiny_passages"]["n"] == 3
    assert "lm_eval" in json.loads((folder / "environment.json").read_text())["packages"]


def test_other_tasks_are_asked_of_a_run_that_is_done(recipe: MakeRecipe, asks: dict[str, Any]) -> None:
    folder = prefold.run(recipe())
    assert not (folder / "evaluation" / "tasks.json").exists()
    weights = (folder / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    prefold.run(recipe(evaluate=asks))
    assert (folder / "evaluation" / "tasks.json").is_file()
    assert (folder / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == weights


def test_an_unknown_task_is_found_before_training(recipe: MakeRecipe, asks: dict[str, Any]) -> None:
    wrong = recipe(evaluate={**asks, "tasks": ["tiny_passage"]})
    for begin in (prefold.check, prefold.run):
        with pytest.raises(UserError, match="did you mean `tiny_passages`"):
            begin(wrong)
    assert not (wrong.run_folder / "adapter").exists() and not (wrong.run_folder / "checkpoints").exists()


@pytest.mark.parametrize("name", ["include_path", "limit", "num_fewshot", "apply_chat_template"])
def test_settings_of_tasks_that_there_are_not(recipe: MakeRecipe, name: str) -> None:
    value = {"include_path": "tasks", "limit": 3, "num_fewshot": 2, "apply_chat_template": True}[name]
    with pytest.raises(UserError, match=f"`{name}` is for `tasks`, and there are none"):
        recipe(evaluate={name: value})


def test_questions_of_the_training_data_are_counted_apart(
    recipe: MakeRecipe, asks: dict[str, Any], pairs: Path
) -> None:
    asked = [f"What is {number} plus {number}?" for number in (2, 3, 4)]
    rows = [{"prompt": question, "chosen": "I know.", "rejected": "No idea."} for question in asked[:2]]
    with pairs.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    held_out = {"data": {"train": [{"path": str(pairs)}], "eval": [{"path": str(pairs)}], "eval_fraction": 0}}
    folder = prefold.run(recipe(evaluate=asks, **held_out))
    tasks = json.loads((folder / "evaluation" / "tasks.json").read_text())["tasks"]
    assert [tasks["tiny_sums"][part]["n"] for part in ("contaminated", "clean")] == [2, 1]
    assert tasks["tiny_passages"]["contaminated"] == {"n": 0}
    assert scores(folder, "before")[0].contaminated is None
    assert "2 of 3 questions are in the training data" in (folder / "merged" / "README.md").read_text()


def test_evaluating_shows_all_that_was_measured(
    recipe: MakeRecipe, asks: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    judged = {"win_rate": {"judge": {"name": "length", "target": 5}}, "prompts": 2, "max_new_tokens": 8}
    folder = prefold.run(recipe(evaluate=asks | judged))

    def printed(*flags: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["prefold", "evaluate", str(folder), *flags])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 0
        return capfd.readouterr()

    out, _ = printed("--json")
    found = json.loads(out)
    assert found["pairs"] == 6 and set(found["tasks"]["tasks"]) == {"tiny_passages", "tiny_sums"}
    assert found["win_rate"]["prompts"] == 2
    out, err = printed()
    assert out == "" and "tiny_passages" in err and "New answers preferred" in err
