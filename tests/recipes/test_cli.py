"""The commands: exit codes, messages without tracebacks, stdout that other programs can read."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from prefold.cli import main
from prefold.recipe import RecipeBase, dump_recipe

MakeRecipe = Callable[..., RecipeBase]
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    """Call a command from an empty directory; gives exit code, stdout and stderr."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("PREFOLD_DEBUG", raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["prefold", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capfd.readouterr()
        return int(stop.value.code or 0), out, err

    return call


@pytest.fixture
def recipe_file(recipe: MakeRecipe, tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe()))
    return str(path)


def test_run_prints_the_verdict(cli: Cli, recipe_file: str) -> None:
    code, _, err = cli("run", recipe_file, "output_dir=runs/mine")
    assert code == 0
    assert "accuracy" in err
    assert "report.html" in err
    assert "Traceback" not in err
    assert max(map(len, re.sub(r"\x1b\[[0-9;]*m", "", err).splitlines())) <= 80


def test_check_json_is_one_object(cli: Cli, recipe_file: str, recipe: MakeRecipe) -> None:
    code, out, _ = cli("check", recipe_file, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["ok"] is True
    assert {"sources", "findings", "tokens", "plan"} <= set(found)
    assert found["sources"][0]["rows_used"] == 20
    assert found["plan"]["optimizer_steps"] == 6
    assert not recipe().run_folder.exists()


def test_check_asks_the_model_where_it_is_wanted(cli: Cli, recipe_file: str, tmp_path: Path) -> None:
    code, out, err = cli("check", recipe_file, "--reference", "--html", "check.html", "--json")
    found = json.loads(out)
    assert code == 0 and "Traceback" not in err
    assert found["separation"]["pairs"] == 14 and sum(found["separation"]["histogram"]["counts"]) == 14
    assert "Before training" in (tmp_path / "here" / "check.html").read_text()
    _, shown, _ = cli("check", recipe_file, "--reference")
    assert "The model before training prefers the chosen one in" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_check_shows_the_trained_tokens(cli: Cli, recipe_file: str) -> None:
    code, out, _ = cli("check", recipe_file)
    assert code == 0
    for text in ("20", "WORD", "<|im_end|>", "optimizer steps"):
        assert text in out


def test_check_shows_a_row(cli: Cli, recipe_file: str) -> None:
    code, out, _ = cli("check", recipe_file, "--row", "pairs.jsonl:2", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["row"]["row"] == 2
    assert {"row", "read", "messages", "rendered", "tokens"} <= set(facts)
    code, out, _ = cli("check", recipe_file, "--row", "pairs.jsonl:2")
    assert code == 0 and "As it is trained" in out and max(map(len, out.splitlines())) <= 80
    code, out, err = cli("check", recipe_file, "--row", "2", "--measure")
    assert code == 2 and "one row alone" in err and not out


def test_generate(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "One"}\n{"prompt": "Two"}\n')
    code, out, _ = cli(
        "generate",
        str(tiny_model),
        "Zero",
        "--file",
        str(tmp_path / "prompts.jsonl"),
        "--max-new-tokens",
        "4",
        "--json",
    )
    assert code == 0
    assert [answer["prompt"] for answer in json.loads(out)["answers"]] == ["Zero", "One", "Two"]


def test_chat_with_two_models(cli: Cli, recipe_file: str, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("run", recipe_file)[0] == 0
    said = iter(["Hello", "/new", "Again", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    code, out, _ = cli("chat", str(recipe().run_folder), "--compare", "--max-new-tokens", "4")
    assert code == 0
    assert out.count("before:") == out.count("after:") == 2


def test_fetch_prints_the_folder_only(cli: Cli, tiny_model: Path) -> None:
    assert cli("fetch", str(tiny_model))[:2] == (0, f"{tiny_model}\n")


def test_recipes_and_schema(cli: Cli) -> None:
    assert "demo" in cli("recipes")[1]
    assert cli("recipes", "demo")[1].startswith("# DPO")
    assert json.loads(cli("schema")[1])["title"] == "Recipe"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml: no such recipe"),
        (["run", "RECIPE", "train.learning_rate=fast"], "`train.learning_rate` is 'fast'"),
        (["run", "RECIPE", "model.name=./nowhere"], "./nowhere: no such folder or file"),
        (["run", "RECIPE", "model.name=pypi:some-model==1"], "is not a package known to carry a model"),
        (["run", "RECIPE", "data.train.0.path=nowhere.jsonl"], "nowhere.jsonl"),
        (["run", "RECIPE", "data.train.0.path=builtin:nothing"], "builtin:nothing"),
        (["run", "RECIPE", "data.train.0.path=EMPTY"], "empty"),
        (["run", "RECIPE", "data.train.0.path=BAD", "data.bad_rows=error"], "row 2"),
        (["run", "RECIPE", "lora.target_modules=[nothing]"], "no module of the model is called 'nothing'"),
        (["run", "RECIPE", "model.attn_implementation=flash"], "`model.attn_implementation` is 'flash'"),
        (["run", "RECIPE", "train.lr_scheduler_type=cosine_with_min_lr"], "`train.lr_scheduler_type`"),
        (["merge", "RECIPE"], "`merge` needs what `check` leaves"),
        (["generate", "MODEL"], "no prompt"),
        (["generate", "MODEL", "--file", "nowhere.txt"], "nowhere.txt: cannot be read"),
        (["generate", "MODEL", "--file", "BAD"], "row 2: no prompt"),
        (["chat", "MODEL", "--compare"], "`--compare` needs to know the base"),
        (["recipes", "nothing"], "nothing: no such recipe"),
        (["recipes", "import", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["recipes", "demo", "--method", "dpo"], "a method goes with `import`"),
        (["nonsense"], "No such command"),
    ],
)
def test_wrong_use_is_exit_2_and_one_message(
    cli: Cli, recipe_file: str, tiny_model: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty.jsonl").touch()
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n{broken\n")
    places = {
        "RECIPE": recipe_file,
        "MODEL": str(tiny_model),
        "EMPTY": str(tmp_path / "empty.jsonl"),
        "BAD": str(tmp_path / "bad.jsonl"),
    }
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc").exists(), reason="needs a folder that cannot be written")
def test_an_output_folder_that_cannot_be_written(cli: Cli, recipe_file: str) -> None:
    code, _, err = cli("run", recipe_file, "output_dir=/proc/prefold")
    assert code == 2
    assert "cannot write to the folder" in err


def test_a_bug_shows_one_line_and_debug_the_traceback(
    cli: Cli, recipe_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("prefold.runs.stages.write_report", broken)
    code, _, err = cli("run", recipe_file)
    assert code == 1
    assert "ZeroDivisionError: by zero" in err
    assert "Traceback" not in err


def test_ctrl_c_says_how_to_go_on(cli: Cli, recipe_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("prefold.runs.train.reference_logprobs", interrupted)
    code, _, err = cli("run", recipe_file)
    assert code == 130
    assert "goes on from here" in err
    assert "Traceback" not in err
