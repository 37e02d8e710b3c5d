"""Every method through the whole pipeline, its steps split, resumed and measured, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_files import lines

import prefold
from prefold.algorithms import ALGORITHMS
from prefold.errors import UserError
from prefold.recipe import RecipeBase
from prefold.training.loop import TrainingLoop, TreeSet

MakeRecipe = Callable[..., RecipeBase]
OFFLINE = [name for name, algorithm in ALGORITHMS.items() if not algorithm.kind.samples]
COUPLED = ["aot", "aot_unpaired", "bco", "kto", "mixed"]
EXACT = {"lora": {"r": 4, "lora_dropout": 0.0}}


@pytest.mark.parametrize("method", OFFLINE)
def test_a_run_of_every_method(method: str, recipe: MakeRecipe) -> None:
    folder = prefold.run(recipe(method=method, train={"max_steps": 3, "learning_rate": 1e-3}))
    metrics = lines(folder)
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert all(torch.isfinite(torch.tensor(list(line.values()))).all() for line in metrics)
    heldout = json.loads((folder / "evaluation" / "heldout.json").read_text())
    assert heldout["pairs"] == 6 and (folder / "report.html").is_file()


@pytest.mark.parametrize("method", OFFLINE)
def test_splitting_a_step_changes_nothing(method: str, recipe: MakeRecipe, tmp_path: Path) -> None:
    def trained(name: str, max_tokens: int) -> list[dict[str, Any]]:
        train = {"max_steps": 3, "learning_rate": 1e-3, "max_tokens": max_tokens}
        return lines(prefold.train(recipe(method=method, train=train, output_dir=str(tmp_path / name), **EXACT)))

    for split, whole in zip(trained("split", 100), trained("whole", 10_000), strict=True):
        assert split == pytest.approx(whole, rel=1e-4, abs=2e-6)


@pytest.mark.parametrize("method", COUPLED)
def test_a_coupled_step_is_that_of_one_graph(method: str, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients by way of log-probs, row by row, against one backward pass through everything."""
    coupled, compared = TrainingLoop.coupled, []

    def checked(self: TrainingLoop, data: TreeSet, rows: list[list[int]], units: dict[str, int]) -> Any:
        found, model = coupled(self, data, rows, units), self.model
        grads = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        model.zero_grad()
        indices = [i for row in rows for i in row]
        policy = self.scorer.score([data.trees[i] for i in indices], **self.needs)
        output = self.loss_of(policy, data, indices)
        loss = torch.stack([total / units[unit] for unit, total in output.loss.items()]).sum()
        loss.backward()
        torch.testing.assert_close(found[0], loss.detach(), rtol=1e-5, atol=1e-6)
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                torch.testing.assert_close(grads[name], weight.grad, rtol=1e-4, atol=1e-6)
        compared.append(len(rows))
        return found

    monkeypatch.setattr(TrainingLoop, "coupled", checked)
    prefold.train(recipe(method=method, train={"max_steps": 2, "max_tokens": 100}, **EXACT))
    assert len(compared) == 2 and min(compared) > 1


@pytest.mark.parametrize("method", ["bco", "orpo", "kto"])
def test_a_resumed_run_is_a_straight_one(
    method: str, recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {"eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 1e-3, "warmup_steps": 0.9}
    straight = prefold.train(recipe(method=method, train=train, output_dir=str(tmp_path / "straight")))
    step = TrainingLoop.step

    def stopping(self: TrainingLoop) -> None:
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        step(self)

    stopped = recipe(method=method, train=train, output_dir=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingLoop, "step", stopping)
        prefold.train(stopped)
    resumed = prefold.train(stopped)
    assert lines(resumed) == lines(straight)
    name = "adapter/adapter_model.safetensors"
    assert (resumed / name).read_bytes() == (straight / name).read_bytes()


# ---- held-out metrics while training ----------------------------------------------------------------------------


@pytest.mark.parametrize("eval_steps, measured", [(2, [2, 4, 6]), (0.5, [3, 6])])
def test_held_out_metrics_while_training(eval_steps: float, measured: list[int], recipe: MakeRecipe) -> None:
    found = lines(prefold.train(recipe(train={"eval_steps": eval_steps})))
    assert [line["step"] for line in found if "eval_loss" in line] == measured
    assert found[-1].keys() >= {"eval_rewards/margins", "eval_rewards/accuracies", "eval_logps/chosen"}
    assert found[-1]["eval_loss"] < 0.69


def test_shares_of_all_steps(recipe: MakeRecipe) -> None:
    """A warm-up of 0.3 of 6 steps is one of 2, and checkpoints each 0.25 of them are each 2 steps."""
    shares = {"warmup_steps": 0.3, "save_steps": 0.25, "save_total_limit": 9, "learning_rate": 1e-3}
    folder = prefold.train(recipe(train=shares))
    rates = [line["learning_rate"] for line in lines(folder)]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [f"checkpoint-{n}" for n in (2, 4, 6)]


def test_held_out_metrics_are_those_of_training_on_the_same_pairs(recipe: MakeRecipe, pairs: Path) -> None:
    """Before the first update, and with the training pairs held out as well, both are the same numbers."""
    train = {"eval_steps": 1, "max_steps": 1, "batch_size": 20, "learning_rate": 1e-12}
    data = {"eval": [{"path": str(pairs)}], "eval_fraction": 0.0}
    (line,) = lines(prefold.train(recipe(data=data, train=train, **EXACT)))
    for name in ("loss", "logps/chosen", "logps/rejected"):
        assert line[f"eval_{name}"] == pytest.approx(line[name], rel=1e-5)


def test_the_best_checkpoint_is_what_goes_on(recipe: MakeRecipe, pairs: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    turned = tmp_path / "turned.jsonl"
    turned.write_text(
        "".join(json.dumps(row | {"chosen": row["rejected"], "rejected": row["chosen"]}) + "\n" for row in rows)
    )
    # What training learns is wrong on the held-out side, so the first measurement stays the best.
    data = {"eval": [{"path": str(turned)}], "eval_fraction": 0.0}
    folder = prefold.train(recipe(data=data, train={"eval_steps": 2, "load_best_model_at_end": True}))
    losses = {line["step"]: line["eval_loss"] for line in lines(folder) if "eval_loss" in line}
    assert min(losses, key=lambda step: losses[step]) == 2
    name = "adapter_model.safetensors"
    kept = (folder / "checkpoints" / "checkpoint-2" / name).read_bytes()
    assert (folder / "adapter" / name).read_bytes() == kept


def test_training_stops_early_where_nothing_gets_better(recipe: MakeRecipe) -> None:
    train = {"eval_steps": 1, "save_steps": 1, "metric_for_best_model": "loss", "early_stopping_patience": 2}
    folder = prefold.train(recipe(train={**train, "max_steps": 40, "learning_rate": 1.0}))
    assert 3 <= len(lines(folder)) < 40


def test_a_metric_that_there_is_not_is_told_before_the_first_step(recipe: MakeRecipe) -> None:
    train = {"eval_steps": 5, "metric_for_best_model": "eval_rewards/margin"}
    with pytest.raises(UserError, match=r"no metric `rewards/margin`(.|\n)*did you mean `rewards/margins`"):
        prefold.train(recipe(train=train))
    assert not (recipe().run_folder / "metrics.jsonl").exists()
    # Nothing was trained yet, so it can be mended without further ado.
    folder = prefold.train(recipe(train={**train, "metric_for_best_model": "rewards/margins"}))
    assert len(lines(folder)) == 6


@pytest.mark.parametrize(
    "train, message",
    [
        ({"load_best_model_at_end": True}, "needs held-out metrics while training; set `eval_steps`"),
        ({"greater_is_better": False}, "`greater_is_better` needs held-out metrics"),
        ({"eval_steps": 2, "early_stopping_patience": 1}, "needs a `metric_for_best_model`"),
        ({"eval_steps": 2, "greater_is_better": False}, "`greater_is_better` needs a `metric_for_best_model`"),
        ({"eval_steps": 2.5}, "`eval_steps` is a whole number of steps, or a share of all steps below 1"),
        ({"save_steps": 1.0}, "`save_steps` is a whole number of steps, or a share of all steps below 1"),
        ({"warmup_steps": 10.5}, "`warmup_steps` is a whole number of steps, or a share of all steps below 1"),
    ],
)
def test_settings_that_would_be_ignored_are_errors(train: dict[str, Any], message: str, recipe: MakeRecipe) -> None:
    with pytest.raises(UserError, match=message):
        recipe(train=train)


# ---- unpaired data ----------------------------------------------------------------------------------------------


def test_unpaired_rows(recipe: MakeRecipe, tmp_path: Path) -> None:
    path = tmp_path / "unpaired.jsonl"
    rows = [
        {
            "prompt": f"Say word {i % 10}",
            "completion": f"WORD {i}!" if i % 3 else f"word {i}, maybe",
            "label": i % 3 > 0,
        }
        for i in range(30)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = prefold.run(recipe(method="kto", data={"train": [{"path": str(path)}]}))
    assert json.loads((folder / "data.json").read_text())["sources"][0]["rows_used"] == 30
    assert set().union(*lines(folder)) >= {"kl", "rewards/chosen", "rewards/rejected", "rewards/margins"}
    assert json.loads((folder / "evaluation" / "heldout.json").read_text())["pairs"] >= 1
