"""Models from the hub, with the real client against a hub on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from hub_server import COMMIT, FakeHub
from huggingface_hub import constants
from json_server import running
from tiny_tokenizer import save_chat_model

from prefold.errors import UserError
from prefold.models.fetch import fetch
from prefold.models.load import require_model
from prefold.recipe import Model

SECRET = "hf_averysecrettoken"
WHOLE = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"[]", "chat_template.jinja": b"x"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with running(FakeHub()) as server:
        point_at(server.address, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_TOKEN", SECRET)
        yield server


def point_at(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def refused(name: str, revision: str | None = None) -> UserError:
    with pytest.raises(UserError) as caught:
        fetch(name, revision)
    assert SECRET not in str(caught.value) and "127.0.0.1" not in str(caught.value)
    assert caught.value.where == name
    return caught.value


def test_a_model_is_downloaded_without_pickles_and_without_other_formats(hub: FakeHub) -> None:
    unwanted = ["pytorch_model.bin", "consolidated.safetensors", "onnx/model.safetensors", "run.py", "model.gguf"]
    hub.repositories["org/model"] = WHOLE | dict.fromkeys(unwanted, b"unwanted") | {"tokenizer.model": b"pieces"}
    folder = fetch("org/model")
    assert {file.name for file in folder.iterdir()} == {*WHOLE, "tokenizer.model"}
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert set(hub.downloads) == {*WHOLE, "tokenizer.model"}


def test_a_model_in_the_cache_needs_no_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["org/model"] = WHOLE
    folder = fetch("org/model", COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch("org/model", COMMIT) == folder


def test_a_gated_model_names_the_page_and_an_open_mirror(hub: FakeHub) -> None:
    for name in ("org/gated", "meta-llama/Meta-Llama-3-8B"):
        hub.repositories[name] = WHOLE
        hub.refuses[name] = (403, "GatedRepo")
    error = refused("org/gated")
    assert "gated" in error.what and "https://huggingface.co/org/gated" in error.advice
    assert "hf auth login" in error.advice and "HF_TOKEN" in error.advice and "mirror" not in error.advice
    assert "NousResearch/Meta-Llama-3-8B" in refused("meta-llama/Meta-Llama-3-8B").advice


@pytest.mark.parametrize("name", ["org/nothing", "nothing", "not a name"])
def test_an_unknown_model(hub: FakeHub, name: str) -> None:
    error = refused(name)
    assert "nor a model on the hub" in error.what and "spelling" in error.advice


def test_an_unknown_revision(hub: FakeHub) -> None:
    hub.repositories["org/model"] = WHOLE
    error = refused("org/model", "v9")
    assert "no revision `v9`" in error.what and "model.revision" in error.advice


@pytest.mark.parametrize(("status", "wanted"), [(403, "your token"), (503, "later")])
def test_a_hub_that_refuses(hub: FakeHub, status: int, wanted: str) -> None:
    hub.refuses_listing["org/model"] = (status, "")
    error = refused("org/model")
    assert f"HTTP {status}" in error.what and wanted in error.advice


def test_a_hub_that_cannot_be_reached(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at("http://127.0.0.1:9", monkeypatch)
    error = refused("org/model")
    assert "cannot be reached" in error.what and "HF_HUB_OFFLINE=1" in error.advice and "pypi:" in error.advice


def test_offline_mode_is_named(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refused("org/model")
    assert "HF_HUB_OFFLINE is set" in error.what and "unset it" in error.advice


def test_a_proxy_that_fails(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise httpx2.ProxyError(f"https://user:{SECRET}@proxy")

    monkeypatch.setattr("prefold.models.fetch.snapshot_download", fail)
    assert "cannot be reached (ProxyError)" in refused("org/model").what


def test_a_full_disk_is_not_called_a_network_failure(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("prefold.models.fetch.snapshot_download", full)
    error = refused("org/model")
    assert "No space left on device" in error.what and "HF_HOME" in error.advice


def test_repositories_without_safetensors(hub: FakeHub) -> None:
    hub.repositories["org/pickled"] = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    assert "no *.safetensors" in refused("org/pickled").what and "pytorch_model.bin" not in hub.downloads
    hub.repositories["org/adapter"] = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}
    assert "is an adapter" in refused("org/adapter").what


def test_a_look_at_a_model_downloads_no_weights(hub: FakeHub, tmp_path: Path) -> None:
    files = {file.name: file.read_bytes() for file in save_chat_model(tmp_path / "model").iterdir()}
    hub.repositories["org/model"] = files
    require_model(Model(name="org/model"))
    assert "config.json" in hub.downloads and "model.safetensors" not in hub.downloads
    hub.repositories["org/pickled"] = {**files, "pytorch_model.bin": files.pop("model.safetensors")}
    del hub.repositories["org/pickled"]["model.safetensors"]
    with pytest.raises(UserError, match="org/pickled: holds pickled weights only"):
        require_model(Model(name="org/pickled"))
