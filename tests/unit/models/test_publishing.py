"""Publishing a run: the files arrive whole, where and as the recipe says, by the real client against a local hub."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from exportable import byte_level, save_model
from huggingface_hub import constants
from upload_hub import TOKEN, UploadHub, uploads_to

from prefold.errors import StageError, UserError
from prefold.publishing import gguf as export
from prefold.publishing import publish as publishing
from prefold.publishing.files import items_of
from prefold.publishing.publish import planned, publish_run, require_ready
from prefold.recipe import Publish, make_recipe

NAME = "somebody/tiny-DPO"
RECIPE = {
    "method": "dpo",
    "model": {"name": "org/base"},
    "lora": {"r": 4},
    "data": {"train": [{"path": "/secret/place/pairs.jsonl"}]},
    "dpo": {"beta": 0.1},
    "output_dir": "runs/tiny",
}
CHECKED = {"relative_difference": 1e-7, "tolerance": 1e-4, "dtype": "float32"}
SAMPLE = {"prompt": [{"role": "user", "content": "It's 1234"}], "before": ["no"], "after": ["the hat"]}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    with uploads_to(monkeypatch) as server:
        yield server


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run."""
    monkeypatch.setattr(export, "free_memory", lambda: None)
    monkeypatch.setenv("PREFOLD_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "run"
    save_model(folder / "merged")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"a" * 5000)
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "adapter" / "README.md").write_text("peft's own card")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "merge.json").write_text(json.dumps(CHECKED))
    (folder / "samples.jsonl").write_text(json.dumps(SAMPLE) + "\n")
    (folder / "run.log").write_text("")
    return folder


def publish(run: Path, **settings: Any) -> dict[str, Any]:
    section = Publish(**settings)
    (run / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"publish": section.model_dump()}))
    publish_run(run, section)
    return dict(json.loads((run / "publish.json").read_text()))


def failed(run: Path, kind: type[Exception], **settings: Any) -> str:
    with pytest.raises(kind) as caught:
        publish(run, **settings)
    assert TOKEN not in str(caught.value) and "127.0.0.1" not in str(caught.value)
    assert not (run / "publish.json").exists()
    return str(caught.value)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# ---- the Hub ----------------------------------------------------------------------------------------------------


def test_the_files_arrive_byte_for_byte(run: Path, hub: UploadHub) -> None:
    done = publish(run, hub_model_id=NAME)
    repository = hub.repositories[NAME]
    assert repository.private
    assert repository.branches["main"] == contents(run / "merged")
    assert {"tokenizer.json", "chat_template.jinja", "README.md", "model.safetensors"} <= set(
        repository.branches["main"]
    )
    [commit] = repository.commits
    assert commit["summary"].startswith("DPO of org/base, by prefold")
    assert done["commit"] == "1".zfill(40) and done["hub_model_id"] == NAME
    assert {file["name"]: file["bytes"] for file in done["files"]} == {
        name: len(data) for name, data in repository.branches["main"].items()
    }


def test_settings_arrive(run: Path, hub: UploadHub) -> None:
    publish(run, hub_model_id=NAME, private=False, tags=["plain words"], branch="v2", commit_message="Second try")
    repository = hub.repositories[NAME]
    assert not repository.private and repository.branches["main"] == {}
    assert repository.branches["v2"].keys() == contents(run / "merged").keys()
    assert repository.commits[0]["summary"] == "Second try"


def test_parts_lie_apart(run: Path, hub: UploadHub) -> None:
    publish(run, hub_model_id=NAME, what=["merged", "adapter", "gguf"], gguf=["F16"])
    files = hub.repositories[NAME].branches["main"]
    assert files["adapter/adapter_model.safetensors"] == b"a" * 5000
    assert files["adapter/tokenizer.json"] == files["tokenizer.json"]
    assert files["tiny-DPO-F16.gguf"] == (run / "gguf" / "tiny-DPO-F16.gguf").read_bytes()
    assert {name for name in files if name.endswith("README.md")} == {"README.md"}
    assert b"tiny-DPO-F16.gguf" in files["README.md"] and b"AutoPeftModel" in files["README.md"]


def test_an_adapter_alone_has_its_tokenizer(run: Path, hub: UploadHub) -> None:
    publish(run, hub_model_id=NAME, what=["adapter"])
    files = hub.repositories[NAME].branches["main"]
    assert set(files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert b"library_name: peft" in files["README.md"]


def test_a_short_break_is_not_noticed(run: Path, hub: UploadHub) -> None:
    hub.breaks = 1
    publish(run, hub_model_id=NAME)
    assert len(hub.broken) == 1 and hub.repositories[NAME].branches["main"] == contents(run / "merged")


def test_a_push_that_broke_goes_on_and_sends_nothing_twice(run: Path, hub: UploadHub) -> None:
    """Two large files; the connection is lost for good after the first."""
    (run / "merged" / "extra.safetensors").write_bytes((run / "merged" / "model.safetensors").read_bytes())
    save_model(run / "other", rows=400)
    (run / "merged" / "extra.safetensors").write_bytes((run / "other" / "model.safetensors").read_bytes())
    publishing_one_by_one(hub)
    message = failed(run, StageError, hub_model_id=NAME)
    assert "the connection to the Hub broke" in message and "continues from there" in message
    assert hub.repositories[NAME].branches["main"] == {}, "half a model is no model"
    arrived = list(hub.sent)
    assert len(arrived) >= 1 and hub.broken
    hub.breaks = 0
    publish(run, hub_model_id=NAME)
    assert hub.repositories[NAME].branches["main"] == contents(run / "merged")
    assert len(hub.sent) == len(set(hub.sent)), "a file was sent twice"
    assert set(arrived) < set(hub.sent)


def publishing_one_by_one(hub: UploadHub) -> None:
    """Lets the first large file through and breaks every later one, however often it is tried."""
    handle = hub.RequestHandlerClass
    put = handle.do_PUT  # type: ignore[attr-defined]

    def do_put(self: Any) -> None:
        if hub.sent and hub.breaks == 0 and not getattr(hub, "healed", False):
            hub.breaks, hub.healed = 1000, True  # type: ignore[attr-defined]
        put(self)

    hub.RequestHandlerClass = type("Breaking", (handle,), {"do_PUT": do_put})


def test_publishing_again_changes_nothing(run: Path, hub: UploadHub) -> None:
    first = publish(run, hub_model_id=NAME)
    sent = list(hub.sent)
    assert publish(run, hub_model_id=NAME) == first
    assert hub.sent == sent and len(hub.repositories[NAME].commits) == 1


def test_only_what_changed_is_sent(run: Path, hub: UploadHub) -> None:
    publish(run, hub_model_id=NAME)
    sent = list(hub.sent)
    publish(run, hub_model_id=NAME, tags=["new"])
    assert hub.sent == sent and hub.repositories[NAME].commits[1]["changed"] == 1
    assert b"- new" in hub.repositories[NAME].branches["main"]["README.md"]


def test_weights_of_an_earlier_model_go(run: Path, hub: UploadHub) -> None:
    publish(run, hub_model_id=NAME)
    files = hub.repositories[NAME].branches["main"]
    files |= {"model-00001-of-00002.safetensors": b"x", "model.safetensors.index.json": b"{}", "notes.txt": b"keep"}
    publish(run, hub_model_id=NAME)
    assert set(files) == {*contents(run / "merged"), "notes.txt"}


def test_a_pull_request_is_opened_once(run: Path, hub: UploadHub) -> None:
    first = publish(run, hub_model_id=NAME, create_pr=True)
    repository = hub.repositories[NAME]
    assert first["pull_request"] == "refs/pr/1" and repository.branches["main"] == {}
    assert repository.branches["refs/pr/1"] == contents(run / "merged")
    assert publish(run, hub_model_id=NAME, create_pr=True)["pull_request"] == "refs/pr/1"
    assert publish(run, hub_model_id=NAME, create_pr=True, tags=["new"])["pull_request"] == "refs/pr/1"
    assert len(repository.commits) == 2 and "refs/pr/2" not in repository.branches
    repository.open.clear()  # it was closed
    assert publish(run, hub_model_id=NAME, create_pr=True)["pull_request"] == "refs/pr/2"


def test_the_token_is_in_no_file_and_no_log(
    run: Path, hub: UploadHub, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    publish(run, hub_model_id=NAME)
    assert not any(TOKEN.encode() in data for data in contents(run).values())
    assert not any(TOKEN.encode() in data for data in hub.repositories[NAME].branches["main"].values())
    assert TOKEN not in "".join(capfd.readouterr()) and TOKEN not in caplog.text


def test_nothing_of_this_machine_goes_out(run: Path, hub: UploadHub) -> None:
    publish(run, hub_model_id=NAME)
    for data in hub.repositories[NAME].branches["main"].values():
        assert str(run).encode() not in data and b"/secret/place" not in data
    assert b"pairs.jsonl" in hub.repositories[NAME].branches["main"]["README.md"]


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_is_refused(run: Path, hub: UploadHub, status: int) -> None:
    hub.refuses = status
    message = failed(run, UserError, hub_model_id=NAME)
    assert f"HTTP {status}" in message and "hf auth login" in message and NAME in message


def test_a_hub_that_fails(run: Path, hub: UploadHub) -> None:
    hub.refuses = 507
    assert "HTTP 507" in failed(run, StageError, hub_model_id=NAME)


def test_a_hub_that_cannot_be_reached(run: Path, hub: UploadHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the connection to the Hub broke (ConnectError)" in failed(run, StageError, hub_model_id=NAME)


def test_a_public_repository_gets_no_private_model(run: Path, hub: UploadHub) -> None:
    publish(run, hub_model_id=NAME, private=False)
    (run / "publish.json").unlink()
    before = dict(hub.repositories[NAME].branches["main"])
    assert "is public" in failed(run, UserError, hub_model_id=NAME, tags=["new"])
    assert hub.repositories[NAME].branches["main"] == before


# ---- a folder ---------------------------------------------------------------------------------------------------


def test_a_folder_gets_the_same_files(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "model"
    done = publish(run, to=str(target), what=["merged", "adapter"])
    assert contents(target).keys() == {file["name"] for file in done["files"]}
    assert contents(target)["model.safetensors"] == contents(run / "merged")["model.safetensors"]
    publish(run, to=str(target), what=["merged"])
    assert contents(target) == contents(run / "merged"), "it is replaced as a whole"


def test_a_folder_of_others_is_left_alone(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "README.md").write_text("mine")
    (target / "thesis.tex").write_text("mine")
    assert "e.g. thesis.tex" in failed(run, UserError, to=str(target))
    assert (target / "thesis.tex").read_text() == "mine"
    assert "is a file" in failed(run, UserError, to=str(target / "thesis.tex"))


def test_a_folder_appears_whole_or_not_at_all(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[str] = []

    def full(source: Path, target: Path) -> None:
        copied.append(str(target))
        if len(copied) == 3:
            raise OSError(28, "No space left on device")
        target.write_bytes(source.read_bytes())

    monkeypatch.setattr("prefold.publishing.publish.shutil.copyfile", full)
    target = tmp_path / "out" / "model"
    assert "No space left on device" in failed(run, UserError, to=str(target))
    assert len(copied) == 3 and list((tmp_path / "out").iterdir()) == []


# ---- what is not published --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        (None, "was not checked"),
        ({}, "was not checked"),
        ({"relative_difference": 0.5, "tolerance": 1e-4}, "failed its check: logits differ by 0.5"),
        ({"relative_difference": float("nan"), "tolerance": 1e-4}, "failed its check"),
    ],
)
def test_a_merge_that_was_not_proven(run: Path, tmp_path: Path, merge: Any, message: str) -> None:
    (run / "merge.json").unlink()
    if merge is not None:
        (run / "merge.json").write_text(json.dumps(merge))
    error = failed(run, UserError, to=str(tmp_path / "out"))
    assert message in error and "prefold merge" in error
    with pytest.raises(UserError):
        planned(run, Publish(to=str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("file", "size", "message"),
    [
        ("model.safetensors", None, "holds no"),
        ("model.safetensors", 3000, "model.safetensors is damaged"),
        ("config.json", None, "config.json is missing"),
        ("tokenizer.json", None, "has no tokenizer"),
    ],
)
def test_an_incomplete_model(run: Path, tmp_path: Path, file: str, size: int | None, message: str) -> None:
    path = run / "merged" / file
    os.truncate(path, size) if size else path.unlink()
    assert message in failed(run, UserError, to=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# ---- before -----------------------------------------------------------------------------------------------------


def recipe(tmp_path: Path, **publish: Any) -> Any:
    save_model(tmp_path / "base")
    values = RECIPE | {"model": {"name": str(tmp_path / "base")}, "publish": publish}
    return make_recipe(values)


def test_a_missing_token_is_told_before_training(
    tmp_path: Path, hub: UploadHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_ready(recipe(tmp_path, hub_model_id=NAME))
    assert hub.repositories == {}, "nothing was asked of the Hub"
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with pytest.raises(UserError, match="there is no token for the Hub") as caught:
        require_ready(recipe(tmp_path, hub_model_id=NAME))
    assert "HF_TOKEN" in caught.value.advice and "publish.to" in caught.value.advice
    require_ready(recipe(tmp_path, to=str(tmp_path / "out")))


def test_offline_is_told_before_training(tmp_path: Path, hub: UploadHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        require_ready(recipe(tmp_path, hub_model_id=NAME))


def test_a_model_without_gguf_is_told_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="llama-quantize"):
        require_ready(recipe(tmp_path, to=str(tmp_path / "out"), what=["gguf"], gguf=["Q4_K_M"]))


def test_a_dry_run_lists_every_file(run: Path, tmp_path: Path) -> None:
    before = contents(run)
    section = Publish(to=str(tmp_path / "out"), what=["merged", "adapter", "gguf"], gguf=["F16", "Q4_K_M"])
    found = planned(run, section)
    assert contents(run) == before and not (tmp_path / "out").exists()
    sizes = {file["name"]: file["bytes"] for file in found["files"]}
    assert sizes["model.safetensors"] == (run / "merged" / "model.safetensors").stat().st_size
    assert found["folder"] == str(tmp_path / "out")
    publish(run, to=str(tmp_path / "out"), what=["merged", "adapter", "gguf"], gguf=["F16"])
    there = {name: len(data) for name, data in contents(tmp_path / "out").items()}
    assert sizes.keys() - there.keys() == {"run-Q4_K_M.gguf"}
    assert sizes["run-Q4_K_M.gguf"] < sizes["run-F16.gguf"] < there["run-F16.gguf"]
    assert {name for name in there if there[name] != sizes[name]} <= {"run-F16.gguf", "README.md"}


def test_names_do_not_clash(run: Path) -> None:
    names = [item.name for item in items_of(run, Publish(to="x", what=["merged", "adapter"]))]
    assert len(names) == len(set(names))


def test_texts_to_compare_are_the_models_own(run: Path) -> None:
    texts = publishing.compared_texts(run, byte_level("smollm"))
    assert texts == ["<|im_start|>user\nIt's 1234<|im_end|>\n<|im_start|>assistant\nthe hat<|im_end|>\n"]
    (run / "samples.jsonl").unlink()
    assert len(publishing.compared_texts(run, byte_level("smollm"))) == 1
