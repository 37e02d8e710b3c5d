"""The stages on a tiny model, as a user meets them."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_files import lines
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefold
from prefold.data import mixture
from prefold.data.examples import Examples
from prefold.errors import StageError, UserError
from prefold.models.merged_files import MergedTensors
from prefold.recipe import RecipeBase
from prefold.reports import live
from prefold.training.loop import TrainingLoop
from prefold.trees.packing import TokenTree

MakeRecipe = Callable[..., RecipeBase]


@pytest.mark.usefixtures("exact_plan")
def test_every_stage_leaves_its_outputs(recipe: MakeRecipe, tiny_model: Path) -> None:
    folder = prefold.run(recipe())
    heldout = json.loads((folder / "evaluation" / "heldout.json").read_text())
    assert heldout["pairs"] == 6
    assert set(heldout) == {"pairs", "before", "after", "difference", "reward"}
    assert set(heldout["before"]) == {"accuracy", "accuracy_ci", "margin"}
    known = {"accuracy", "ci", "p_value", "tests", "changed", "detectable", "verdict"}
    assert set(heldout["difference"]) == known
    assert heldout["after"]["margin"] > heldout["before"]["margin"]
    assert heldout["reward"]["margin"] > 0

    metrics = lines(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert metrics[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert not {"seconds", "time", "runtime"} & set(metrics[0])

    samples = lines(folder / "samples.jsonl")
    assert [set(sample) for sample in samples] == [{"prompt", "before", "after", "finish_reasons"}] * 2
    assert all(set(sample["finish_reasons"]) == {"before", "after"} for sample in samples)
    assert json.loads((folder / "merge.json").read_text())["relative_difference"] < 1e-4
    assert (folder / "report.html").stat().st_size > 10_000

    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert (merged.lm_head.weight == base.lm_head.weight).all()
    assert not torch.equal(merged.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)
    assert AutoTokenizer.from_pretrained(folder / "merged").chat_template
    assert merged.generation_config.eos_token_id == base.generation_config.eos_token_id


def test_what_is_done_is_skipped(recipe: MakeRecipe) -> None:
    folder = prefold.run(recipe())
    before = {
        path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != "recipe.yaml"
    }
    prefold.run(recipe())
    after = {
        path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != "recipe.yaml"
    }
    assert {path.name for path in before if before[path] != after[path]} <= {"run.log"}


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("stop", [1, 3, 4])
@pytest.mark.parametrize("lora", [{}, "none"], ids=["lora", "full"])
def test_a_stopped_run_ends_with_the_same_bytes(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, lora: Any
) -> None:
    straight = prefold.train(recipe(lora=lora, output_dir=str(tmp_path / "straight")))
    step = TrainingLoop.step

    def stopping(self: TrainingLoop) -> None:
        if self.state.global_step == stop:
            raise Stopped
        step(self)

    monkeypatch.setattr(TrainingLoop, "step", stopping)
    with pytest.raises(Stopped):
        prefold.train(recipe(lora=lora))
    monkeypatch.setattr(TrainingLoop, "step", step)
    torch.manual_seed(99)  # the state of the random generator must not matter
    resumed = prefold.train(recipe(lora=lora))
    weights = "trained/model.safetensors" if lora == "none" else "adapter/adapter_model.safetensors"
    for name in ("metrics.jsonl", weights):
        assert (resumed / name).read_bytes() == (straight / name).read_bytes(), name


def test_an_interrupted_checkpoint_is_not_taken_for_one(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def half_written(*args: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("prefold.training.loop.save_states", half_written)
        prefold.train(recipe())
    checkpoints = recipe().run_folder / "checkpoints"
    assert [path.name for path in checkpoints.iterdir() if not path.name.startswith(".")] == []
    prefold.train(recipe())
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-4", "checkpoint-6"]


def test_splitting_a_step_changes_nothing(recipe: MakeRecipe, tmp_path: Path) -> None:
    """One row of four pairs, rows of one pair, and uneven rows."""
    runs = []
    for budget in (4096, 1, 150):
        settings = {"max_tokens": budget, "max_steps": 4}
        folder = prefold.train(
            recipe(lora={"lora_dropout": 0.0}, train=settings, output_dir=str(tmp_path / str(budget)))
        )
        runs.append((lines(folder / "metrics.jsonl"), load_file(folder / "adapter" / "adapter_model.safetensors")))
    for metrics, weights in runs[1:]:
        for found, wanted in zip(metrics, runs[0][0], strict=True):
            for name, value in wanted.items():
                assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
        for name, tensor in runs[0][1].items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-5)


def test_the_plain_path_trains_alike(recipe: MakeRecipe, tmp_path: Path) -> None:
    runs = []
    for attention in ("trees", "sdpa"):
        changes = {"lora": {"lora_dropout": 0.0}, "model": {"attn_implementation": attention}}
        folder = prefold.train(recipe(**changes, output_dir=str(tmp_path / attention)))
        runs.append(lines(folder / "metrics.jsonl"))
    for packed, plain in zip(*runs, strict=True):
        assert packed["loss"] == pytest.approx(plain["loss"], rel=1e-4)
        assert packed["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)


def test_the_last_step_takes_what_is_left(recipe: MakeRecipe) -> None:
    """14 training pairs, 2 epochs, 4 a step: 7 steps; every pair twice."""
    folder = prefold.train(recipe(train={"max_steps": None, "num_train_epochs": 2}))
    metrics = lines(folder / "metrics.jsonl")
    assert len(metrics) == 7
    assert metrics[-1]["epoch"] == 2


def test_another_recipe_is_refused_once_training_has_begun(recipe: MakeRecipe) -> None:
    prefold.train(recipe())
    with pytest.raises(UserError, match=r"`train.learning_rate` was 0.005, is 0.1"):
        prefold.run(recipe(train={"learning_rate": 0.1}))
    prefold.train(recipe(train={"learning_rate": 0.1}), fresh=True)
    assert lines(recipe().run_folder / "metrics.jsonl")[0]["learning_rate"] == pytest.approx(0.1)


def test_a_changed_evaluation_is_done_again(recipe: MakeRecipe) -> None:
    folder = prefold.run(recipe())
    adapter = (folder / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    prefold.run(recipe(evaluate={"prompts": ["Say hello", "Say goodbye", "Say it"]}))
    assert len(lines(folder / "samples.jsonl")) == 3
    assert (folder / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == adapter


def test_changed_data_is_refused(recipe: MakeRecipe, pairs: Path) -> None:
    prefold.train(recipe())
    pairs.write_text(pairs.read_text().replace("WORD 3!", "WORD THREE!"))
    with pytest.raises(UserError, match=r"pairs\.jsonl has other rows than when this run read it, 20 as before"):
        prefold.run(recipe())


def test_stages_one_by_one(recipe: MakeRecipe) -> None:
    with pytest.raises(UserError, match=r"(?s)`merge` needs the output of `check`.*`prefold train`"):
        prefold.merge(recipe())
    folder = prefold.train(recipe())
    with pytest.raises(UserError, match="`evaluate` needs the output of `merge`"):
        prefold.evaluate(recipe())
    assert prefold.merge(recipe()) == folder / "merged"
    assert prefold.evaluate(recipe())["pairs"] == 6
    assert prefold.report(recipe()).read_text().startswith("<!doctype html>")


def test_a_folder_with_other_things_is_left_alone(recipe: MakeRecipe) -> None:
    folder = recipe().run_folder
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="neither empty nor a run folder"):
        prefold.run(recipe(), fresh=True)
    assert (folder / "thesis.txt").exists()


def test_fresh_keeps_what_is_not_ours(recipe: MakeRecipe) -> None:
    folder = prefold.train(recipe())
    (folder / "notes.txt").write_text("mine")
    prefold.train(recipe(), fresh=True)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_wrong_merge_fails_the_stage_and_keeps_the_adapter(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MergedTensors, "__getitem__", lambda self, name: self._base(name, self.shapes[name].dtype))
    with pytest.raises(StageError, match="not base \\+ adapter"):
        prefold.run(recipe())
    folder = recipe().run_folder
    assert (folder / "adapter").is_dir()
    assert not (folder / "merged").exists()
    assert not list(folder.glob(".merged*"))


def test_full_fine_tuning(recipe: MakeRecipe) -> None:
    folder = prefold.run(recipe(lora="none", train={"learning_rate": 1e-3}))
    trained = load_file(folder / "trained" / "model.safetensors")
    merged = load_file(folder / "merged" / "model.safetensors")
    assert all(torch.equal(trained[name], merged[name]) for name in trained)
    assert json.loads((folder / "evaluation" / "heldout.json").read_text())["reward"]["margin"] > 0


def test_no_home_path_and_no_secret_in_the_run_folder(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_planted_secret")
    folder = prefold.run(recipe())
    for path in folder.rglob("*"):
        if path.is_file() and "checkpoints" not in path.parts:
            content = path.read_bytes()
            assert b"hf_planted_secret" not in content, path
            assert str(tmp_path).encode() not in content, path


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_trackers(recipe: MakeRecipe, tracker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real clients, offline."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = {"report_to": [tracker], "project": "some-project", "run_name": "some-run", "max_steps": 2}
    folder = prefold.train(recipe(train=settings))
    if tracker == "tensorboard":
        assert list((folder / "tensorboard").rglob("events*"))
        return
    [run] = (folder / "wandb").glob("offline-run-*")
    [log] = run.glob("*.wandb")
    content = log.read_bytes()
    for text in (b"some-project", b"some-run", b"rewards/margins", b"rewards/accuracies", b"logps/chosen"):
        assert text in content, text


def test_samples_follow_the_recipe(recipe: MakeRecipe) -> None:
    evaluation = {
        "prompts": ["Say it"],
        "system": "You shout.",
        "num_answers": 3,
        "temperature": 1.5,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.01,
    }
    [sample] = lines(prefold.run(recipe(evaluate=evaluation)) / "samples.jsonl")
    assert sample["prompt"] == [{"role": "system", "content": "You shout."}, {"role": "user", "content": "Say it"}]
    assert len(sample["before"]) == len(sample["after"]) == 3
    assert len(set(sample["before"])) > 1


def test_the_reference_is_computed_once(recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prefold.train(recipe())
    [cached] = (tmp_path / "cache" / "reference").iterdir()

    def not_again(*args: Any) -> Any:
        raise AssertionError("the reference was computed again")

    monkeypatch.setattr("prefold.trees.reference.compute_reference", not_again)
    shutil.rmtree(first)
    prefold.train(recipe())
    with pytest.raises(AssertionError):
        prefold.train(recipe(data={"eval_fraction": 0.05}), fresh=True)
    assert cached.is_file()


def test_models_are_released(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a stage has ended, no model is left in memory."""
    import gc

    from transformers import PreTrainedModel

    from prefold.runs import evaluate as evaluating
    from prefold.runs import merge as merging
    from prefold.runs import train as training

    # Other tests may keep models of their own.
    before = {id(thing) for thing in gc.get_objects() if isinstance(thing, PreTrainedModel)}
    left: dict[str, int] = {}

    def counting(name: str, stage: Callable[[RecipeBase], None]) -> Callable[[RecipeBase], None]:
        def counted(recipe: RecipeBase) -> None:
            stage(recipe)
            gc.collect()
            models = {id(thing) for thing in gc.get_objects() if isinstance(thing, PreTrainedModel)}
            left[name] = len(models - before)

        return counted

    for module, name in ((training, "train"), (merging, "merge"), (evaluating, "evaluate")):
        monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    prefold.run(recipe())
    assert left == {"train": 0, "merge": 0, "evaluate": 0}


def test_data_are_tokenized_once_and_a_merge_reads_three_trees(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the commands one after another, each as a process of its own would."""
    tokenized, read = [], []
    tokenize, tree_of = mixture.tokenize_all, Examples._tree

    def counted(*args: Any) -> Any:
        tokenized.append(args)
        return tokenize(*args)

    def counted_tree(self: Examples, index: int) -> TokenTree:
        read.append(index)
        return tree_of(self, index)

    monkeypatch.setattr(mixture, "tokenize_all", counted)
    checked = prefold.check(recipe())
    assert tokenized
    tokenized.clear()
    assert prefold.check(recipe()).as_json()["findings"] == checked.as_json()["findings"]
    folder = prefold.train(recipe())
    assert json.loads((folder / "data.json").read_text())["sources"] == checked.as_json()["sources"]
    monkeypatch.setattr(Examples, "_tree", counted_tree)
    prefold.merge(recipe())
    assert tokenized == [] and len(read) == 3


def test_a_kept_reference_is_of_these_settings_of_the_model(
    recipe: MakeRecipe, tiny_model: Path, tmp_path: Path
) -> None:
    """The same weights by another configuration: at the first step the policy is still its reference."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    changes: dict[str, Any] = {"model": {"name": str(base)}, "lora": {"lora_dropout": 0.0}, "train": {"max_steps": 1}}
    for eps in (1e-6, 0.1):
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": eps}))
        folder = prefold.train(recipe(**changes, output_dir=str(tmp_path / f"eps-{eps}")))
        assert lines(folder / "metrics.jsonl")[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)


def test_the_page_moves(recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "LEAST", 0.0)
    monkeypatch.setattr(live, "SHARE", 100.0)
    page, headlines, ended = tmp_path / "run" / "report.html", [""], threading.Event()

    def look() -> None:
        while not ended.wait(0.005):
            text = page.read_text(encoding="utf-8") if page.is_file() else ""
            if headline := re.search("<h1>(.*)</h1>", text):
                headlines.append(headline[1])

    looking = threading.Thread(target=look)
    looking.start()
    try:
        prefold.run(recipe(output_dir=str(page.parent)))
    finally:
        ended.set()
        looking.join()
    steps = [int(step[1]) for headline in headlines if (step := re.fullmatch(r"Training, (\d) of 6", headline))]
    assert steps == sorted(steps) and len(set(steps)) > 2
    assert any(headline.startswith("Checking") for headline in headlines)
    assert 'http-equiv="refresh"' not in page.read_text(encoding="utf-8")
