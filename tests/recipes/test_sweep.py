"""`prefold sweep` on a tiny model, as a user meets it."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prefold
from prefold.cli import main
from prefold.errors import StageError, UserError
from prefold.recipe import RecipeBase, dump_recipe, load_recipe
from prefold.runs import sweep as sweeping
from prefold.runs import train as training
from prefold.runs.measuring import Measuring
from prefold.runs.sweep import swept_fields
from prefold.training.loop import TrainingLoop

MakeRecipe = Callable[..., RecipeBase]
Cli = Callable[..., tuple[int, str, str]]
SLOW, FAST = "learning_rate=1e-6", "learning_rate=0.005"


@pytest.fixture
def recipe_file(recipe: MakeRecipe, tmp_path: Path) -> Callable[..., str]:
    def write(**changes: Any) -> str:
        path = tmp_path / "recipe.yaml"
        settings = {"train": {"max_steps": 2}, "evaluate": {"prompts": 1}, "data": {"eval_fraction": 0.5}}
        path.write_text(dump_recipe(recipe(**{**settings, **changes})))
        return str(path)

    return write


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["prefold", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capfd.readouterr()
        return int(stop.value.code or 0), out, re.sub(r"\x1b\[[0-9;]*m", "", err)

    return call


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """The first arguments of the calls of a function from now on."""
    calls: list[Any] = []
    kept = getattr(owner, name)

    def call(*arguments: Any, **settings: Any) -> Any:
        calls.append(arguments)
        return kept(*arguments, **settings)

    monkeypatch.setattr(owner, name, call)
    return calls


# ---- the grid ---------------------------------------------------------------------------------------------------


def test_commas_part_values_but_not_within_brackets_or_quotes() -> None:
    given = ["train.learning_rate=1e-5,5e-5", "lora.target_modules=[q_proj],[q_proj, v_proj]", "lora.r=4"]
    one = ["evaluate.prompts=[a, b]", 'data.system="Hello, you"']
    swept, fixed = swept_fields([*given, *one])
    assert swept == {
        "train.learning_rate": [1e-5, 5e-5],
        "lora.target_modules": [["q_proj"], ["q_proj", "v_proj"]],
    }
    assert fixed == ["lora.r=4", *one]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "no field has several values"),
        (["train.learning_rate=1e-5"], "no field has several values"),
        (["train.learning_rate=[1e-5, 5e-5]"], "no field has several values"),
        (["train.learning_rate=1e-5,1e-5"], "the value 1e-05 is given twice"),
        (["dpo.beta=0.1,0.2", "dpo.beta=0.3"], "`dpo.beta` is given twice"),
        (["dpo.beta=0.3", "dpo.beta=0.1,0.2"], "`dpo.beta` is given twice"),
        (["output_dir=a,b"], "every run has a folder of its own"),
        (["dpo.beta=0.1,[0.2"], "not valid YAML"),
        (["beta=0.1,0.2"], "`beta` is not a field"),
        (["train.learning_rat=1e-5,5e-5"], "did you mean `learning_rate`?"),
        (["train.learning_rate=1e-5,fast"], "`train.learning_rate` is 'fast'"),
        (["train.learning_rate=1e-5,-1"], "`train.learning_rate` is -1"),
        (["train.learning_rate=1e-5,5e-5", "lora.r=0"], "`lora.r` is 0"),
        (["dpo.beta=0.1,0.2", "publish.to=out"], "published to the same place"),
        (["train.seed=1,2"], "could not be compared: they hold out different data"),
        (["dpo.beta=0.1,0.2", "data.train.0.path=nowhere.jsonl"], "nowhere.jsonl"),
        (["dpo.beta=0.1,0.2", "data.eval_fraction=0"], "nothing is held out to choose by"),
        (["dpo.beta=0.1,0.2", "model.name=./nowhere"], "./nowhere: no such folder or file"),
        (["dpo.beta=0.1,0.2", "--output", "/proc/prefold"], "cannot write to the folder"),
    ],
)
def test_wrong_use_is_exit_2_and_nothing_is_written(
    cli: Cli,
    recipe_file: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    written = recipe_file()
    before = sorted(path.name for path in tmp_path.iterdir())
    code, out, err = cli("sweep", written, *overrides)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    # Read data are kept in the cache.
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == before


def test_folders_have_different_names_for_different_values() -> None:
    names = [sweeping._in_a_name(value) for value in (1e-5, 0.1, "a/b", "a b", "a-b", True, [1, 2], "x" * 50, "x" * 51)]
    assert names[:2] == ["1e-5", "0.1"] and names[4:6] == ["a-b", "true"]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[\w.+-]+", name) for name in names)


# ---- a sweep ----------------------------------------------------------------------------------------------------


def test_a_sweep(cli: Cli, recipe_file: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs, what they share, the comparison; a part of it once more; one value more."""
    measured = counted(monkeypatch, Measuring, "measure")
    computed = counted(monkeypatch, sys.modules["prefold.trees.reference"], "compute_reference")
    folder = tmp_path / "runs" / "lr"
    command = ("sweep", recipe_file(), "lora.r=2", "--output", str(folder))
    code, _, err = cli(*command, "train.learning_rate=1e-6,5e-3")
    assert code == 0, err
    assert "by luck alone" in " ".join(err.split()) and "data that did not choose it" in err
    # Once before, for both, and once after each; the reference once for both.
    assert [arguments[-1] for arguments in measured] == ["before", "after", "after"]
    assert sum(len(trees) for _, trees, *_ in computed) == len({tree for _, trees, *_ in computed for tree in trees})

    found = json.loads((folder / "sweep.json").read_text())
    assert [point["name"] for point in found["points"]] == [SLOW, FAST]
    assert [point["status"] for point in found["points"]] == ["done", "done"]
    assert found["fields"] == {"train.learning_rate": [1e-6, 5e-3]} and found["overrides"] == ["lora.r=2"]
    assert found["held_out"] == {"unit": "pair", "number": 10}
    assert found["best"] in (SLOW, FAST)
    # The command that it ends with is one.
    words = [word for word in shlex.split(found["confirm"]) if word.strip()]
    confirmed = load_recipe(words[2], words[3:])
    assert [source.path for source in confirmed.data.eval] == ["fresh.jsonl"]
    assert confirmed.output_dir == f"{folder}-confirmed" and confirmed.lora.r == 2
    for point in found["points"]:
        own = json.loads((folder / point["name"] / "evaluation" / "heldout.json").read_text())
        pairs = [json.loads(line) for line in (folder / point["name"] / "evaluation" / "heldout.jsonl").open()]
        facts = point["held_out"]
        assert facts["after"] == own["after"]["accuracy"] == sum(pair["after"] for pair in pairs) / 10
        assert facts["before"] == own["before"]["accuracy"] == sum(pair["before"] for pair in pairs) / 10
        assert facts["after_ci_of_all"][0] < own["after"]["accuracy_ci"][0]
        assert (facts["to_best"] is None) == (point["name"] == found["best"])
    slow, fast = ((folder / name / "evaluation" / "heldout.json").read_text() for name in (SLOW, FAST))
    assert json.loads(slow)["before"] == json.loads(fast)["before"] and slow != fast

    page = (folder / "sweep.html").read_text()
    assert f'href="{SLOW.replace("=", "%3D")}/report.html"' in page and "by luck alone" in page

    # Each is the ordinary run.
    alone = prefold.run(command[1], ["lora.r=2", "train.learning_rate=5e-3", f"output_dir={tmp_path / 'alone'}"])
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors", "evaluation/heldout.json", "samples.jsonl"):
        assert (folder / FAST / name).read_bytes() == (alone / name).read_bytes(), name

    # Again: nothing is done again; and one value more is one run more.
    done = {path: path.stat().st_mtime_ns for path in folder.rglob("adapter_model.safetensors")}
    code, out, err = cli(*command, "train.learning_rate=1e-6,5e-3,1e-3", "--json")
    assert code == 0 and err.count("done before") == 2
    assert json.loads(out) == json.loads((folder / "sweep.json").read_text())
    assert [point["status"] for point in json.loads(out)["points"]] == ["done"] * 3
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())

    # Fewer values would hide how many there were.
    code, _, err = cli(*command, "train.learning_rate=1e-6,1e-3")
    assert code == 2 and f"holds a sweep with a run that is none of this one's: {FAST}" in err
    # Nor are runs taken that were trained otherwise.
    code, _, err = cli(*command, "train.learning_rate=1e-6,5e-3,1e-3", "train.max_steps=3")
    assert code == 2 and "trained with other settings: `train.max_steps` was 2, is 3" in err


def test_a_sweep_that_was_stopped_goes_on(
    cli: Cli, recipe_file: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe_file(train={"max_steps": 3, "save_steps": 1})
    command = ("sweep", file, "train.learning_rate=1e-6,5e-3", "--output", str(tmp_path / "sweep"))
    step = TrainingLoop.step

    def stopping(self: TrainingLoop) -> None:
        if self.state.global_step == 2 and self.args.learning_rate == 5e-3:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(TrainingLoop, "step", stopping)
    code, _, err = cli(*command)
    assert code == 130 and "goes on from here" in err and "Traceback" not in err
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [point["status"] for point in found["points"]] == ["done", "waiting"] and found["best"] == SLOW
    assert "Not done yet" in (tmp_path / "sweep" / "sweep.html").read_text()

    monkeypatch.setattr(TrainingLoop, "step", step)
    code, _, err = cli(*command)
    assert code == 0 and "done before" in err and "going on after step 2" in err
    assert all(point["status"] == "done" for point in prefold.sweep(*_of(command))["points"])


def _of(command: tuple[str, ...]) -> tuple[str, list[str]]:
    return command[1], [f"{command[2]}"]


def test_a_run_that_fails_does_not_stop_the_others(
    cli: Cli, recipe_file: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = training._train

    def failing(recipe: RecipeBase, prepared: Any) -> None:
        if recipe.train.learning_rate == 1e-6:
            raise StageError("<b>it broke</b>")
        if recipe.train.learning_rate == 1e-5:
            raise ZeroDivisionError("by zero")
        kept(recipe, prepared)

    monkeypatch.setattr(training, "_train", failing)
    command = ("sweep", recipe_file(), "train.learning_rate=1e-6,1e-5,5e-3", "--output", str(tmp_path / "sweep"))
    code, _, err = cli(*command)
    assert code == 1 and "Traceback" not in err
    assert "failed: learning_rate=1e-6" in err and "<b>it broke</b>" in err
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [point["status"] for point in found["points"]] == ["failed", "failed", "done"]
    assert found["points"][1]["error"] == "ZeroDivisionError: by zero"
    assert found["best"] == FAST and found["points"][2]["held_out"]["to_best"] is None
    page = (tmp_path / "sweep" / "sweep.html").read_text()
    assert "&lt;b&gt;it broke&lt;/b&gt;" in page and "<b>it broke" not in page


def test_a_full_disk_ends_the_sweep(
    cli: Cli, recipe_file: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "_train", full)
    code, _, err = cli("sweep", recipe_file(), "dpo.beta=0.1,0.2", "--output", str(tmp_path / "sweep"))
    assert code == 1 and "No space left on device" in err and "run 2 of 2" not in err


def test_folders_of_something_else_are_refused(recipe_file: Callable[..., str], tmp_path: Path) -> None:
    file, folder = recipe_file(), tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").touch()
    with pytest.raises(UserError, match="is neither empty nor the folder of a sweep"):
        prefold.sweep(file, ["dpo.beta=0.1,0.2"], output=str(folder))
    (folder / "sweep.json").write_text("{")
    with pytest.raises(UserError, match=r"sweep\.json: cannot be read"):
        prefold.sweep(file, ["dpo.beta=0.1,0.2"], output=str(folder))


def test_methods_can_be_swept_that_are_measured_alike(recipe_file: Callable[..., str], tmp_path: Path) -> None:
    text = re.sub(r"^(dpo|evaluate):\n(  .*\n)+", "", Path(recipe_file()).read_text(), flags=re.M)
    (tmp_path / "recipe.yaml").write_text(text)
    values = {"method": ["dpo", "ipo"]}
    points, folder = sweeping._points(str(tmp_path / "recipe.yaml"), values, [], None)
    sweeping._require_comparable(points)
    assert folder == tmp_path / "run-sweep"
    assert [point.recipe.run_folder for point in points] == [folder / "method=dpo", folder / "method=ipo"]
    with pytest.raises(UserError, match="measured in different ways"):
        prefold.sweep(str(tmp_path / "recipe.yaml"), ["method=dpo,reward"])


def test_a_model_that_scores_answers_is_compared_with_chance(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(method="reward")
    (made.run_folder / "evaluation").mkdir(parents=True)
    side = {"accuracy": 0.75, "accuracy_ci": [0.3, 0.95], "margin": 1.5}
    heldout = {"pairs": 4, "after": side, "chance": {"accuracy": 0.5, "p_value": 0.6}}
    (made.run_folder / "evaluation" / "heldout.json").write_text(json.dumps(heldout))
    (made.run_folder / "evaluation" / "heldout.jsonl").write_text('{"after": 1.0}\n' * 3 + '{"after": 0.0}\n')
    measured = {"a": sweeping._held_out(sweeping.Point("a", {}, made))}
    found = sweeping._compared(measured)
    assert (found["best"], found["held_out"]) == ("a", {"unit": "pair", "number": 4})
    assert (measured["a"]["before"], measured["a"]["difference"]) == (None, 0.25)
    assert measured["a"]["verdict"] == "no difference that 4 pairs can show (too few to show any)"


def test_rewards_choose_where_completions_are_sampled(
    recipe_file: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Say word {i}"}) + "\n" for i in range(8)))
    file = recipe_file(
        method="grpo",
        grpo={"num_generations": 2, "max_completion_length": 6, "beta": 0.04},
        rewards=[{"name": "length", "target": 3, "unit": "characters"}],
        data={"train": [{"path": str(prompts)}], "eval_fraction": 0.5},
        train={"batch_size": 2, "max_steps": 1},
    )
    measured = counted(monkeypatch, Measuring, "measure")
    found = prefold.sweep(file, ["grpo.beta=0.0,0.04"], output=str(tmp_path / "sweep"))
    assert [arguments[-1] for arguments in measured] == ["before", "after", "after"]
    assert found["held_out"] == {"unit": "prompt", "number": 4} and found["chosen_by"] == "held-out reward"
    rewards = json.loads((tmp_path / "sweep" / "beta=0.04" / "evaluation" / "rewards.json").read_text())
    assert found["points"][1]["held_out"]["after"] == rewards["after"]["reward"]
    assert "held-out reward" in (tmp_path / "sweep" / "sweep.html").read_text()
    # More completions to learn from are measured no other way; drawing them otherwise is.
    points, _ = sweeping._points(file, {"grpo.num_generations": [2, 4]}, [], str(tmp_path / "other"))
    sweeping._require_comparable(points)
    for field in ("grpo.temperature=0.7,1.0", "grpo.max_completion_length=4,6"):
        with pytest.raises(UserError, match="measured in different ways"):
            prefold.sweep(file, [field], output=str(tmp_path / "other"))
