"""Faults that a machine has: each is survived, or refused with one clear message. docs/runs.md has the table."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_files import lines
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

import prefold
from prefold.cli import explain, main
from prefold.errors import UserError
from prefold.files import locked
from prefold.recipe import RecipeBase, dump_recipe
from prefold.training.loop import TrainingLoop

MakeRecipe = Callable[..., RecipeBase]


def assert_same_bytes(found: Path, wanted: Path) -> None:
    for name in ("metrics.jsonl", "guards.json", "adapter/adapter_model.safetensors"):
        assert (found / name).read_bytes() == (wanted / name).read_bytes(), name


@pytest.fixture
def straight(recipe: MakeRecipe, tmp_path: Path) -> Path:
    return prefold.train(recipe(output_dir=str(tmp_path / "straight")))


# ---- signals ----------------------------------------------------------------------------------------------------


def signalled(monkeypatch: pytest.MonkeyPatch, number: int, times: int = 1) -> None:
    """The third step gets a signal while it is under way."""
    step = TrainingLoop.compute_gradients

    def interrupted(self: TrainingLoop, batch: Any) -> Any:
        if self.state.global_step == 2:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return step(self, batch)

    monkeypatch.setattr(TrainingLoop, "compute_gradients", interrupted)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_saves(
    recipe: MakeRecipe,
    straight: Path,
    tmp_path: Path,
    number: int,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = signal.signal(number, signal.default_int_handler)  # a shell may have had it ignored
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe()))
    monkeypatch.setattr(sys, "argv", ["prefold", "train", str(path)])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        signalled(patch, number)
        main()
    signal.signal(number, before)
    assert ended.value.code == code
    said = capfd.readouterr().err
    assert "stopping after this step, with a checkpoint" in said and "goes on from here" in said
    assert "Traceback" not in said
    folder = recipe().run_folder
    assert len(lines(folder)) == 3 and (folder / "checkpoints" / "checkpoint-3").is_dir()
    assert_same_bytes(prefold.train(recipe()), straight)


def test_a_second_signal_stops_at_once(recipe: MakeRecipe, straight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        signalled(patch, signal.SIGINT, times=2)
        prefold.train(recipe())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)
    assert len(lines(recipe().run_folder)) == 2
    assert_same_bytes(prefold.train(recipe()), straight)


# ---- the disk ---------------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_message_and_nothing_is_lost(
    recipe: MakeRecipe, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a checkpoint is written, by Python, by torch and by safetensors."""
    full = [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "optimizer.pt"),
        RuntimeError("[enforce fail at inline_container.cc:863] . PytorchStreamWriter failed writing file data/3"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ]
    for error in full:

        def fail(*args: Any, error: Exception = error) -> None:
            raise error

        with monkeypatch.context() as patch, pytest.raises(type(error)) as caught:
            patch.setattr("prefold.training.loop.save_states", fail)
            prefold.train(recipe())
        message, code = explain(caught.value)
        assert message.startswith("No space left on device") and "start again" in message and code == 1
        assert list((recipe().run_folder / "checkpoints").iterdir()) == []
    assert_same_bytes(prefold.train(recipe()), straight)


def test_a_disk_that_is_full_in_the_middle_of_a_line(
    recipe: MakeRecipe, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefold.training import record

    append = record._append

    def half(path: Path, line: dict[str, Any]) -> None:
        append(path, line)
        if line.get("step") == 3 and path.name == "metrics.jsonl":
            path.write_text(path.read_text()[:-20])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(record, "_append", half)
        prefold.train(recipe())
    assert_same_bytes(prefold.train(recipe()), straight)


def test_a_folder_that_cannot_be_written_any_more(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(recipe().run_folder / "merge.json"))

    monkeypatch.setattr("prefold.runs.merge.write_json", fail)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe()))
    monkeypatch.setattr(sys, "argv", ["prefold", "run", str(path)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capfd.readouterr().err
    assert ended.value.code == 1 and "Traceback" not in said
    assert "prefold: Read-only file system" in said and "to do: make room or mend the folder" in said


def test_what_a_killed_process_left_is_swept_and_does_not_block_the_folder(recipe: MakeRecipe) -> None:
    folder = recipe().run_folder
    folder.mkdir()
    dead = 2**22 + 1  # above the largest number that Linux gives a process
    (folder / f".recipe.yaml.{dead}.tmp").write_text("method: d")
    (folder / f".writable.{dead}").touch()
    (folder / f".merged.{dead}.tmp").mkdir()
    (folder / f".merged.{dead}.old.tmp").mkdir()
    (folder / f".adapter.{os.getppid()}.tmp").mkdir()  # of a process that is still there
    (folder / ".mine").touch()
    with pytest.raises(UserError, match="neither empty nor a run folder"):
        prefold.train(recipe())
    assert sorted(path.name for path in folder.iterdir()) == [f".adapter.{os.getppid()}.tmp", ".mine"]


def test_two_at_work_in_one_folder_are_one_too_many(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that is queued again, say, before the first one has ended: both would write `metrics.jsonl`."""
    monkeypatch.setattr("prefold.files.PATIENCE", 0.0)
    folder = recipe().run_folder
    folder.mkdir()
    with locked(folder, "run"):
        with pytest.raises(UserError, match="another process is at work in this folder"):
            prefold.train(recipe())
        assert list(folder.iterdir()) == []
    prefold.train(recipe())
    with locked(folder, "run"):
        prefold.report(recipe())  # of what there is, at any time


# ---- the best checkpoint and early stopping ---------------------------------------------------------------------


def no_adapter(*args: Any) -> None:
    raise KeyboardInterrupt


def test_a_run_that_early_stopping_ended_takes_no_further_step(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended once more, after its last checkpoint and before its adapter was there."""
    best = {"eval_steps": 1, "save_steps": 1, "metric_for_best_model": "loss", "early_stopping_patience": 2}
    settings = {**best, "max_steps": 40, "learning_rate": 1.0}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("prefold.runs.train.save_weights", no_adapter)
        prefold.train(recipe(train=settings))
    stopped = lines(recipe().run_folder)
    assert len(stopped) < 40
    assert lines(prefold.train(recipe(train=settings))) == stopped


def test_the_best_is_kept_between_two_checkpoints(recipe: MakeRecipe) -> None:
    """Measured at every step, saved at every fourth, and the rate soon does harm: the best is one of the others."""
    best = {"eval_steps": 1, "save_steps": 4, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    folder = prefold.train(recipe(train={**best, "max_steps": 8, "learning_rate": 3.0}))
    losses = {line["step"]: line["eval_loss"] for line in lines(folder)}
    step = min(losses, key=lambda step: losses[step])
    assert step % 4
    name = "adapter_model.safetensors"
    kept = folder / "checkpoints" / f"checkpoint-{step}" / name
    assert (folder / "adapter" / name).read_bytes() == kept.read_bytes()


def test_the_best_step_may_have_no_checkpoint(recipe: MakeRecipe) -> None:
    """Measured, but not wanted in the end, and one checkpoint kept."""
    settings = {"eval_steps": 1, "save_steps": 4, "save_total_limit": 1, "metric_for_best_model": "loss"}
    folder = prefold.train(recipe(train={**settings, "max_steps": 8, "learning_rate": 3.0}))
    losses = {line["step"]: line["eval_loss"] for line in lines(folder)}
    assert min(losses, key=lambda step: losses[step]) % 4
    assert [path.name for path in folder.glob("checkpoints/*")] == ["checkpoint-8"]


def test_a_run_that_has_moved_ends_with_its_best(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended after its last checkpoint, before its adapter was there."""
    best = {"eval_steps": 1, "save_steps": 4, "load_best_model_at_end": True}
    settings: dict[str, Any] = {"train": {**best, "max_steps": 8, "learning_rate": 0.3}}
    straight = prefold.train(recipe(**settings, output_dir=str(tmp_path / "straight")))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("prefold.runs.train.save_weights", no_adapter)
        prefold.train(recipe(**settings))
    recipe().run_folder.rename(tmp_path / "moved")
    assert_same_bytes(prefold.train(recipe(**settings, output_dir=str(tmp_path / "moved"))), straight)


def test_a_broken_new_best_leaves_the_one_before(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The second step is the best until the last: what was saved between them cannot be gone on from without it."""
    losses = {1: 0.6, 2: 0.4, 3: 0.5, 4: 0.5, 5: 0.5, 6: 0.3}

    def measured(self: TrainingLoop, held_out: object) -> dict[str, float]:
        return {"eval_loss": losses[self.state.global_step]}

    monkeypatch.setattr(TrainingLoop, "measure", measured)
    settings = {"eval_steps": 1, "save_steps": 4, "load_best_model_at_end": True}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("prefold.runs.train.save_weights", no_adapter)
        prefold.train(recipe(train=settings))
    (recipe().run_folder / "checkpoints" / "checkpoint-6" / "optimizer.pt").unlink()
    prefold.train(recipe(train=settings))
    said = " ".join(capfd.readouterr().err.split())
    assert "checkpoint-6 is passed over: optimizer.pt is missing" in said
    assert "going on after step 2" in said


# ---- checkpoints, weights, files --------------------------------------------------------------------------------


def test_a_truncated_checkpoint_is_passed_over(
    recipe: MakeRecipe, straight: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("prefold.runs.train.save_weights", no_adapter)
        prefold.train(recipe())
    newest = recipe().run_folder / "checkpoints" / "checkpoint-6" / "optimizer.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert_same_bytes(prefold.train(recipe()), straight)
    said = " ".join(capfd.readouterr().err.split())
    assert "checkpoint-6 is passed over: optimizer.pt has 1,000 of" in said
    assert "going on after step 4" in said


def test_a_missing_shard_of_the_base_is_refused(recipe: MakeRecipe, tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(sharded, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(sharded)
    shards = sorted(sharded.glob("model-*.safetensors"))
    shards[1].unlink()
    with pytest.raises(UserError, match=f"1 of {len(shards)} weight files are missing, e.g. {shards[1].name}"):
        prefold.run(recipe(model={"name": str(sharded)}))


def test_a_changed_base_is_refused(recipe: MakeRecipe, tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    prefold.train(recipe(model={"name": str(base)}))
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    for stage in (prefold.merge, prefold.run):
        with pytest.raises(UserError, match=r"base/model\.safetensors has changed"):
            stage(recipe(model={"name": str(base)}))


def test_the_same_weights_with_other_settings_are_another_base(
    recipe: MakeRecipe, tiny_model: Path, tmp_path: Path
) -> None:
    import shutil

    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    prefold.train(recipe(model={"name": str(base)}))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    with pytest.raises(UserError, match=r"base/config\.json has changed"):
        prefold.merge(recipe(model={"name": str(base)}))


def test_changed_data_is_shown_in_rows(recipe: MakeRecipe, pairs: Path) -> None:
    prefold.train(recipe())
    pairs.write_text("".join(pairs.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match=r"pairs\.jsonl: 20 rows when this run read it, 19 now"):
        prefold.run(recipe())


# ---- clock and trackers -----------------------------------------------------------------------------------------


def test_a_clock_that_jumps(recipe: MakeRecipe, straight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A year back at every look, with checkpoints that seem to be from the future."""
    now = [time.time() + 1e9]

    def jumping() -> float:
        now[0] -= 3e7
        return now[0]

    with monkeypatch.context() as patch:
        patch.setattr(time, "time", jumping)
        signalled(patch, signal.SIGINT)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt):
            prefold.train(recipe())
        signal.signal(signal.SIGINT, before)
    checkpoints = recipe().run_folder / "checkpoints"
    os.utime(checkpoints / "checkpoint-2", (4e9, 4e9))
    os.utime(checkpoints / "checkpoint-3", (0, 0))
    assert_same_bytes(prefold.train(recipe()), straight)


@pytest.mark.parametrize("when", ["init", "log"])
def test_a_tracker_that_is_down_costs_no_run(
    when: str, recipe: MakeRecipe, straight: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import wandb

    def down(*args: Any, **settings: Any) -> None:
        raise wandb.errors.CommError("no answer from a-server-with-a-secret")

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    # Once it runs, the client puts other functions in the place of its own.
    from transformers.integrations.integration_utils import WandbCallback

    monkeypatch.setattr(*((wandb, "init") if when == "init" else (WandbCallback, "on_log")), down)
    folder = prefold.train(recipe(train={"report_to": ["wandb"]}))
    said = " ".join(capfd.readouterr().err.split())
    assert said.count("wandb failed (CommError); the run goes on without it") == 1 and "secret" not in said
    assert_same_bytes(folder, straight)


def test_a_tracker_that_is_not_installed(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    with pytest.raises(UserError, match="`wandb` is not installed"):
        prefold.train(recipe(train={"report_to": ["wandb"]}))
