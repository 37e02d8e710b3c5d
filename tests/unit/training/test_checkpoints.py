"""A checkpoint that is not whole, or not ours, is never loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from prefold.files import write_json
from prefold.training.checkpoints import flaw, last_checkpoint, read_manifest, step_of, write_manifest


def checkpoint(folder: Path, step: int, best: int | None = None) -> Path:
    found = folder / f"checkpoint-{step}"
    (found / "reference").mkdir(parents=True)
    for name in ("adapter_model.safetensors", "optimizer.pt", "reference/adapter_config.json"):
        (found / name).write_bytes(f"{name} {step}".encode() * 9)
    write_manifest(found, max_tokens=512, carried={"mean": 0.25}, best=best)
    return found


def truncate(path: Path) -> None:
    whole = (path / "optimizer.pt").read_bytes()
    (path / "optimizer.pt").write_bytes(whole[:40])


def flip(path: Path) -> None:
    whole = bytearray((path / "adapter_model.safetensors").read_bytes())
    whole[7] ^= 1
    (path / "adapter_model.safetensors").write_bytes(whole)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "optimizer.pt has 40 of 135 bytes": truncate,
    "adapter_model.safetensors is not what was written": flip,
    "reference/adapter_config.json is missing": lambda path: (path / "reference" / "adapter_config.json").unlink(),
    "scaler.pt does not belong to it": lambda path: (path / "scaler.pt").write_bytes(b"cos\nsystem\n"),
    "its list of files, prefold.json, is missing": lambda path: (path / "prefold.json").unlink(),
    "its list of files, prefold.json, is missing or cannot be read": lambda path: (path / "prefold.json").write_text(
        "{}"
    ),
}


@pytest.mark.parametrize("said", DAMAGE)
def test_a_broken_one_is_passed_over_and_said(said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before, newest = checkpoint(tmp_path, 4), checkpoint(tmp_path, 10)
    assert last_checkpoint(tmp_path) == newest and flaw(newest) == ""
    DAMAGE[said](newest)
    assert said in flaw(newest)
    assert last_checkpoint(tmp_path) == before
    assert f"checkpoint-10 is passed over: {said}" in " ".join(capfd.readouterr().err.split())
    assert not newest.exists() and (tmp_path / "broken-checkpoint-10").is_dir()
    assert last_checkpoint(tmp_path) == before


def test_a_checkpoint_whose_best_one_is_broken(tmp_path: Path) -> None:
    first, _, _ = checkpoint(tmp_path, 2, best=2), checkpoint(tmp_path, 4, best=4), checkpoint(tmp_path, 6, best=4)
    flip(tmp_path / "checkpoint-4")
    assert last_checkpoint(tmp_path) == first


def test_none_is_left(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "nowhere") is None
    flip(checkpoint(tmp_path, 2))
    assert last_checkpoint(tmp_path) is None
    assert step_of(None) == 0


def test_what_is_kept(tmp_path: Path) -> None:
    found = checkpoint(tmp_path, 2)
    assert read_manifest(found) == (512, {"mean": 0.25})
    assert json.loads((found / "prefold.json").read_text())["files"].keys() == {
        "adapter_model.safetensors",
        "optimizer.pt",
        "reference/adapter_config.json",
    }


def test_age_is_by_step_and_not_by_clock(tmp_path: Path) -> None:
    import os

    old, new = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    os.utime(old, (2e9, 2e9))
    os.utime(new, (0, 0))
    assert last_checkpoint(tmp_path) == new


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power failure may leave an empty one, which `guards.json` or `recipe.yaml` must not be."""
    import os

    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append("replace"), replace(old, new)))
    write_json(tmp_path / "guards.json", {"events": []})
    assert done == ["fsync", "replace"]
