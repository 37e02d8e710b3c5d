"""The real clients of trackers, offline: a run that goes on does so in the tracker's run and sends no step twice."""

from __future__ import annotations

import json
import os
import secrets
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import prefold
from prefold.recipe import RecipeBase
from prefold.training.record import StepRecord

PROJECT = f"project-{secrets.token_hex(4)}"
"""Trackio keeps its projects in one folder for all runs."""


def of_wandb(folder: Path) -> tuple[set[str], list[int]]:
    from wandb.proto.wandb_internal_pb2 import Record

    ids, steps = set(), []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        ids.add(path.stem.removeprefix("run-"))
        for data in logged(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if "train/loss" in values:
                steps.append(int(json.loads(values["train/global_step"])))
    return ids, steps


def logged(content: bytes, block: int = 2**15, head: int = 7) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, whose blocks hold pieces: checksum, length, type, data."""
    at, record = head, b""
    while at + head <= len(content):
        if block - at % block < head:
            at += block - at % block
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        record += content[at + head : at + head + length]
        at += head + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def of_tensorboard(folder: Path) -> tuple[set[str], list[int]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {"tensorboard"}, [event.step for event in events.Scalars("train/loss")]


def of_mlflow(folder: Path) -> tuple[set[str], list[int]]:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
    [experiment] = [each for each in client.search_experiments() if each.name == PROJECT]
    runs = client.search_runs([experiment.experiment_id])
    history = [point for run in runs for point in client.get_metric_history(run.info.run_id, "loss")]
    assert {run.info.status for run in runs} == {"FINISHED"}
    return {run.info.run_id for run in runs}, [point.step for point in history]


def of_trackio(folder: Path, project: str = PROJECT) -> tuple[set[str], list[int]]:
    from trackio.sqlite_storage import SQLiteStorage

    names = SQLiteStorage.get_runs(project)
    rows = [row for name in names for row in SQLiteStorage.get_logs(project, name)]
    return set(names), [row["train/global_step"] for row in rows if "train/loss" in row]


MakeRecipe = Callable[..., RecipeBase]


MakeRecipe = Callable[..., RecipeBase]


READERS: dict[str, Callable[[Path], tuple[set[str], list[int]]]] = {
    "wandb": of_wandb,
    "tensorboard": of_tensorboard,
    "mlflow": of_mlflow,
    "trackio": of_trackio,
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    settings |= {"TRACKIO_DIR": str(tmp_path / "trackio")}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)


def interrupt(patch: pytest.MonkeyPatch, step: int) -> None:
    """After that step is sent, and before it is in a checkpoint."""
    kept = StepRecord.step

    def stops(self: StepRecord, number: int, metrics: dict[str, float]) -> None:
        if number > step:
            raise KeyboardInterrupt
        kept(self, number, metrics)

    patch.setattr(StepRecord, "step", stops)


@pytest.mark.parametrize("name", READERS)
def test_a_run_that_goes_on_sends_no_step_twice(
    recipe: MakeRecipe, name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {"report_to": [name], "project": PROJECT, "run_name": "some-run", "max_steps": 4, "save_steps": 2}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, step=3)
        prefold.train(recipe(train=settings))
    folder = prefold.train(recipe(train=settings))
    assert "failed" not in capfd.readouterr().err
    ids, steps = READERS[name](folder)
    assert steps == [1, 2, 3, 4] and len(ids) == 1
    assert not [name for name in os.environ if name.endswith("_RUN_ID")]


def test_a_run_that_starts_over_is_another_run(recipe: MakeRecipe) -> None:
    settings = {"report_to": ["trackio"], "project": f"{PROJECT}-2", "max_steps": 2}
    folders = [prefold.run(recipe(train=settings), fresh=True) for _ in range(2)]
    ids, steps = of_trackio(folders[-1], f"{PROJECT}-2")
    assert len(ids) == 2 and sorted(steps) == [1, 1, 2, 2]


def test_an_address_that_is_set_stays(recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    folder = prefold.train(recipe(train={"report_to": ["mlflow"], "project": PROJECT, "max_steps": 2}))
    assert not (folder / "mlflow.db").exists() and of_mlflow(tmp_path)[1] == [1, 2]
