"""Out of memory, injected: the budget is lowered, the step done again, and nothing else changes. What is known not to
fit is refused before it is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from run_files import lines
from safetensors.torch import load_file
from tiny import random_trees, tiny_llama

import prefold
from prefold.errors import StageError, UserError
from prefold.memory import ANYWAY
from prefold.models.load import load_model
from prefold.recipe import RecipeBase
from prefold.reports.run_table import summary
from prefold.runs.opened import scorer_of
from prefold.terminal import as_text
from prefold.trees.logprobs import TreeLogprobs
from prefold.trees.packing import TokenTree
from prefold.trees.scorer import Scorer

MakeRecipe = Callable[..., RecipeBase]
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
]
ROOM = 230  # tokens: the three trees of the self-check fit, the four of a step do not


def room_for(tokens: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A device on which larger rows fail, in the backward pass too; the sizes of the rows that were tried."""
    score, tried = Scorer.score, []

    def limited(self: Scorer, trees: Sequence[TokenTree], *args: Any, **kwargs: Any) -> TreeLogprobs:
        found = score(self, trees, *args, **kwargs)
        size = sum(tree.size for tree in trees)
        tried.append(size)
        if size > tokens and found.tokens.requires_grad:

            def fail(grad: torch.Tensor) -> None:
                raise error

            found.tokens.register_hook(fail)
        elif size > tokens:
            raise error
        return found

    monkeypatch.setattr(Scorer, "score", limited)
    return tried


@pytest.mark.parametrize("error", ERRORS, ids=["gpu", "cpu"])
def test_the_step_is_done_again_in_smaller_parts(
    error: Exception,
    recipe: MakeRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    straight = prefold.train(recipe(lora={"lora_dropout": 0.0}, output_dir=str(tmp_path / "straight")))
    tried = room_for(ROOM, error, monkeypatch)
    monkeypatch.setenv("PREFOLD_CACHE", str(tmp_path / "another cache"))  # so that the reference is computed again
    folder = prefold.train(
        recipe(lora={"lora_dropout": 0.0}, train={"max_tokens": 512}, output_dir=str(tmp_path / "tight"))
    )
    assert max(tried) > ROOM
    assert "out of memory: the token budget goes from 512 to" in caplog.text
    budget = json.loads((folder / "checkpoints" / "checkpoint-6" / "prefold.json").read_text())["max_tokens"]
    assert budget <= 256
    for found, wanted in zip(lines(folder / "metrics.jsonl"), lines(straight / "metrics.jsonl"), strict=True):
        assert found == pytest.approx(wanted, rel=2e-4, abs=1e-5)


def test_a_lowered_budget_is_kept_by_the_checkpoint(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after step 2 and resumed where memory is plenty, the run ends with the bytes of a straight one."""
    from prefold.training.loop import TrainingLoop

    with monkeypatch.context() as patch:
        room_for(ROOM, ERRORS[0], patch)
        straight = prefold.train(recipe(train={"max_tokens": 512}, output_dir=str(tmp_path / "straight")))
        step = TrainingLoop.step

        def stopping(self: TrainingLoop) -> None:
            if self.state.global_step == 3:
                raise KeyboardInterrupt
            step(self)

        patch.setattr(TrainingLoop, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            prefold.train(recipe(train={"max_tokens": 512}))
    resumed = prefold.train(recipe(train={"max_tokens": 512}))
    name = "adapter/adapter_model.safetensors"
    wanted, found = load_file(straight / name), load_file(resumed / name)
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


def test_a_single_tree_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(tiny_llama(), 64, "prefold_joined")
    room_for(5, ERRORS[0], monkeypatch)
    with torch.no_grad(), pytest.raises(StageError, match=r"single prompt and its completions \(\d+ tokens\); set"):
        list(scorer.scored(random_trees(4)))


def test_other_errors_are_not_taken_for_it(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    room_for(5, RuntimeError("shapes do not match"), monkeypatch)
    with pytest.raises(RuntimeError, match="shapes"):
        prefold.train(recipe())


# ---- known before -----------------------------------------------------------------------------------------------


def test_each_stage_is_refused_before_it_loads(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = recipe(evaluate={"tasks": []})
    prefold.train(ours)
    prefold.merge(ours)
    with monkeypatch.context() as patch:
        patch.setattr("prefold.plan.machine.available", lambda: 0)
        patch.setattr("prefold.plan.machine.held", lambda: 10**6)
        for name in ("load_policy", "load_model"):
            patch.setattr(f"prefold.runs.opened.{name}", lambda *args, **kwargs: pytest.fail("a model was loaded"))
        for stage in ("merge", "evaluate"):
            with pytest.raises(UserError, match=rf"`{stage}`: needs .* of memory, and 1 MB are at hand") as refused:
                getattr(prefold, stage)(ours)
            assert "--anyway" in str(refused.value)
        patch.setenv(ANYWAY, "1")
        patch.setattr("prefold.runs.opened.load_model", load_model)
        assert prefold.evaluate(ours)["pairs"] > 0


def test_models_of_one_configuration_are_checked_once(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = recipe()
    checked: list[Scorer] = []

    def counted(*arguments: Any) -> Scorer:
        checked.append(scorer_of(*arguments))
        return checked[-1]

    monkeypatch.setattr("prefold.runs.measuring.scorer_of", counted)
    apart = json.loads((prefold.run(ours) / "evaluation" / "heldout.json").read_text())
    assert len(checked) == 1 and checked[0].packed
    monkeypatch.setattr("prefold.runs.measuring.OF_FILES", set())  # the name is one of its settings then
    assert prefold.evaluate(ours) == apart and len(checked) == 3


def test_evaluating_in_16_bits_is_said(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = recipe()
    in_float32 = json.loads((prefold.run(ours) / "evaluation" / "heldout.json").read_text())
    assert "widened" not in as_text(lambda console: console.print(summary(ours.run_folder)))
    monkeypatch.setattr("prefold.runs.limits._is_ample", lambda run: False)
    monkeypatch.setattr("prefold.plan.memory.Memory.in_16_bits", True)
    found = prefold.evaluate(ours)
    assert "weights in bfloat16" in capsys.readouterr().err
    assert found["weights_in_16_bits"] and "weights_in_16_bits" not in in_float32
    assert found["after"]["margin"] == pytest.approx(in_float32["after"]["margin"], abs=0.02)
    prefold.report(ours)
    for text in (
        (ours.run_folder / "report.html").read_text(),
        (ours.run_folder / "merged" / "README.md").read_text(),
        as_text(lambda console: console.print(summary(ours.run_folder))),
    ):
        assert "weights in 16 bits" in " ".join(text.split())


def test_the_timing_is_of_the_stage(recipe: MakeRecipe) -> None:
    """Not of the process so far: each stage begins anew."""
    stages = {
        line["stage"]: line["peak_memory_mb"]
        for line in lines(prefold.train(recipe()), "timing.jsonl")
        if "stage" in line
    }
    assert set(stages) == {"check", "train"} and all(50 < peak < 10_000 for peak in stages.values())
