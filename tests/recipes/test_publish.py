"""Publishing as the last stage of a run, and as a command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from upload_hub import TOKEN, UploadHub, uploads_to

import prefold
from prefold.cli import main
from prefold.errors import StageError, UserError
from prefold.recipe import RecipeBase, dump_recipe

MakeRecipe = Callable[..., RecipeBase]
NAME = "somebody/tiny"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    with uploads_to(monkeypatch) as server:
        yield server


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["prefold", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_a_run_ends_with_a_card_and_published(recipe: MakeRecipe, hub: UploadHub, tmp_path: Path) -> None:
    wanted = recipe(publish={"hub_model_id": NAME, "to": str(tmp_path / "out"), "what": ["merged", "adapter"]})
    folder = prefold.run(wanted)
    pushed = hub.repositories[NAME].branches["main"]
    assert pushed["model.safetensors"] == (folder / "merged" / "model.safetensors").read_bytes()
    assert pushed["README.md"] == (tmp_path / "out" / "README.md").read_bytes()
    card = pushed["README.md"].decode()
    heldout = json.loads((folder / "evaluation" / "heldout.json").read_text())
    assert f"{heldout['pairs']} pairs" in card and "pairs.jsonl" in card and str(tmp_path) not in card
    assert not any(TOKEN.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert json.loads((folder / "merge.json").read_text())["provenance"]["base"]["hub_id"] is None
    prefold.run(wanted)
    assert len(hub.repositories[NAME].commits) == 1


def test_every_run_has_a_card_and_can_be_published_later(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = prefold.run(recipe())
    assert (folder / "merged" / "README.md").read_text().startswith("---\n")
    with pytest.raises(UserError, match="does not say where to publish"):
        prefold.publish(str(folder))
    target = str(tmp_path / "out")
    capfd.readouterr()
    assert call(monkeypatch, "publish", str(folder), f"publish.to={target}", "--dry-run") == 0
    shown = capfd.readouterr().out
    assert "model.safetensors" in shown and "kB" in shown and "to folder:" in shown
    assert not Path(target).exists() and not (folder / "publish.json").exists()
    assert call(monkeypatch, "publish", str(folder), f"publish.to={target}", "--json") == 0
    assert {file["name"] for file in json.loads(capfd.readouterr().out)["files"]} == {
        path.name for path in Path(target).iterdir()
    }
    (folder / "adapter" / "new").touch()
    assert prefold.publish(str(folder), [f"publish.to={target}"])["folder"] == target


def test_a_missing_token_stops_before_training(
    recipe: MakeRecipe,
    tmp_path: Path,
    hub: UploadHub,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    wanted = recipe(publish={"hub_model_id": NAME})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(wanted))
    for command in ("run", "check"):
        assert call(monkeypatch, command, str(tmp_path / "recipe.yaml")) == 2
        said = capfd.readouterr().err
        assert "there is no token for the Hub" in said and "Traceback" not in said
    assert not (wanted.run_folder / "data.json").exists() and not (wanted.run_folder / "adapter").exists()


def test_an_unfinished_run_is_not_published(recipe: MakeRecipe, tmp_path: Path) -> None:
    wanted = recipe(publish={"to": str(tmp_path / "out")})
    prefold.train(wanted)
    with pytest.raises(UserError, match="`publish` needs the output of `merge`"):
        prefold.publish(wanted)
    with pytest.raises(UserError, match="was not checked"):
        prefold.publish(wanted, dry_run=True)


def test_checkpoints_are_pushed_while_training(recipe: MakeRecipe, hub: UploadHub) -> None:
    folder = prefold.run(recipe(publish={"hub_model_id": NAME, "checkpoints": True, "commit_message": "The result"}))
    branches = hub.repositories[NAME].branches
    weights = (folder / "checkpoints" / "checkpoint-6" / "adapter_model.safetensors").read_bytes()
    assert branches["checkpoints"]["adapter_model.safetensors"] == weights
    assert {"adapter_config.json", "tokenizer.json", "chat_template.jinja"} <= branches["checkpoints"].keys()
    assert not {"optimizer.pt", "prefold.json", "trainer_state.json"} & branches["checkpoints"].keys()
    assert "adapter_model.safetensors" not in branches["main"] and "model.safetensors" in branches["main"]
    said = [str(commit) for commit in hub.repositories[NAME].commits]
    assert len(said) == 4 and "Step 2" in said[0] and "Step 6" in said[2] and "The result" in said[3]


def test_a_checkpoint_that_cannot_be_pushed_costs_nothing_else(
    recipe: MakeRecipe, hub: UploadHub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object) -> None:
        raise StageError("the connection to the Hub broke")

    monkeypatch.setattr("prefold.publishing.hub.push", refuse)
    folder = prefold.train(recipe(publish={"hub_model_id": NAME, "checkpoints": True}))
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    said = " ".join(capfd.readouterr().err.split())
    assert "checkpoint-2 was not pushed, and the run goes on: the connection to the Hub broke" in said
    assert "checkpoint-6 was not pushed" in (folder / "run.log").read_text()
