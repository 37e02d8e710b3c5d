"""What docs/security.md promises, on whole runs and on the source."""

from __future__ import annotations

import ast
import json
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import prefold
from prefold.errors import UserError
from prefold.recipe import RecipeBase, dump_recipe, load_recipe, make_recipe
from prefold.training.loop import TrainingLoop

MakeRecipe = Callable[..., RecipeBase]
SOURCES = sorted(Path(prefold.__file__).parent.rglob("*.py"))
SECRETS = {
    "HF_TOKEN": "hf_plantedplantedplantedplanted1234",
    "WANDB_API_KEY": "a1b2c3d4e5f60718293a4b5c6d7e8f9001122334",
    "OPENAI_API_KEY": "sk-planted-00112233445566778899",
    "SOME_OTHER_PASSWORD": "zq9-planted-xkcd-936",
}


# ---- secrets ----------------------------------------------------------------------------------------------------


def assert_free_of_secrets(folder: Path, *texts: str) -> None:
    for path in (path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        assert not [name for name, secret in SECRETS.items() if secret.encode() in content], path
    for text in texts:
        assert not [name for name, secret in SECRETS.items() if secret in text]


def test_no_secret_reaches_a_file_or_the_terminal(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Trackers, checkpoints and the run's own log included."""
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = prefold.run(recipe(train={"report_to": ["wandb", "tensorboard"], "max_steps": 3}))
    assert list(folder.glob("wandb/offline-run-*")) and list(folder.glob("tensorboard/**/events*"))
    assert_free_of_secrets(tmp_path, *capfd.readouterr())


def test_no_secret_reaches_the_message_of_a_failure(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from prefold.cli import main

    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe(model={"name": "some/model-that-is-not-there"})))
    monkeypatch.setattr(sys, "argv", ["prefold", "run", str(tmp_path / "recipe.yaml")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert_free_of_secrets(tmp_path, *capfd.readouterr())


def test_a_password_in_an_address_is_written_nowhere(recipe: MakeRecipe, tmp_path: Path) -> None:
    """The run folder gets the recipe before anybody looks at the judge."""
    judge = {"endpoint": f"http://me:{SECRETS['OPENAI_API_KEY']}@localhost/v1", "model": "m"}
    with pytest.raises(UserError, match="holds a password") as caught:
        prefold.run(recipe(evaluate={"win_rate": {"judge": judge}}))
    assert_free_of_secrets(tmp_path, str(caught.value))


def test_the_password_of_a_mirror_reaches_no_message(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HF_ENDPOINT may hold one, and clients quote the address that failed."""
    import datasets

    from prefold.cli import explain

    error = OSError(f"404 Client Error: Not Found for url: https://me:{SECRETS['HF_TOKEN']}@mirror.example/api")

    def fail(*args: Any, **settings: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"Not Found for url: https://mirror\.example/api") as caught:
        prefold.run(recipe(data={"train": [{"path": "some/pairs"}]}))
    assert_free_of_secrets(tmp_path, str(caught.value), explain(RuntimeError(str(error)))[0])


# ---- the network ------------------------------------------------------------------------------------------------


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is looked up or connected to from Python; nothing gets through. The Hub's offline mode is off."""
    found: list[str] = []

    def refuse(name: str) -> Callable[..., Any]:
        def refused(*args: Any, **settings: Any) -> Any:
            found.append(f"{name}{args[-2:]!r}")
            raise OSError("no network in this test")

        return refused

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse(name))
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse(name))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    yield found


def test_a_run_connects_to_nothing(reached: list[str], recipe: MakeRecipe) -> None:
    prefold.run(recipe(train={"report_to": ["tensorboard"], "max_steps": 2}))
    assert reached == []


def test_the_counting_counts(reached: list[str], recipe: MakeRecipe) -> None:
    with pytest.raises(UserError, match="cannot be reached"):
        prefold.check(recipe(model={"name": "some/model-that-is-not-there"}))
    assert reached


# ---- code and pickles -------------------------------------------------------------------------------------------


def test_the_source_has_no_door_for_code() -> None:
    """No pickle or torch.load of our own, no eval or exec, YAML by safe loaders, no archive but one pinned wheel.

    The processes of one run pickle what they tell one another, as torch's own exchange of objects does.
    """
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            where = f"{path.name}, line {getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
                assert not names & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "tarfile"}, where
                assert "zipfile" not in names or path.name == "fetch.py", where
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if path.name == "ranks.py" and called == "torch.load":
                    assert ast.unparse(node.args[0]) == "io.BytesIO(content)", where
                    continue
                # What training goes on from: tensors and plain values, which that reader is held to.
                if path.name == "saved_state.py" and called == "torch.load":
                    assert any(keyword.arg == "weights_only" for keyword in node.keywords), where
                    called = ""
                assert called not in {"eval", "exec", "torch.load", "compile", "os.system"}, where
                assert not called.endswith(("extractall", "unpack_archive")), where
                assert called != "yaml.load" or ast.unparse(node).endswith("Loader=_Loader)"), where
                for keyword in node.keywords:
                    value = getattr(keyword.value, "value", None)
                    assert keyword.arg != "trust_remote_code" or value is False, where
                    assert keyword.arg != "weights_only" or value is True, where
                    assert keyword.arg != "shell" or value is False, where
    from prefold.recipe.text import _Loader
    from prefold.reports import run_files

    assert issubclass(_Loader, yaml.SafeLoader)
    assert run_files._Loader is getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def test_yaml_builds_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"method: !!python/object/apply:pathlib.Path.touch [{tmp_path}/touched]\n")
    with pytest.raises(UserError, match=r"recipe\.yaml, line 1: not valid YAML"):
        load_recipe(str(path))
    assert not (tmp_path / "touched").exists()


def test_no_field_turns_remote_code_on() -> None:
    values = {"method": "dpo", "model": {"name": "a/b", "trust_remote_code": True}, "output_dir": "x"}
    with pytest.raises(UserError, match=r"`model\.trust_remote_code` is not a field"):
        make_recipe({**values, "data": {"train": [{"path": "a.jsonl"}]}})


def test_a_model_that_brings_code_is_refused_and_its_code_not_run(
    recipe: MakeRecipe, tiny_model: Path, tmp_path: Path
) -> None:
    import shutil

    own = tmp_path / "own"
    shutil.copytree(tiny_model, own)
    config = json.loads((own / "config.json").read_text())
    mapped = {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Model"}
    (own / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": mapped}))
    (own / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match="it needs Python code of its own, which prefold does not run"):
        prefold.train(recipe(model={"name": str(own)}))
    assert not (tmp_path / "ran").exists()


class Planted:
    """A pickle that leaves a file when it is read without care."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "scheduler.pt", "scaler.pt", "adapter_model.bin"])
def test_a_planted_pickle_is_not_read(
    name: str, recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    step = TrainingLoop.step

    def stopping(self: TrainingLoop) -> None:
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingLoop, "step", stopping)
        prefold.train(recipe(train={"max_steps": 3}))
    planted = recipe().run_folder / "checkpoints" / "checkpoint-2" / name
    torch.save(Planted(tmp_path / "ran"), planted)
    prefold.train(recipe(train={"max_steps": 3}))
    assert "checkpoint-2 is passed over" in capfd.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_even_a_listed_pickle_runs_no_code(recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who mends the list as well gets an error, not their code run: transformers reads weights only."""
    import pickle

    from prefold.training.checkpoints import MANIFEST, write_manifest

    def no_adapter(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("prefold.runs.train.save_weights", no_adapter)
        prefold.train(recipe(train={"max_steps": 3, "save_steps": 2}))
    checkpoint = recipe().run_folder / "checkpoints" / "checkpoint-3"
    torch.save(Planted(tmp_path / "ran"), checkpoint / "optimizer.pt")
    kept = json.loads((checkpoint / MANIFEST).read_text())
    write_manifest(checkpoint, kept["max_tokens"], kept["carried"], kept["best"])
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        prefold.train(recipe(train={"max_steps": 3, "save_steps": 2}))
    assert not (tmp_path / "ran").exists()


# ---- paths ------------------------------------------------------------------------------------------------------


def test_weights_outside_the_folder_are_not_read(recipe: MakeRecipe, tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    (base / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (base / "other.safetensors").write_bytes((tmp_path / "outside.safetensors").read_bytes())
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"names files outside the folder, e\.g\. \.\./outside\.safetensors"):
        prefold.train(recipe(model={"name": str(base)}))


def test_reward_code_is_read_from_the_named_file_alone(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not from a file that lies about and is called like a reward."""
    monkeypatch.chdir(tmp_path)
    for name in ("length.py", "mine.py", "rewards.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef mine(completions): return []\n")
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "Say {word}"}}\n' for word in ("one", "two", "six")))
    settings: dict[str, Any] = {
        "method": "grpo",
        "grpo": {"num_generations": 2, "max_completion_length": 4},
        "data": {"train": [{"path": "prompts.jsonl"}]},
    }
    prefold.check(recipe(**settings, rewards=[{"name": "length", "target": 3}]))
    with pytest.raises(UserError, match="`mine` is not a built-in reward"):
        recipe(**settings, rewards=[{"name": "mine"}])
    assert not (tmp_path / "ran").exists()


def test_code_of_a_task_is_run_from_the_named_folder_alone(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "mine.yaml").write_text("task: mine\ncustom_dataset: !function mine.questions\n")
    (tasks / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef questions(**_): return {{}}\n")
    monkeypatch.chdir(tasks)
    with pytest.raises(UserError, match="there is no task `mine`"):
        prefold.check(recipe(evaluate={"tasks": ["mine"]}))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match="the task `mine`"):  # which is half a task, and runs all the same
        prefold.check(recipe(evaluate={"tasks": ["mine"], "include_path": str(tasks)}))
    assert (tmp_path / "ran").exists()


def test_one_module_listens_on_loopback_alone() -> None:
    """Who is answered there is held in tests/unit/ui/test_server.py."""
    words = ("http.server", "socketserver", ".listen(", "uvicorn.", "start_server", ".bind(")
    listening = {path.name for path in SOURCES if any(word in path.read_text(encoding="utf-8") for word in words)}
    assert listening <= {"server.py", "launch.py"}
    text = (Path(prefold.__file__).parent / "ui" / "server.py").read_text(encoding="utf-8")
    assert text.count(".bind(") == 1 and 'bind(("127.0.0.1", port))' in text and "run(sockets=[listening])" in text


def test_the_socket_of_the_pages_is_on_loopback() -> None:
    from prefold.ui.server import _listen

    with _listen(0) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"
        with pytest.raises(UserError, match="cannot listen on port"):
            _listen(listening.getsockname()[1])
