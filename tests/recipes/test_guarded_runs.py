"""Guards in whole runs: what they say; stopping, rolling back and lowering the rate are exact and resumable."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_files import lines

import prefold
from prefold.algorithms import LossOutput
from prefold.errors import StageError
from prefold.recipe import RecipeBase
from prefold.training import guards
from prefold.training.guards import Facts, History, Trouble
from prefold.training.loop import TrainingLoop

MakeRecipe = Callable[..., RecipeBase]
RATE = 5e-3


def events(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "guards.json").read_text())["events"]
    return found


def assert_same_bytes(found: Path, wanted: Path) -> None:
    for name in ("metrics.jsonl", "guards.json", "adapter/adapter_model.safetensors"):
        assert (found / name).read_bytes() == (wanted / name).read_bytes(), name


class Stopped(BaseException):
    pass


@contextmanager
def stopped_at(step: int) -> Iterator[None]:
    """The process ends during the step, every time that it comes there."""
    take = TrainingLoop.step

    def stopping(self: TrainingLoop) -> None:
        if self.state.global_step == step - 1:
            raise Stopped
        take(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(TrainingLoop, "step", stopping)
        yield


@pytest.fixture
def nan_at_full_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third step gives NaN, unless the rate was lowered before it."""
    loss_of = TrainingLoop.loss_of

    def broken(self: TrainingLoop, *args: Any) -> LossOutput:
        output = loss_of(self, *args)
        if self.state.global_step == 2 and self.guards.rate(3) == 1:
            return replace(output, loss={unit: total * math.nan for unit, total in output.loss.items()})
        return output

    monkeypatch.setattr(TrainingLoop, "loss_of", broken)


@pytest.fixture
def sees_step_3(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard that has something against the third step."""

    def guard(history: History, facts: Facts) -> Trouble | None:
        return Trouble("what it sees", "what to do") if history and history[-1]["step"] == 3 else None

    monkeypatch.setattr(guards, "GUARDS", {"kl_running_off": guard})


def test_a_nan_stops_the_run_and_names_the_rows(
    nan_at_full_rate: None, recipe: MakeRecipe, pairs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # started again, it comes to the same end
        with pytest.raises(StageError) as caught:
            prefold.run(recipe())
        message = str(caught.value)
        assert "step 3: loss nan and gradient norm nan" in message
        assert message.count("to do: look at the rows of the step") == 1
        rows = message.split("rows of the step: ")[1].splitlines()[0]
        assert rows.startswith(f"{pairs} ") and len(rows.removeprefix(str(pairs)).split(",")) == 4
    folder = recipe().run_folder
    assert (folder / "checkpoints" / "checkpoint-2").is_dir() and not (folder / "adapter").exists()
    [event] = events(folder)
    assert (event["guard"], event["action"], event["step"]) == ("not_finite", "stop", 3)
    assert "loss nan" in (folder / "run.log").read_text()
    assert "Traceback" not in capfd.readouterr().err


def test_rolling_back_goes_on_at_half_the_rate(
    nan_at_full_rate: None, recipe: MakeRecipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, Any] = {"guards": {"not_finite": "roll_back"}}
    straight = prefold.train(recipe(**changes, output_dir=str(tmp_path / "straight")))
    said = " ".join(capfd.readouterr().err.split())
    assert said.count("back to step 2, and on from there at half the rate") == 1
    rates = [line["learning_rate"] for line in lines(straight)]
    assert rates == pytest.approx([RATE * left / 6 * (1 if left > 4 else 0.5) for left in (6, 5, 4, 3, 2, 1)])
    assert [line["step"] for line in lines(straight)] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(line["loss"]) for line in lines(straight))
    [event] = [event for event in events(straight) if event["guard"] == "not_finite"]
    assert (event["step"], event["after"], event["action"]) == (3, 2, "roll_back")
    for stop in (2, 4, 6):
        mine = recipe(**changes, output_dir=str(tmp_path / f"stopped-{stop}"))
        with stopped_at(stop):
            prefold.train(mine)
        assert_same_bytes(prefold.train(mine), straight)


def test_rolling_back_in_vain_ends(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before there is a checkpoint the run begins anew."""
    loss_of = TrainingLoop.loss_of

    def broken(self: TrainingLoop, *args: Any) -> LossOutput:
        output = loss_of(self, *args)
        return replace(output, loss={unit: total * math.nan for unit, total in output.loss.items()})

    monkeypatch.setattr(TrainingLoop, "loss_of", broken)
    with pytest.raises(StageError, match=r"step 1: .* after going back 3 times"):
        prefold.train(recipe(guards={"not_finite": "roll_back"}))
    assert [event["action"] for event in events(recipe().run_folder)] == ["roll_back"] * 3 + ["stop"]


def test_lowering_the_rate(sees_step_3: None, recipe: MakeRecipe, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"guards": {"kl_running_off": "lower_rate"}}
    straight = prefold.train(recipe(**changes, output_dir=str(tmp_path / "straight")))
    rates = [line["learning_rate"] for line in lines(straight)]
    assert rates == pytest.approx([RATE * left / 6 * (1 if left > 3 else 0.5) for left in (6, 5, 4, 3, 2, 1)])
    for stop in (4, 5):  # gone on from before the step that the guard saw, and from after it
        mine = recipe(**changes, output_dir=str(tmp_path / f"stopped-{stop}"))
        with stopped_at(stop):
            prefold.train(mine)
        assert_same_bytes(prefold.train(mine), straight)


def test_the_lowered_rate_is_what_weights_move_by(sees_step_3: None, recipe: MakeRecipe, tmp_path: Path) -> None:
    """Plain gradient descent from zero: half the rate is half the way."""
    from safetensors.torch import load_file

    train = {"optim": "sgd", "lr_scheduler_type": "constant", "max_steps": 4, "save_steps": 3}
    moved = {}
    for action in ("off", "lower_rate"):
        settings: dict[str, Any] = {"train": train, "lora": {"lora_dropout": 0.0}, "guards": {"kl_running_off": action}}
        folder = prefold.train(recipe(**settings, output_dir=str(tmp_path / action)))
        before = load_file(folder / "checkpoints" / "checkpoint-3" / "adapter_model.safetensors")
        after = load_file(folder / "adapter" / "adapter_model.safetensors")
        moved[action] = torch.cat([(after[name] - before[name]).flatten() for name in before])
    assert moved["off"].norm() > 0
    torch.testing.assert_close(moved["lower_rate"], moved["off"] / 2, rtol=1e-3, atol=1e-8)


def test_a_warning_is_said_once_and_changes_nothing(
    sees_step_3: None, recipe: MakeRecipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    unwatched = prefold.train(recipe(guards={"kl_running_off": "off"}, output_dir=str(tmp_path / "off")))
    assert events(unwatched) == [] and "guard:" not in capfd.readouterr().err
    with stopped_at(5):
        prefold.train(recipe())
    folder = prefold.train(recipe())
    assert capfd.readouterr().err.count("guard: step 3: what it sees") == 1
    assert (folder / "run.log").read_text().count("what it sees") == 1
    assert (folder / "metrics.jsonl").read_bytes() == (unwatched / "metrics.jsonl").read_bytes()


def test_a_stop_may_be_turned_into_a_warning(sees_step_3: None, recipe: MakeRecipe, tmp_path: Path) -> None:
    warned = prefold.train(recipe(output_dir=str(tmp_path / "warned")))
    with pytest.raises(StageError, match=r"`guards\.kl_running_off`, lets it go on from its last checkpoint"):
        prefold.train(recipe(guards={"kl_running_off": "stop"}))
    assert_same_bytes(prefold.train(recipe()), warned)


def test_a_run_that_has_learnt_nothing_says_so(recipe: MakeRecipe, capfd: pytest.CaptureFixture[str]) -> None:
    folder = prefold.train(recipe(train={"learning_rate": 1e-9, "max_steps": 5}, lora={"lora_dropout": 0.0}))
    assert [event["guard"] for event in events(folder)] == ["undertrained"]
    assert "hardly anything was learnt in 5 steps" in " ".join(capfd.readouterr().err.split())
