"""The commands: exit codes, messages without tracebacks, stdout that other programs can read."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import pytest

import prefold
from prefold.cli import main
from prefold.generation.answers import print_answers
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
    answers = json.loads(out)["answers"]
    assert [answer["prompt"] for answer in answers] == ["Zero", "One", "Two"]
    assert {reason for answer in answers for reason in answer["finish_reasons"]} <= {"stop", "length"}


def test_an_answer_that_was_cut_off_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    print_answers([{"prompt": "Q?", "answers": ["whole", "half"], "finish_reasons": ["stop", "length"]}])
    assert capsys.readouterr().out == "Q?\n\nwhole\n\nhalf\n(cut off here; --max-new-tokens allows more)\n\n"


def test_chat_with_two_models(
    cli: Cli, recipe_file: str, recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("run", recipe_file)[0] == 0
    saved = tmp_path / "saved.jsonl"
    said = iter(
        ["Hello", f"/save {saved}", "And?", f"/save {saved}", "/no", "/new", "Again", f"/save {saved}", "/exit"]
    )
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    code, out, _ = cli("chat", str(recipe().run_folder), "--compare", "--max-new-tokens", "4")
    assert code == 0
    assert out.count("before:") == out.count("after:") == 3
    assert "there is no command `/no`" in out and "their answers are not to one prompt" in out
    checked = prefold.check(recipe(data={"train": [{"path": str(saved)}], "eval_fraction": 0.0}))
    assert [source["rows_used"] for source in checked.as_json()["sources"]] == [2]


ENDLESS = """
import time
from prefold.generation import chat
def answer(model, tokenizer, prompts, sampling, streamer):
    while True:
        streamer.on_finalized_text("words of an answer that has no end, ")
        time.sleep(0.05)
chat.answer = answer
from prefold.cli import main
main()
"""


def test_ctrl_c_in_a_terminal_stops_an_answer_and_then_the_chat(tiny_model: Path) -> None:
    """At 40 columns, no line of an answer is longer, and none is broken by the terminal."""
    terminal, own = pty.openpty()
    arguments = [sys.executable, "-c", ENDLESS, "chat", str(tiny_model)]
    size = {**os.environ, "COLUMNS": "40", "TERM": "xterm"}

    def lead() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell may have had it ignored
        os.setsid()
        fcntl.ioctl(own, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(arguments, stdin=own, stdout=own, stderr=own, env=size, preexec_fn=lead)
    os.close(own)
    shown = ""

    def wait_for(text: str, after: int = 0) -> int:
        nonlocal shown
        deadline = time.monotonic() + 120
        while text not in shown[after:]:
            ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, shown
            shown += os.read(terminal, 4096).decode()
        return shown.index(text, after) + len(text)

    wait_for("you: ")
    os.write(terminal, b"Hello\n")
    begin = wait_for("model: ")
    second_line = wait_for("\n", wait_for("\n", begin))
    os.write(terminal, b"\x03")
    again = wait_for("you: ", wait_for("(stopped)", second_line))
    # A signal between the prompt and the read behind it is seen by Python with the next key alone.
    for _ in range(3):
        os.write(terminal, b"\x03")
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
            break
    assert process.returncode == 0
    os.close(terminal)
    first, second = shown[begin:again].replace("\x1b[0m", "").splitlines()[:2]
    assert f"model: {first} " == "model: words of an answer that has no " and second.startswith("end, words of")


def test_fetch_prints_the_folder_only(cli: Cli, tiny_model: Path) -> None:
    assert cli("fetch", str(tiny_model))[:2] == (0, f"{tiny_model}\n")


def test_recipes_and_schema(cli: Cli) -> None:
    assert "demo" in cli("recipes")[1]
    assert cli("recipes", "demo")[1].startswith("# DPO")
    assert json.loads(cli("schema")[1])["title"] == "Recipe"


NOISE = """
import ctypes, os, sys, atexit
print("at import")
atexit.register(print, "at exit")
def mine(completions):
    print("noise " * 1000)
    os.write(1, b"from below")
    os.system("echo from a child")
    print("held on to", file=sys.__stdout__, flush=True)
    return [float(len(completion)) for completion in completions]
"""


@pytest.mark.parametrize("command", ["check", "evaluate"])
def test_json_is_alone_on_stdout_whatever_is_printed(recipe: MakeRecipe, tmp_path: Path, command: str) -> None:
    (tmp_path / "noise.py").write_text(NOISE)
    made = recipe(
        method="grpo",
        grpo={"num_generations": 2, "max_completion_length": 4},
        rewards=[{"name": "mine", "file": str(tmp_path / "noise.py")}],
        train={"batch_size": 2, "max_steps": 1},
        output_dir=str(tmp_path / "run"),
    )
    (tmp_path / "recipe.yaml").write_text(dump_recipe(made))
    if command == "evaluate":
        prefold.merge(made) if prefold.train(made) else None
    arguments = [sys.executable, "-m", "prefold", command, str(tmp_path / "recipe.yaml"), "--json"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert isinstance(json.loads(done.stdout), dict) and done.returncode == 0
    assert "at import" in done.stderr and "at exit" in done.stderr
    assert command == "check" or all(text in done.stderr for text in ("noise", "from below", "a child", "held on to"))


@pytest.mark.parametrize("ending", ["sys.exit(0)", "os._exit(0)", "raise KeyboardInterrupt"])
def test_a_reward_cannot_end_a_run_as_if_it_were_done(
    cli: Cli, recipe: MakeRecipe, tmp_path: Path, ending: str
) -> None:
    (tmp_path / "ends.py").write_text(f"import os, sys\ndef mine(completions):\n    {ending}\n")
    rewards = [{"name": "mine", "file": str(tmp_path / "ends.py")}]
    grpo = {"num_generations": 2, "max_completion_length": 4}
    made = recipe(method="grpo", grpo=grpo, rewards=rewards, train={"batch_size": 2, "max_steps": 1})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(made))
    code, _, err = cli("run", str(tmp_path / "recipe.yaml"))
    assert code == 2 and "Traceback" not in err
    assert "ends.py, line 3: the reward `mine` failed: " in err and "  completion: '" in err


def test_the_version(cli: Cli) -> None:
    assert cli("--version")[:2] == (0, f"prefold {version('prefold')}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "RECIPE", "--train.max_steps=3"], "without dashes: `train.max_steps=3`"),
        (["check", "RECIPE", "--train.max-steps", "3"], "without dashes: `train.max_steps=3`"),
        (["evaluate", "RECIPE", "--learning-rate=1e-5", "--json"], "without dashes: `train.learning_rate=1e-5`"),
        (["train", "RECIPE", "--output_dir"], "without dashes: `output_dir=VALUE`"),
        (["run", "RECIPE", "--frehs"], "No such option"),
        (["run", "RECIPE", "data.train.0.path=no/where.jsonl"], "to do: check the path, which starts"),
        (["chat", "models/nowhere"], "is no folder or file here; "),
        (["generate", "models/tny", "Hello"], "check the path: did you mean `tiny`?"),
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
        (["merge", "RECIPE"], "`merge` needs the output of `check`"),
        (["generate", "MODEL"], "no prompt"),
        (["generate", "MODEL", "--file", "nowhere.txt"], "nowhere.txt: cannot be read"),
        (["generate", "MODEL", "--file", "BAD"], "row 2: no prompt"),
        (["chat", "MODEL", "--compare"], "`--compare` needs to know the base"),
        (["recipes", "nothing"], "nothing: no such recipe"),
        (["recipes", "import", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["recipes", "demo", "--method", "dpo"], "these options go with `import`"),
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
    (tmp_path / "here" / "models" / "tiny").mkdir(parents=True)
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

    monkeypatch.setattr("prefold.runs.train.Reference", interrupted)
    code, _, err = cli("run", recipe_file, "train.seed=3", "--fresh")
    assert code == 130
    assert f"to do: `prefold run {recipe_file} train.seed=3` goes on from here" in err
    assert "Traceback" not in err


def test_ctrl_c_in_a_command_that_keeps_nothing(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("prefold.generate", interrupted, raising=False)
    assert cli("generate", "model", "Hello")[::2] == (130, "prefold: stopped\n")
