"""A result belongs to what it was made of: any of it changed, in a finished run and in a half-done one."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from tiny_tokenizer import save_chat_model

import prefold
from prefold.errors import UserError
from prefold.files import digest_of, write_text
from prefold.recipe import dump_recipe
from prefold.runs import fingerprints
from prefold.runs.folder import outdated_stages
from prefold.training.loop import TrainingLoop

REWARDS = """import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def short(completions):
    from helpers.scale import FACTOR

    return [-FACTOR * len(text) for text in completions]
"""
TASK = """task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: tasks/questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: !function prompts.asked
doc_to_choice: "{{options}}"
doc_to_target: "{{right}}"
"""
TRAIN = {"batch_size": 4, "max_steps": 4, "learning_rate": 5e-3, "save_steps": 2}
MODEL = {"name": "models/tiny", "dtype": "float32"}
RECIPES: dict[str, dict[str, Any]] = {
    "dpo": {
        "method": "dpo",
        "model": {**MODEL, "adapter": "models/adapter"},
        "data": {
            "train": [{"path": "data/pairs.jsonl"}, {"path": "data/more"}],
            "eval": [{"path": "data/held_out.jsonl"}],
            "decontaminate": [{"path": "data/benchmark.jsonl", "column": "text"}],
        },
        "train": TRAIN,
        "evaluate": {
            "prompts": 2,
            "max_new_tokens": 4,
            "tasks": ["mine"],
            "include_path": "tasks",
            "compare_with": ["models/other"],
        },
        "output_dir": "runs/mine",
    },
    "grpo": {
        "method": "grpo",
        "model": {**MODEL, "chat_template": "models/format.jinja"},
        "lora": {"r": 4},
        "data": {"train": [{"path": "data/prompts.jsonl"}], "eval_fraction": 0.3},
        "grpo": {"num_generations": 3, "max_completion_length": 6, "beta": 0.0},
        "rewards": [{"file": "code/rewards.py", "name": "short"}],
        "train": {**TRAIN, "batch_size": 2},
        "evaluate": {
            "prompts": 2,
            "max_new_tokens": 4,
            "win_rate": {"judge": {"file": "code/judge.py", "name": "longer"}},
        },
        "output_dir": "runs/mine",
    },
}


def write(path: str, content: str | list[dict[str, Any]]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
    Path(path).write_text(text)


def pairs(first: int, number: int) -> list[dict[str, str]]:
    numbers = range(first, first + number)
    return [{"prompt": f"Say word {i}", "chosen": f"WORD {i}!", "rejected": f"word {i}, maybe"} for i in numbers]


def write_project() -> None:
    save_chat_model(Path("models/tiny"))
    shutil.copytree("models/tiny", "models/other")
    shutil.copyfile("models/tiny/chat_template.jinja", "models/format.jinja")
    write("data/pairs.jsonl", pairs(0, 8))
    write("data/more/a.jsonl", pairs(20, 4))
    write("data/more/b.jsonl", pairs(30, 4))
    write("data/held_out.jsonl", pairs(40, 6))
    write("data/benchmark.jsonl", [{"text": "nothing of the kind is asked here"}])
    write("data/prompts.jsonl", [{"prompt": f"Say word {i}", "answer": str(i)} for i in range(9)])
    write("code/rewards.py", REWARDS)
    write("code/helpers/__init__.py", "")
    write("code/helpers/scale.py", "FACTOR = 1.0\n")
    write("code/judge.py", "def longer(completions):\n    return [float(len(text)) for text in completions]\n")
    write("tasks/mine.yaml", TASK)
    write("tasks/prompts.py", "def asked(row):\n    return row['question']\n")
    write("tasks/questions.jsonl", [{"question": f"{i}?", "options": ["a", "b"], "right": i % 2} for i in range(4)])
    write("tasks/other.yaml", TASK.replace("mine", "other").replace("questions", "others"))
    for name, values in RECIPES.items():
        write(f"{name}.yaml", yaml.safe_dump(values))


class Killed(BaseException):
    pass


def run_until(step: int, recipe: str) -> None:
    """Run, and be killed before that step."""
    take = TrainingLoop.step

    def stopping(self: TrainingLoop) -> None:
        if self.state.global_step == step:
            raise Killed
        take(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TrainingLoop, "step", stopping)
        prefold.run(recipe)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], Path]]:
    """Projects with a run in them, by method and state; each is made once."""
    projects: dict[tuple[str, str], Path] = {}

    def make(method: str, state: str) -> Path:
        if (method, state) in projects:
            return projects[method, state]
        folder = projects[method, state] = tmp_path_factory.mktemp("project")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            write_project()
            if method == "dpo":
                start = {**RECIPES["dpo"], "model": MODEL, "lora": {"r": 2}, "output_dir": "start", "evaluate": {}}
                write("start.yaml", yaml.safe_dump({**start, "train": {**TRAIN, "max_steps": 1}}))
                shutil.move(prefold.train("start.yaml") / "adapter", "models/adapter")
                shutil.rmtree("start")
            if state == "finished":
                prefold.run(f"{method}.yaml")
            else:
                run_until({"begun": 1, "half-done": 3}[state], f"{method}.yaml")
        return folder

    yield make


@pytest.fixture
def project(
    made: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str], Path]:
    """Go to a copy of one."""

    def copy(method: str, state: str) -> Path:
        original, folder = made(method, state), tmp_path / "project"
        shutil.copytree(original, folder)
        record = folder / "runs" / "mine" / "inputs.json"
        record.write_text(record.read_text().replace(str(original), str(folder)))
        monkeypatch.chdir(folder)
        return folder / "runs" / "mine"

    return copy


@dataclass(frozen=True)
class Case:
    """A change of a file: what is said, and the stages that are done again for it; none where it is refused."""

    method: str
    file: str
    change: Callable[[Path], object]
    said: str
    again: str = ""


def replaced(old: str, new: str) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return change


def scaled(path: Path) -> None:
    weights = load_file(path)
    name = min(weights)
    save_file({**weights, name: weights[name] * 1.5}, path, {"format": "pt"})


def shortened(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


CASES = {
    "rows": Case("dpo", "data/pairs.jsonl", shortened, "data/pairs.jsonl: 8 rows when this run read it, 7 now"),
    "a row": Case(
        *("dpo", "data/pairs.jsonl", replaced("WORD 3!", "WORD THREE!")),
        "data/pairs.jsonl has other rows than when this run read it, 8 as before",
    ),
    "rows of a folder": Case("dpo", "data/more/a.jsonl", shortened, "data/more/a.jsonl has changed"),
    "a file of a folder": Case("dpo", "data/more/b.jsonl", Path.unlink, "data/more/b.jsonl is gone"),
    "a file more": Case(
        *("dpo", "data/more/c.jsonl", lambda path: path.write_text(json.dumps(pairs(50, 1)[0]) + "\n")),
        "data/more/c.jsonl is new",
    ),
    "held-out rows": Case(
        "dpo", "data/held_out.jsonl", shortened, "data/held_out.jsonl: 6 rows when this run read it, 5 now"
    ),
    "a benchmark": Case("dpo", "data/benchmark.jsonl", replaced("kind", "sort"), "data/benchmark.jsonl has changed"),
    "weights": Case("dpo", "models/tiny/model.safetensors", scaled, "models/tiny/model.safetensors has changed"),
    "configuration": Case(
        "dpo", "models/tiny/config.json", replaced('"rope_', '"x": 1, "rope_'), "models/tiny/config.json has changed"
    ),
    "the tokenizer's template": Case(
        *("dpo", "models/tiny/chat_template.jinja", lambda path: path.write_text(path.read_text() + "{# #}")),
        "models/tiny/chat_template.jinja has changed",
    ),
    "generation settings": Case(
        *("dpo", "models/tiny/generation_config.json", replaced("{", '{"temperature": 0.5,')),
        "models/tiny/generation_config.json has changed",
    ),
    "a starting adapter": Case(
        *("dpo", "models/adapter/adapter_model.safetensors", scaled),
        "models/adapter/adapter_model.safetensors has changed",
    ),
    "a chat format": Case(
        *("grpo", "models/format.jinja", lambda path: path.write_text(path.read_text() + "{# #}")),
        "models/format.jinja has changed",
    ),
    "rows that rewards read": Case(
        *("grpo", "data/prompts.jsonl", replaced('"answer": "3"', '"answer": "4"')),
        "data/prompts.jsonl has other rows than when this run read it, 9 as before",
    ),
    "a reward": Case("grpo", "code/rewards.py", replaced("-FACTOR", "-2 * FACTOR"), "code/rewards.py has changed"),
    "what a reward imports": Case(
        "grpo", "code/helpers/scale.py", replaced("1.0", "9.0"), "code/helpers/scale.py has changed"
    ),
    "a judge": Case(
        "grpo", "code/judge.py", replaced("float(", "-float("), "code/judge.py has changed", "judge, report"
    ),
    "a task": Case(
        *("dpo", "tasks/mine.yaml", lambda path: path.write_text(path.read_text() + "num_fewshot: 0\n")),
        *("tasks/mine.yaml has changed", "evaluate, compare, report"),
    ),
    "the code of a task": Case(
        *("dpo", "tasks/prompts.py", replaced("row['question']", "'So ' + row['question']")),
        *("tasks/prompts.py has changed", "evaluate, compare, report"),
    ),
    "questions": Case(
        *("dpo", "tasks/questions.jsonl", replaced("3?", "three?")),
        *("tasks/questions.jsonl has changed", "evaluate, compare, report"),
    ),
    "a model to compare with": Case(
        *("dpo", "models/other/model.safetensors", scaled),
        *("models/other/model.safetensors has changed", "compare, report"),
    ),
}


def unwrapped(capfd: pytest.CaptureFixture[str]) -> str:
    return " ".join(capfd.readouterr().err.split())


def contents(folder: Path) -> dict[str, bytes]:
    """Of a run folder, without what every report writes anew."""
    written = ("report.html", "run.log", "timing.jsonl", "README.md")
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in written}


@pytest.mark.parametrize("name", CASES)
def test_a_finished_run(name: str, project: Callable[[str, str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    case = CASES[name]
    folder, recipe = project(case.method, "finished"), f"{case.method}.yaml"
    case.change(Path(case.file))
    before = contents(folder)
    for show in (prefold.report, lambda name: prefold.compare([name])):
        capfd.readouterr()
        show("runs/mine")
        said = unwrapped(capfd)
        assert "its inputs have changed since it was made" in said and case.said in said
    assert contents(folder) == before
    if case.again:
        prefold.run(recipe)
        said = unwrapped(capfd)
        assert f"out of date: {case.again} {case.said}" in said and "train: done before" in said
        capfd.readouterr()
        prefold.run(recipe)
        assert "out of date" not in unwrapped(capfd)
        return
    for stage in (prefold.run, prefold.train, prefold.merge, prefold.evaluate):
        with pytest.raises(UserError, match="holds a run whose inputs have changed since it was trained") as refused:
            stage(recipe)
        assert case.said in str(refused.value) and "`--fresh`" in str(refused.value)
        assert len(max(str(refused.value).split(), key=len)) < 50  # no digest
    assert contents(folder) == before


@pytest.mark.parametrize("name", CASES)
def test_a_half_done_run(name: str, project: Callable[[str, str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    case = CASES[name]
    folder, recipe = project(case.method, "half-done"), f"{case.method}.yaml"
    case.change(Path(case.file))
    before = contents(folder)
    if case.again:  # what has not been read yet may change
        prefold.train(recipe)
        assert case.said not in unwrapped(capfd)
        return
    with pytest.raises(UserError, match="changed since it began; it is at step 2") as refused:
        prefold.run(recipe)
    assert case.said in str(refused.value)
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["rows", "weights", "a reward"])
def test_before_the_first_checkpoint_it_begins_anew(
    name: str, project: Callable[[str, str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    folder, recipe = project(case.method, "begun"), f"{case.method}.yaml"
    case.change(Path(case.file))
    prefold.train(recipe)
    said = unwrapped(capfd)
    # The page of the run that began is there.
    assert (f"out of date: check, report {case.said}" in said) == (name != "a reward")
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()] == [1, 2, 3, 4]
    prefold.train(recipe)
    assert "train: done before" in unwrapped(capfd)


UNTOUCHED = (
    "data/pairs.jsonl",
    "models/tiny/model.safetensors",
    "models/adapter/adapter_config.json",
    "tasks/mine.yaml",
)


def test_what_is_touched_has_not_changed(
    project: Callable[[str, str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    project("dpo", "finished")
    for name in UNTOUCHED:
        content = Path(name).read_bytes()
        Path(name).unlink()
        Path(name).write_bytes(content)
        os.utime(name, (1e9, 1e9))
    Path("tasks/other.yaml").write_text("task: other\n")  # a task that is not asked
    Path("models/tiny/README.md").write_text("A model.")
    prefold.run("dpo.yaml")
    said = unwrapped(capfd)
    assert "out of date" not in said and said.count("done before") == 6


@pytest.mark.parametrize("gone", ["data/pairs.jsonl", "models/tiny", "models/adapter", "tasks", "models/other"])
def test_what_is_gone_leaves_the_results(
    gone: str, project: Callable[[str, str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = project("dpo", "finished")
    os.rename(gone, "gone")
    before = contents(folder)
    prefold.run("dpo.yaml")
    said = unwrapped(capfd)
    assert f"{gone} is not there any more; what was made of it is kept" in said and said.count("done before") == 6
    prefold.report("runs/mine")
    assert f"{gone} is not there any more" in unwrapped(capfd)
    assert contents(folder) == before


# ---- rewards that fail ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "works", ["len(CALLS) < 3", "not Path('runs/mine/merged').exists()"], ids=["train", "evaluate"]
)
def test_a_reward_that_failed_may_be_mended(
    works: str, project: Callable[[str, str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """And after that it is as any other."""
    folder = project("grpo", "begun")
    shutil.rmtree(folder)
    mended = Path("code/rewards.py").read_text()
    failing = mended.replace("    from", f"    CALLS.append(1)\n    assert {works}\n    from")
    Path("code/rewards.py").write_text(f"CALLS = []\n{failing}")
    with pytest.raises(UserError, match=r"code/rewards\.py, line"):
        prefold.run("grpo.yaml")
    assert (folder / "adapter").exists() == ("merged" in works)
    replaced("1.0", "2.0")(Path("code/helpers/scale.py"))
    Path("code/rewards.py").write_text(mended)
    capfd.readouterr()
    prefold.run("grpo.yaml")
    said = unwrapped(capfd)
    assert "code/rewards.py and code/helpers/scale.py have changed; that reward failed, and the run goes on" in said
    prefold.run("grpo.yaml")
    assert "changed" not in unwrapped(capfd)
    Path("code/rewards.py").write_text(f"{mended}\n")
    with pytest.raises(UserError, match=r"code/rewards\.py has changed"):
        prefold.run("grpo.yaml")


# ---- settings ---------------------------------------------------------------------------------------------------


def test_changed_settings(project: Callable[[str, str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    folder = project("dpo", "finished")
    before = contents(folder)
    for changes, said in {
        ("data.train=[{path: data/pairs.jsonl}]",): "`data.train.1.path` was 'data/more', is not there",
        ("train.max_steps=9", "method=orpo"): "settings: `method` was 'dpo', is 'orpo'",
        ("model.revision=main", "train.seed=1"): "`model.revision` was None, is 'main' `train.seed` was 42, is 1",
        ("model.name=models/other",): "`model.name` was 'models/tiny', is 'models/other'",
    }.items():
        with pytest.raises(UserError, match="was trained with other settings") as refused:
            prefold.run("dpo.yaml", changes)
        assert said in " ".join(str(refused.value).split())
    # A report is of the run as it is; what rests on outdated results is not made, and they are not removed for it.
    prefold.report("dpo.yaml", ["evaluate.prompts=1"])
    assert "`evaluate.prompts` was 2, is 1; the report is of the run as it was" in unwrapped(capfd)
    with pytest.raises(UserError, match="`publish` needs the output of `evaluate`, which is out of date"):
        prefold.publish("dpo.yaml", ["evaluate.prompts=1", "publish.to=out"])
    assert contents(folder) == before and not Path("out").exists()
    (folder / "samples.jsonl").unlink()  # what is left of a stage is named as well
    prefold.run("dpo.yaml", ["evaluate.prompts=1"])
    assert "out of date: evaluate, compare, report `evaluate.prompts` was 2, is 1" in unwrapped(capfd)


def test_fresh_removes_nothing_for_a_recipe_that_cannot_run(project: Callable[[str, str], Path]) -> None:
    folder = project("dpo", "finished")
    before = contents(folder)
    Path("data/pairs.jsonl").unlink()
    with pytest.raises(UserError, match=r"data/pairs\.jsonl: no such file"):
        prefold.run("dpo.yaml", fresh=True)
    assert contents(folder) == before


# ---- the Hub, digests -------------------------------------------------------------------------------------------


def test_a_model_of_the_hub_is_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = prefold.load_recipe(_written(tmp_path, "org/model"))
    commits = iter([None, "1a2b3c4d5e", "1a2b3c4d5e", "9f8e7d6c5b"])

    def cached(name: str, file: str, revision: str | None) -> str | None:
        commit = next(commits)
        return commit and f"/cache/models--org--model/snapshots/{commit}/config.json"

    monkeypatch.setattr(fingerprints, "try_to_load_from_cache", cached)
    fingerprints.record_inputs(tmp_path, recipe, "check")  # it has not been fetched yet
    fingerprints.record_inputs(tmp_path, recipe, "check", ended=True)
    assert fingerprints.changes(recipe, tmp_path) == []
    [change] = fingerprints.changes(recipe, tmp_path)
    assert change.text.startswith("org/model: commit 1a2b3c4 when this run read it, 9f8e7d6 now; `model.revision=1a2b")
    # Named by the recipe, it is no change of that.
    write_text(tmp_path / "recipe.yaml", dump_recipe(recipe))
    monkeypatch.setattr(
        fingerprints, "try_to_load_from_cache", lambda *_, revision: f"/snapshots/{revision}/config.json"
    )
    names = [
        prefold.load_recipe(_written(tmp_path, "org/model"), [f"model.revision={it}"]) for it in ("1a2b3c4d5e", "ff")
    ]
    assert [[stage.name for stage in outdated_stages(recipe, tmp_path)][:1] for recipe in names] == [[], ["check"]]


def _written(folder: Path, model: str) -> str:
    path = folder / "hub.yaml"
    values = {**RECIPES["dpo"], "model": {"name": model}, "data": {"train": [{"path": "builtin:short_answers"}]}}
    path.write_text(yaml.safe_dump({**values, "evaluate": {}}))
    return str(path)


def test_a_large_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefold.files.LARGE", 10)
    path = tmp_path / "weights"
    path.write_bytes(b"a" * 100)
    facts = path.stat()
    first = digest_of(path)
    path.write_bytes(b"b" * 100)  # within the same moment, with the same size and time
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert digest_of(path) != first
    monkeypatch.setattr(time, "time_ns", lambda: path.stat().st_ctime_ns + 10**10)
    second = digest_of(path)
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("read again"))
    assert digest_of(path) == second
