"""Every benchmark starts and comes to its numbers, on a tiny model."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from multiprocessing import Pipe
from pathlib import Path
from threading import Thread
from typing import Any, cast

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from benchmarks import (
    equal_groups,
    full_size,
    gpu,
    margins,
    pages,
    planned,
    prefold_run,
    preparing,
    rollouts,
    startup,
    vs_lm_eval,
    vs_trl,
)
from benchmarks.sides import SOURCE, Side, TakenStep
from benchmarks.vs_trl import Measured
from prefold.cli import app
from prefold.models.tokenizer import load_tokenizer

Main = Callable[[list[str]], None]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFOLD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def summary_of(long_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """The last line of a benchmark."""

    def summary(main: Main, *arguments: str) -> dict[str, Any]:
        main([*arguments, "--model", str(long_model), "--results", str(tmp_path / "results")])
        found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return found

    return summary


class Line:
    """Stands in for a side's end of the connection: its turn is always now."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, answer: Any) -> None:
        self.sent.append(answer)

    def recv(self) -> str:
        return "go"


def measured(name: str, side: Callable[[Any, Any], None], work: Any) -> Measured:
    line = Line()
    side(line, work)
    ready, *steps, logged = line.sent
    assert ready == "ready"
    assert all(isinstance(step, TakenStep) for step in steps)
    found = Measured(name, logged=logged)
    for step in steps:
        found.add(step)
    return found


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sides without processes, which take seconds to import everything."""

    @contextmanager
    def started(self: Side) -> Iterator[Side]:
        self.connection, there = Pipe()
        module, function = self.target.split(":")

        def perform() -> None:
            with suppress(EOFError, ConnectionError):
                getattr(import_module(module), function)(there, self.work)

        thread = Thread(target=perform)
        thread.start()
        # Until it is ready: transformers' loading patches its classes meanwhile, which two threads cannot do at a time.
        assert self.connection.poll(120)
        yield self
        self.connection.close()
        thread.join()

    monkeypatch.setattr(Side, "running", started)


PAIRS = ["--pairs", "8", "--prompt", "10", "--chosen", "8", "--rejected", "6"]


def test_vs_trl(summary_of: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Both processes."""
    summary = summary_of(vs_trl.main, "dpo", *PAIRS)
    assert summary["loss_difference"] < 1e-5
    assert len(summary["spread"]) == 2
    saved = json.loads((tmp_path / "results" / "dpo-random-float32-cpu.json").read_text())
    assert len(saved["trl"]["seconds"]) == len(saved["prefold"]["seconds"]) == 2


GRPO = ["--prompts", "2", "--prompt-tokens", "400", "--group", "2", "--new-tokens", "6"]


@pytest.mark.parametrize(("method", "sizes"), [("orpo", PAIRS), ("grpo", GRPO)])
def test_the_other_methods_against_trl(method: str, sizes: list[str], long_model: Path, tmp_path: Path) -> None:
    from benchmarks import prefold_sides, trl_sides

    options = vs_trl.parse([method, *sizes, "--model", str(long_model)])
    workload, _ = vs_trl.workload_of(options)
    names = vs_trl.SIDES[method]
    theirs = measured("TRL", getattr(trl_sides, names[0]), workload)
    ours = measured("prefold", getattr(prefold_sides, names[1]), workload)
    summary = vs_trl.summarise(options, workload, theirs, ours, rate=1e9)
    assert len(theirs.seconds) == len(ours.seconds) == workload.steps == 2
    if method == "orpo":
        assert summary["loss_difference"] < 1e-5
    else:
        assert theirs.mean_lengths == ours.mean_lengths == [6, 6]
        assert summary["training_ratio"] > 0 < summary["rollout_ratio"]
    vs_trl.say(workload, theirs, ours, summary, skipped=0)


def test_another_source_tree(long_model: Path, tmp_path: Path) -> None:
    """`prefold train` of both trees, here of this one, with a cache of its own for each."""
    options = vs_trl.parse(["dpo", *PAIRS, "--model", str(long_model), "--base", str(SOURCE)])
    workload, _ = vs_trl.workload_of(options)
    with vs_trl.sides_of(options, workload) as sides:
        assert [side.source for side in sides] == [SOURCE, SOURCE]
        assert len({side.environment["PREFOLD_CACHE"] for side in sides}) == 2
        theirs, ours = (measured(side.name, prefold_run.train, side.work) for side in sides)
    summary = vs_trl.summarise(options, workload, theirs, ours, rate=1e9)
    assert len(ours.losses) == 2
    assert summary["loss_difference"] == 0
    assert summary["first_step_ratio"] > 0
    vs_trl.say(workload, theirs, ours, summary, skipped=0)


@pytest.mark.slow
def test_another_source_tree_in_processes(summary_of: Callable[..., dict[str, Any]]) -> None:
    assert summary_of(vs_trl.main, "dpo", *PAIRS, "--base", str(SOURCE))["loss_difference"] == 0


@pytest.mark.usefixtures("in_threads")
def test_vs_lm_eval(summary_of: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    labels = ["A", "B", "C"]
    for split in ("dev", "test"):
        questions = [
            {
                "id": f"{split}{i}",
                "question": f"What is {i}?",
                "choices": {"text": [f"a number {label}" for label in labels], "label": labels},
                "answerKey": labels[i % 3],
            }
            for i in range(4)
        ]
        text = "".join(json.dumps(question) + "\n" for question in questions)
        (tmp_path / f"arc_challenge_{split}.jsonl").write_text(text)
    sizes = ["--questions", "2", "--shots", "1", "--repeats", "1", "--batch-sizes", "2"]
    summary = summary_of(vs_lm_eval.main, *sizes, "--data", str(tmp_path))
    assert summary["loss_difference"] < 1e-3
    assert (tmp_path / "results" / "arc-1-float32-cpu.json").is_file()


def test_rollouts(summary_of: Callable[..., dict[str, Any]]) -> None:
    sizes = ["--prompts", "2", "--group", "2", "--prompt-tokens", "300", "--new-tokens", "4", "--repeats", "1"]
    assert summary_of(rollouts.main, *sizes)["ratio_equal_lengths"] > 0


def test_equal_groups(summary_of: Callable[..., dict[str, Any]]) -> None:
    sizes = ["--prompts", "2", "--group", "2", "--prompt-tokens", "300", "--new-tokens", "4", "--steps", "1"]
    summary = summary_of(equal_groups.main, *sizes)
    assert summary["ratio_step"] > 0 and summary["difference"] < 1e-5


@pytest.mark.usefixtures("in_threads")
def test_preparing(summary_of: Callable[..., dict[str, Any]], pairs: Path) -> None:
    summary = summary_of(preparing.main, "--data", str(pairs), "--rows", "40", "--repeats", "1")
    assert summary["ratio"] > 0
    assert all(peak > 10 for peak in summary["peak_mb"].values())


def test_margins(summary_of: Callable[..., dict[str, Any]], pairs: Path) -> None:
    summary = summary_of(margins.main, "--data", str(pairs), "--pairs", "3")
    assert summary["error_prefold"] < summary["margin_rms"]


@pytest.mark.usefixtures("in_threads")
def test_planned(summary_of: Callable[..., dict[str, Any]]) -> None:
    [entry] = summary_of(planned.main, "dpo-512")["settings"]
    assert entry["planned_mb"] > 0 < entry["measured_mb"]


@pytest.mark.usefixtures("in_threads")
def test_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A rehearsal on a CPU: over 4-bit weights made here, and as `prefold train`; both with TRL."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    parts = ["dpo-4bit", "grpo", "--device", "cpu", "--shape", "tiny"]
    gpu.main([*parts, "--results", str(tmp_path / "results")])
    outcome = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = {(entry["case"], entry.get("attention", entry["side"])): entry for entry in outcome["results"]}
    assert list(found) == [(case, side) for case in ("dpo-4bit", "grpo") for side in ("prefold_joined", "TRL")]
    for entry in found.values():
        assert len(entry["seconds"]) == 1 and entry["product_share"] > 0 and entry["tokens_per_second"] > 0
    assert all(entry["planned_bytes"] > 10**6 for entry in found.values() if entry["side"] == "prefold")
    assert found["grpo", "TRL"]["rollout_seconds"][0] > 0
    saved = json.loads((tmp_path / "results" / "gpu-tiny-cpu.json").read_text())
    assert saved["results"] == outcome["results"] and saved["products_tflops"] > 0


def test_gpu_says_what_fails_and_what_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(connection: Any, workload: Any) -> None:
        raise RuntimeError("no such kernel")

    assert gpu.taken(fails, cast(Any, None)) == {"failed": "RuntimeError: no such kernel"}
    connection, _there = Pipe()

    @contextmanager
    def silent(self: Side) -> Iterator[Side]:
        self.connection = connection
        yield self

    monkeypatch.setattr(Side, "running", silent)
    case = gpu.CASES["orpo-4bit"]
    results = gpu.results_of("orpo-4bit", case, gpu.workload_of(case, True, tmp_path), 1e9, time.monotonic())
    assert [entry["failed"] for entry in results] == ["out of time", "out of time"]


def test_gpu_checks() -> None:
    outcome = gpu.checks(seconds=300)
    assert outcome["whole"] and outcome["failed"] == []
    assert outcome["passed"] + outcome["skipped"] > 20


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no `chromium` on PATH")
def test_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages.main(["--runs", "3", "--rows", "200", "--repeats", "1", "--results", str(tmp_path)])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["median_ms"].keys() == pages.PAGES.keys() and summary["server_mb"] > 50
    assert (tmp_path / "pages-cpu.json").is_file()


def test_startup(summary_of: Callable[..., dict[str, Any]], pairs: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"method: dpo\nmodel: {{name: m}}\ndata: {{train: [{{path: {pairs}}}]}}\noutput_dir: run\n")
    summary = summary_of(startup.main, "--rounds", "1", "--recipe", str(recipe))
    assert all(summary[name] > 0 for name in ("missing_recipe", "recipes", "check_cold", "check_warm"))
    assert (tmp_path / "results" / "startup-cpu.json").is_file()


def test_startup_says_what_a_command_said(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no such recipe"):
        startup.processor_seconds(["-m", "prefold", "check", "nowhere"], tmp_path, expected=0)


def test_full_size(long_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every stage of the shipped recipe, here in this process: one by one they take as long as it takes to start."""
    # Cut as GGUF has a name for.
    tokenizer = load_tokenizer(long_model)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    chats = shutil.copytree(long_model, tmp_path / "chats")
    tokenizer.save_pretrained(chats)

    def performing(folder: Path, enter_limit: Callable[[], None]) -> full_size.Perform:
        def perform(stage: str, arguments: Sequence[str]) -> full_size.Performed:
            monkeypatch.setenv("PREFOLD_CACHE", str(folder / "cache"))
            done = CliRunner().invoke(app, list(arguments))
            why = repr(done.exception) if done.exit_code else ""
            return full_size.Performed(stage, done.exit_code, 1.0, 10**9, said=why, output=done.stdout)

        return perform

    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(full_size, "performing", performing)
    monkeypatch.setattr(full_size, "FILE_BYTES", 100_000)
    monkeypatch.setattr(full_size.signal, "signal", lambda *args: None)
    with pytest.raises(SystemExit) as ended:
        full_size.main(["tiny", "--rows", "4", "--model", str(chats), "--results", str(tmp_path / "results")])
    saved = json.loads((tmp_path / "results" / "full-size-tiny-cpu.json").read_text())
    assert not ended.value.code, saved
    planned = {stage["stage"] for stage in saved["stages"] if stage["planned"]}
    assert planned == {"train", "merge", "evaluate", "grpo: train"}
    assert all(stage["code"] == 0 for stage in saved["stages"])


def test_weights_of_a_full_size_model_are_made_file_by_file(long_model: Path, tmp_path: Path) -> None:
    full_size.make_model("tiny-llama", long_model, tmp_path)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.get_input_embeddings().weight.shape[0] == 1024 > len(load_tokenizer(tmp_path))
    up = model.get_submodule("model.layers.0.mlp.up_proj").weight.float()
    assert up.std().item() == pytest.approx(full_size.SPREAD, rel=0.05) and not torch.equal(up[0], up[1])


def test_a_stage_under_a_limit(tmp_path: Path) -> None:
    """Its memory is sampled, and what does not fit says so by itself; the folder goes with the process."""
    with full_size.scratch_folder() as folder, full_size.limited(0.5) as (kind, enter):
        done = full_size.performing(folder, enter)("version", ["--version"])
        assert (done.code, kind in ("cgroup", "ulimit -d")) == (0, True)
        assert done.peak is not None and 10**6 < done.peak < 500 * 10**6
        assert full_size.performing(folder, enter)("none", ["report", "nowhere"]).said.startswith("prefold: ")
    assert not folder.exists()
