"""The folder that is named is the one that is used: moved, copied, renamed, linked, from wherever it is called."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from tiny_tokenizer import save_chat_model

import prefold
from prefold.cli import main
from prefold.errors import UserError
from prefold.recipe import load_recipe
from prefold.training.loop import TrainingLoop

Cli = Callable[..., tuple[int, str, str]]
STEPS = 4


class Killed(BaseException):
    pass


def write_project(folder: Path) -> None:
    save_chat_model(folder / "models" / "tiny")
    (folder / "data").mkdir()
    rows = [{"prompt": f"Say word {i}", "chosen": f"WORD {i}!", "rejected": f"word {i}, maybe"} for i in range(12)]
    (folder / "data" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "method": "dpo",
        "model": {"name": "models/tiny", "dtype": "float32"},
        "lora": {"r": 2},
        "data": {"train": [{"path": "data/pairs.jsonl"}], "eval_fraction": 0.3},
        "train": {"batch_size": 4, "max_steps": STEPS, "learning_rate": 5e-3, "save_steps": 2},
        "evaluate": {"prompts": 1, "max_new_tokens": 4},
        "output_dir": "runs/mine",
    }
    (folder / "recipe of mine.yaml").write_text(yaml.safe_dump(recipe))


@pytest.fixture(scope="module", params=["finished", "half-done"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A project with a run in it."""
    folder, step = tmp_path_factory.mktemp("project"), TrainingLoop.step

    def stopping(self: TrainingLoop) -> None:
        if self.state.global_step == 3:
            raise Killed
        step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_project(folder)
        if request.param == "finished":
            prefold.run("recipe of mine.yaml")
        else:
            patch.setattr(TrainingLoop, "step", stopping)
            with pytest.raises(Killed):
                prefold.run("recipe of mine.yaml")
    return request.param, folder


@pytest.fixture
def project(made: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it that was moved as a whole: nothing in it leads to the first one, which is out of the way."""
    original = made[1]
    folder, away = tmp_path / "project", original.with_name("away")
    shutil.copytree(original, folder)
    original.rename(away)
    monkeypatch.chdir(folder)
    yield folder
    away.rename(original)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["prefold", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capfd.readouterr()
        return int(stop.value.code or 0), out, " ".join(err.split())

    return call


def moved(folder: Path) -> str:
    (folder / "elsewhere").mkdir()
    (folder / "runs" / "mine").rename(folder / "elsewhere" / "mine")
    return "elsewhere/mine"


def renamed(folder: Path) -> str:
    (folder / "runs" / "mine").rename(folder / "runs" / "another, in ü")
    return "runs/another, in ü"


def copied(folder: Path) -> str:
    shutil.copytree(folder / "runs" / "mine", folder / "copy")
    return "copy/"


def linked(folder: Path) -> str:
    (folder / "runs" / "mine").rename(folder / "far")
    (folder / "link").symlink_to("far")
    return "./link"


def in_itself(folder: Path) -> str:
    os.chdir(folder / "runs" / "mine")
    return "."


def from_elsewhere(folder: Path) -> str:
    """Where data and models of the same names are something else."""
    other = folder.parent / "other"
    (other / "data").mkdir(parents=True)
    (other / "data" / "pairs.jsonl").write_text("{}\n")
    # The run began in this project, wherever that was before.
    record = folder / "runs" / "mine" / "inputs.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "paths_from": str(folder)}))
    os.chdir(other)
    return str(folder / "runs" / "mine")


def by_its_recipe(folder: Path) -> str:
    return f"{moved(folder)}/recipe.yaml"


def state_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize("change", [moved, renamed, copied, linked, in_itself, from_elsewhere, by_its_recipe])
def test_the_folder_that_is_named(
    change: Callable[[Path], str], made: tuple[str, Path], project: Path, cli: Cli, tmp_path: Path
) -> None:
    """A run goes on in it, every command works on it, and nothing is written elsewhere."""
    state, _ = made
    name = change(project)
    folder = Path(name).resolve()
    folder = folder.parent if name.endswith("recipe.yaml") else folder
    run, beside = name.removesuffix("/recipe.yaml"), {path for path in project.rglob("*") if folder not in path.parents}
    original = state_of(project / "runs") if change is copied else {}

    code, _, err = cli("train", name)
    assert code == 0, err
    assert ("going on after step 2" in err) == (state == "half-done") and (folder / "adapter").is_dir()
    for command in (["run", name], ["merge", name], ["evaluate", name, "--json"], ["report", name], ["check", name]):
        code, _, err = cli(*command)
        assert code in (0, 1) if command[0] == "check" else code == 0, err
        assert "changed" not in err and "no longer" not in err
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]
    assert steps == [1, 2, 3, 4]
    code, out, err = cli("generate", run, "Hi", "--max-new-tokens", "2", "--json")
    assert code == 0 and "answers" in json.loads(out)
    code, out, err = cli("compare", run, "--json")
    assert code == 0 and json.loads(out)["runs"], err
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Say word 1"}\n')
    settings = ["--reward", "length:target=2,unit=characters", "--max-new-tokens", "4", "--num-completions", "2"]
    code, _, err = cli("pairs", str(prompts), "--model", run, *settings, "--output", str(tmp_path / "pairs.jsonl"))
    assert code in (0, 1), err  # two answers may be equally good
    code, _, err = cli("publish", name, f"publish.to={tmp_path / 'published'}")
    assert code == 0 and (tmp_path / "published" / "model.safetensors").is_file(), err

    assert (folder / "report.html").is_file() and (folder / "publish.json").is_file()
    assert {path for path in project.rglob("*") if folder not in path.parents} == beside
    if change is copied:
        assert state_of(project / "runs") == original
    elif change not in (in_itself, from_elsewhere):
        assert not (project / "runs" / "mine").exists()


def test_paths_lead_where_they_did(made: tuple[str, Path], project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the recipe from where the run began, those of an override from here; and so they stay."""
    from_elsewhere(project)
    other, run = Path.cwd(), str(project / "runs" / "mine")
    recipe = load_recipe(run, ["evaluate.prompts=[Hello]"])
    assert recipe.data.train[0].path == str(project / "data" / "pairs.jsonl")
    assert recipe.model.name == str(project / "models" / "tiny") and recipe.output_dir == run
    prefold.train(run)
    monkeypatch.chdir(project)
    assert load_recipe("runs/mine").data.train[0].path == str(project / "data" / "pairs.jsonl")
    (other / "mine.jsonl").write_text((project / "data" / "pairs.jsonl").read_text())
    monkeypatch.chdir(other)
    with pytest.raises(UserError, match=r"`data\.train\.0\.path` was '.*/project/data/pairs\.jsonl', is 'mine\.jsonl'"):
        prefold.run(run, ["data.train.0.path=mine.jsonl"])
    prefold.train(run, ["data.train.0.path=mine.jsonl"], fresh=True)
    monkeypatch.chdir(project)
    assert load_recipe("runs/mine").data.train[0].path in (str(other / "mine.jsonl"), "mine.jsonl")


def test_a_folder_of_another_run(made: tuple[str, Path], project: Path, cli: Cli) -> None:
    before = state_of(project / "runs")
    code, _, err = cli("run", "recipe of mine.yaml", "method=orpo", "train.max_steps=3")
    assert code == 2 and "runs/mine: holds a run that was trained with other settings: `method` was 'dpo'" in err
    assert "take another `output_dir`, or `--fresh`" in err and state_of(project / "runs") == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("data", "data: a folder without recipe.yaml, so no run folder"),
        ("runs", "to do: name a run in it: mine"),
        ("runs/nowhere", "runs/nowhere: no such recipe"),
        ("recipe of mine.yaml", ""),
    ],
)
def test_no_run_folder(made: tuple[str, Path], project: Path, cli: Cli, name: str, message: str) -> None:
    if not message:  # its run is not there
        shutil.rmtree(project / "runs")
        message = "runs/mine: there is no run in this folder to do: `prefold run` makes it"
    before = set(project.rglob("*"))
    code, out, err = cli("report", name)
    assert (code, out) == (2, "") and message in err
    assert set(project.rglob("*")) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train.0.path=data/nothing.jsonl", "data/nothing.jsonl: no such file"),
        ("model.name=./models/nothing", "./models/nothing: no such folder or file"),
        ("evaluate.tasks=[nothing]", "there is no task `nothing`"),
        ("output_dir=recipe of mine.yaml", "recipe of mine.yaml: is a file, not a folder"),
        ("output_dir=nowhere", "nowhere: is a link that leads nowhere"),
    ],
)
def test_what_is_refused_leaves_nothing(
    made: tuple[str, Path], project: Path, cli: Cli, override: str, message: str
) -> None:
    (project / "nowhere").symlink_to("nothing")
    before = set(project.rglob("*"))
    output = [] if override.startswith("output_dir") else ["output_dir=new/run"]
    code, _, err = cli("run", "recipe of mine.yaml", *output, override)
    assert code == 2 and message in err
    assert set(project.rglob("*")) == before


def test_a_folder_that_cannot_be_written(
    made: tuple[str, Path], project: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can be shown and talked to, and a report is refused."""
    touch = Path.touch

    def refused(self: Path) -> None:
        if self.parent.name == "mine":
            raise PermissionError(13, "Permission denied")
        touch(self)

    monkeypatch.setattr(Path, "touch", refused)
    code, _, err = cli("report", "runs/mine")
    assert code == 2 and "runs/mine: cannot write to the folder (Permission denied)" in err
    assert "change its permissions, or name a copy of it" in err
