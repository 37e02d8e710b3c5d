"""GRPO on a tiny model, as a user meets it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_files import lines
from safetensors.torch import load_file
from tiny_tokenizer import CHATML, make_tokenizer

import prefold
from prefold.errors import UserError
from prefold.recipe import RecipeBase, as_dict, make_recipe
from prefold.training.loop import TrainingLoop

MakeRecipe = Callable[..., RecipeBase]
SHORT = {"name": "length", "target": 3, "unit": "characters"}
"""Completions of a random model differ in this, if hardly ever in tokens: few of them end."""


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Say word {i}", "answer": i} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def grpo(recipe: MakeRecipe, prompts: Path) -> MakeRecipe:
    def make(grpo: dict[str, Any] | None = None, rewards: Any = None, **changes: Any) -> RecipeBase:
        return recipe(
            method="grpo",
            grpo={"num_generations": 4, "max_completion_length": 8, "beta": 0.04, **(grpo or {})},
            rewards=[SHORT] if rewards is None else rewards,
            **{
                "data": {"train": [{"path": str(prompts)}]},
                "lora": {"lora_dropout": 0.0},
                "train": {"batch_size": 3, "max_steps": 4, "learning_rate": 5e-3, "save_steps": 2},
                **changes,
            },
        )

    return make


def reward_file(folder: Path, body: str) -> list[dict[str, str]]:
    (folder / "mine.py").write_text(body)
    return [{"name": "mine", "file": str(folder / "mine.py")}]


def test_every_stage_leaves_its_outputs(grpo: MakeRecipe) -> None:
    folder = prefold.run(grpo())
    metrics = lines(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert set(metrics[0]) >= {
        "loss",
        "reward",
        "reward_std",
        "rewards/length/mean",
        "rewards/length/std",
        "frac_reward_zero_std",
        "completions/mean_length",
        "completions/min_length",
        "completions/max_length",
        "completions/clipped_ratio",
        "completions/mean_terminated_length",
        "kl",
        "entropy",
        "clip_ratio/region_mean",
        "sampling/sampling_logp_difference/mean",
    }
    # What is drawn is what is trained on.
    assert all(line["sampling/sampling_logp_difference/mean"] < 1e-5 for line in metrics)
    assert metrics[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics[-1]["kl"] > 1e-6
    assert metrics[0]["grad_norm"] > 0
    assert metrics[-1]["epoch"] == pytest.approx(12 / 8)

    rollouts = lines(folder / "rollouts.jsonl")
    assert [line["step"] for line in rollouts] == [step for step in (1, 2, 3, 4) for _ in range(3)]
    one = rollouts[0]["completions"][0]
    assert len(rollouts[0]["completions"]) == 4
    assert one["reward"] == -abs(3 - len(one["text"])) == one["scores"]["length"]
    assert sum(each["advantage"] for each in rollouts[0]["completions"]) == pytest.approx(0.0, abs=1e-9)

    found = json.loads((folder / "evaluation" / "rewards.json").read_text())
    assert set(found) == {"prompts", "before", "after", "difference"}
    assert found["difference"]["reward"] == pytest.approx(found["after"]["reward"] - found["before"]["reward"])
    assert not (folder / "evaluation" / "heldout.json").exists()
    written = {"prompt", "before", "after", "finish_reasons"}
    assert [set(sample) for sample in lines(folder / "samples.jsonl")] == [written] * 2
    assert (folder / "merged" / "model.safetensors").is_file()
    assert "reward" in (folder / "report.html").read_text()


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


class Stopped(BaseException):
    pass


OFTEN_EQUAL = """
def mine(prompts, completion_ids, **columns):
    return [float(sum(ids) % 31 == int(prompt[-1]["content"][-1])) for prompt, ids in zip(prompts, completion_ids)]
"""
"""Most groups get nothing but zeros."""


@pytest.mark.parametrize(
    ("settings", "stop"),
    [({}, 1), ({}, 3), ({"num_iterations": 2}, 3), ({"beta": 0.0, "resample": 2, "num_generations": 16}, 3)],
)
def test_a_stopped_run_ends_with_the_same_bytes(
    grpo: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], stop: int
) -> None:
    rewards = reward_file(tmp_path, OFTEN_EQUAL) if "resample" in settings else None
    changes: dict[str, Any] = {"grpo": settings, "rewards": rewards, "lora": {"lora_dropout": 0.1}}
    straight = prefold.train(grpo(**changes, output_dir=str(tmp_path / "straight")))
    step = TrainingLoop.step

    def stopping(self: TrainingLoop) -> None:
        if self.state.global_step == stop:
            raise Stopped
        step(self)

    monkeypatch.setattr(TrainingLoop, "step", stopping)
    with pytest.raises(Stopped):
        prefold.train(grpo(**changes))
    monkeypatch.setattr(TrainingLoop, "step", step)
    torch.manual_seed(99)  # the state of the random generator must not matter
    resumed = prefold.train(grpo(**changes))
    assert adapter(resumed) == adapter(straight)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert (resumed / name).read_bytes() == (straight / name).read_bytes(), name


def test_equal_groups_are_drawn_again(grpo: MakeRecipe, tmp_path: Path) -> None:
    """As often as it takes, and no more than the recipe allows; the others stay as they are."""
    rewards = reward_file(tmp_path, OFTEN_EQUAL)

    def groups(resample: int) -> tuple[list[Any], dict[str, Any]]:
        settings = {"beta": 0.0, "resample": resample, "num_generations": 12}
        train = {"batch_size": 4, "max_steps": 1, "learning_rate": 5e-3}
        folder = prefold.train(
            grpo(grpo=settings, rewards=rewards, train=train, output_dir=str(tmp_path / str(resample)))
        )
        return lines(folder / "rollouts.jsonl"), lines(folder / "metrics.jsonl")[0]

    def equal(group: dict[str, Any]) -> bool:
        return len({each["reward"] for each in group["completions"]}) == 1

    (before, metrics), (once, metrics_once), (after, metrics_after) = groups(0), groups(1), groups(30)
    again = [i for i, group in enumerate(before) if equal(group)]
    assert 0 < len(again) < 4
    assert "groups/drawn_again" not in metrics and metrics["groups/left_out"] == len(again)
    assert metrics_once["groups/drawn_again"] == len(again)
    for i in range(4):
        assert (once[i] != before[i]) == (i in again)
    assert not any(map(equal, after))
    assert metrics_after["groups/left_out"] == metrics_after["frac_reward_zero_std"] == 0
    assert len(again) <= metrics_after["groups/drawn_again"] <= 30 * len(again)


def test_failures_of_groups_that_are_drawn_again_are_counted(grpo: MakeRecipe, tmp_path: Path) -> None:
    body = "def mine(completions, **columns):\n    raise ValueError('no')\n"
    rewards = [{**reward_file(tmp_path, body)[0], "on_error": "skip"}, {"name": "length", "target": 3, "weight": 0.0}]
    train = {"batch_size": 2, "max_steps": 1, "learning_rate": 5e-3}
    folder = prefold.train(grpo(grpo={"beta": 0.0, "resample": 3}, rewards=rewards, train=train))
    (metrics,) = lines(folder / "metrics.jsonl")
    assert metrics["rewards/mine/failed"] == 4 * 2 * 4
    assert (metrics["groups/drawn_again"], metrics["groups/left_out"], metrics["grad_norm"]) == (6, 2, 0)


def test_splitting_a_step_changes_nothing(grpo: MakeRecipe, tmp_path: Path) -> None:
    """Rows of all groups and of one group each: the same completions, rewards and losses."""
    runs = []
    for budget in (4096, 1):
        train = {"max_tokens": budget, "batch_size": 3, "max_steps": 2, "learning_rate": 5e-3}
        folder = prefold.train(grpo(train=train, output_dir=str(tmp_path / str(budget))))
        runs.append((lines(folder / "metrics.jsonl"), load_file(folder / "adapter" / "adapter_model.safetensors")))
    for found, wanted in zip(runs[1][0], runs[0][0], strict=True):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    for name, tensor in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], tensor, rtol=1e-3, atol=1e-5)


def test_the_plain_path_trains_alike(grpo: MakeRecipe, tmp_path: Path) -> None:
    runs = []
    for attention in ("trees", "sdpa"):
        changes = {"model": {"attn_implementation": attention}, "grpo": {"temperature": 0.8}}
        folder = prefold.train(grpo(**changes, output_dir=str(tmp_path / attention)))
        runs.append(lines(folder / "metrics.jsonl")[:2])
    for packed, plain in zip(*runs, strict=True):
        assert packed == pytest.approx(plain, rel=1e-3, abs=1e-5)


def test_it_learns(grpo: MakeRecipe, tmp_path: Path) -> None:
    """A reward for odd token ids: half of them at first, nearly all after 16 steps."""
    body = (
        "def mine(completion_ids):\n    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]\n"
    )
    train = {"batch_size": 4, "max_steps": 16, "learning_rate": 5e-2, "save_steps": 50}
    rewards = reward_file(tmp_path, body)
    metrics = lines(
        prefold.train(grpo(rewards=rewards, train=train, lora="none", grpo={"beta": 0.0})) / "metrics.jsonl"
    )
    assert metrics[0]["reward"] < 0.65
    assert all(line["reward"] > 0.9 for line in metrics[-3:])


def test_several_steps_on_a_rollout(grpo: MakeRecipe) -> None:
    """Four steps are two rollouts; only the first step on each has metrics of rewards, and all its ratios are 1."""
    folder = prefold.train(grpo(grpo={"num_iterations": 2, "epsilon": 1e-4}))
    metrics = lines(folder / "metrics.jsonl")
    assert ["reward" in line for line in metrics] == [True, False, True, False]
    assert [line["clip_ratio/region_mean"] > 0 for line in metrics] == [False, True, False, True]
    assert {line["step"] for line in lines(folder / "rollouts.jsonl")} == {1, 3}


def test_full_fine_tuning(grpo: MakeRecipe) -> None:
    folder = prefold.run(grpo(lora="none", grpo={"beta": 0.0}))
    assert (folder / "evaluation" / "rewards.json").is_file()
    assert "kl" not in lines(folder / "metrics.jsonl")[0]


def test_all_completions_left_out(grpo: MakeRecipe) -> None:
    """One token is never enough to end: there is nothing to learn from, and no step goes wrong."""
    folder = prefold.train(grpo(grpo={"max_completion_length": 1, "mask_truncated_completions": True, "beta": 0.04}))
    metrics = lines(folder / "metrics.jsonl")
    assert [line["loss"] for line in metrics if line["completions/clipped_ratio"] == 1.0]
    assert all(line["grad_norm"] == 0 for line in metrics if line["completions/clipped_ratio"] == 1.0)


def test_rollouts_are_bounded(grpo: MakeRecipe) -> None:
    folder = prefold.train(grpo(train={"batch_size": 6, "max_steps": 1, "learning_rate": 5e-3}))
    assert len(lines(folder / "rollouts.jsonl")) == 4


def test_rewards_see_columns_and_say_nothing(grpo: MakeRecipe, tmp_path: Path) -> None:
    """A reward with an opinion on odd answers alone: the other groups have none, and teach nothing."""
    body = (
        "def mine(completions, answer, prompts):\n"
        "    assert all(p[-1]['content'] == f'Say word {a}' for p, a in zip(prompts, answer))\n"
        "    return [len(c) / 10 if a % 2 else None for c, a in zip(completions, answer)]\n"
    )
    folder = prefold.run(grpo(rewards=reward_file(tmp_path, body)))
    rollouts = lines(folder / "rollouts.jsonl")
    for group in rollouts:
        silent = int(group["prompt"][0]["content"].split()[-1]) % 2 == 0
        assert all((one["reward"] is None) == silent for one in group["completions"])
        assert not silent or all(one["advantage"] == 0 for one in group["completions"])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def mine(completions):\n    raise KeyError('no')\n", "failed: KeyError"),
        ("def mine(completions):\n    return [float('nan')] * len(completions)\n", "returned nan, not a finite number"),
        ("def mine(completions):\n    return [1.0]\n", "returned 1 values for 12 completions"),
    ],
)
def test_a_wrong_reward_stops_the_run(grpo: MakeRecipe, tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        prefold.train(grpo(rewards=reward_file(tmp_path, body)))
    assert message in str(caught.value)
    if "1 values" not in message:
        assert "prompt: 'Say word" in str(caught.value) and "completion: '" in str(caught.value)


def test_a_reward_that_may_fail_is_counted(grpo: MakeRecipe, tmp_path: Path) -> None:
    """It fails on the prompts with an odd number; only the other groups have rewards."""
    body = (
        "def mine(completions, answer):\n"
        "    return [len(c) / (a % 2 == 0) for c, a in zip(completions, answer, strict=True)]\n"
    )
    [reward] = reward_file(tmp_path, body)
    folder = prefold.run(grpo(rewards=[{**reward, "on_error": "skip"}]))
    for step, line in enumerate(lines(folder / "metrics.jsonl"), start=1):
        groups = [group for group in lines(folder / "rollouts.jsonl") if group["step"] == step]
        failing = [int(group["prompt"][0]["content"].split()[-1]) % 2 for group in groups]
        assert line["rewards/mine/failed"] == 4 * sum(failing)
        for group, fails in zip(groups, failing, strict=True):
            assert all((one["reward"] is None) == bool(fails) for one in group["completions"])
    assert "failed: ZeroDivisionError" in (folder / "run.log").read_text()


def test_out_of_memory_while_sampling(grpo: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on with fewer completions at a time, and is the same."""
    from prefold.generation import engine as generate

    straight = prefold.train(grpo(output_dir=str(tmp_path / "straight")))
    step = generate.decode

    def limited(model: Any, batches: Any, tokens: Any) -> torch.Tensor:
        found = step(model, batches, tokens)
        if len(tokens) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    monkeypatch.setattr(generate, "decode", limited)
    folder = prefold.train(grpo())
    assert "out of memory: the token budget of completions goes from" in (folder / "run.log").read_text()
    for found, wanted in zip(lines(folder / "metrics.jsonl"), lines(straight / "metrics.jsonl"), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_wandb_gets_a_table_of_completions(grpo: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client, offline."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = {"report_to": ["wandb"], "max_steps": 2, "batch_size": 3, "learning_rate": 5e-3}
    folder = prefold.train(grpo(train=settings, rewards=[SHORT, {"name": "repetition"}]))
    tables = [json.loads(path.read_text()) for path in (folder / "wandb").glob("offline-run-*/**/*.table.json")]
    assert len(tables) == 2
    shown = [{**dict(zip(table["columns"], row, strict=True))} for table in tables for row in table["data"]]
    groups = lines(folder / "rollouts.jsonl")
    assert len(shown) == 4 * len(groups) == 24
    by_text = {(row["step"], row["prompt"], row["completion"]): row for row in shown}
    for group in groups:
        for one in group["completions"]:
            row = by_text[group["step"], group["prompt"][0]["content"], one["text"]]
            assert row["reward"] == pytest.approx(one["reward"])
            assert row["advantage"] == pytest.approx(one["advantage"])
            assert row["rewards/length"] == one["scores"]["length"] and "rewards/repetition" in row


def test_the_report_shows_rollouts(grpo: MakeRecipe) -> None:
    page = (prefold.run(grpo()) / "report.html").read_text()
    assert 'id="rollouts"' in page and "Step <span" in page
    assert page.count("advantage <span") == 6  # the worst and the best at three steps
    assert "it starts at 0 (dashed)" in page


def test_a_reward_that_cannot_be_given_what_it_asks_for_is_found_by_check(grpo: MakeRecipe, tmp_path: Path) -> None:
    body = "def mine(completions, solution):\n    return [0.0] * len(completions)\n"
    with pytest.raises(UserError, match="needs `solution`, which is not there"):
        prefold.check(grpo(rewards=reward_file(tmp_path, body)))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("async def mine(completions): ...", "`mine`: is an async function"),
        ("import sys\nsys.exit(0)", "line 2: cannot be loaded: SystemExit: 0"),
        ("def mine(completions, answer): ...", "`mine`: needs `answer`, which is no column of the held-out rows"),
    ],
)
def test_what_can_be_known_of_a_reward_is_known_before_sampling(
    grpo: MakeRecipe, prompts: Path, tmp_path: Path, body: str, message: str
) -> None:
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text('{"prompt": "Say word 90"}\n')
    data = {"train": [{"path": str(prompts)}], "eval": [{"path": str(held_out)}], "eval_fraction": 0.0}
    made = grpo(rewards=reward_file(tmp_path, body), data=data)
    for command in (prefold.check, prefold.run):
        with pytest.raises(UserError) as caught:
            command(made)
        assert message in str(caught.value)
    assert not (made.run_folder / "rollouts.jsonl").exists()


def test_a_reward_has_no_say_in_anything_but_rewards(grpo: MakeRecipe, tmp_path: Path) -> None:
    """The same bytes, whatever it does to its arguments, the random generators and torch's settings."""
    changes = (
        "import random, numpy, torch\n"
        "def mine(completions, prompts, answer):\n"
        "    lengths = [float(len(completion)) for completion in completions]\n"
        "    random.seed(0), numpy.random.seed(0), torch.manual_seed(0), torch.set_grad_enabled(False)\n"
        "    torch.set_default_dtype(torch.float64)\n"
        "    [messages[-1].update(content='changed') for messages in prompts]\n"
        "    completions.clear(), answer.clear()\n"
        "    return lengths\n"
    )
    plain = "def mine(completions):\n    return [float(len(completion)) for completion in completions]\n"
    runs = {}
    for name, body in (("plain", plain), ("changes", changes)):
        made = grpo(rewards=reward_file(tmp_path, body), lora={"lora_dropout": 0.1}, output_dir=str(tmp_path / name))
        runs[name] = prefold.run(made)
    for file in ("adapter/adapter_model.safetensors", "metrics.jsonl", "rollouts.jsonl", "evaluation/rewards.json"):
        assert (runs["plain"] / file).read_bytes() == (runs["changes"] / file).read_bytes()


def test_check(grpo: MakeRecipe) -> None:
    facts = prefold.check(grpo(train={"max_steps": None, "batch_size": 3}, grpo={"num_iterations": 2})).as_json()
    assert facts["plan"]["optimizer_steps"] == 3 * 2  # 8 prompts, 3 a rollout
    assert list(facts["examples"][0]["tokens"]) == ["prompt"]


def test_a_model_without_an_end_token(grpo: MakeRecipe, tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    endless = tmp_path / "endless"
    make_tokenizer(CHATML, eos=None).save_pretrained(endless)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    model.save_pretrained(endless)
    with pytest.raises(UserError, match="names no end token"):
        prefold.train(grpo(model={"name": str(endless)}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grpo": {"num_generations": 1}}, "num_generations must be 2 or more"),
        ({"rewards": []}, "needs `rewards`"),
        ({"lora": "none"}, "full fine-tuning does not keep"),
        ({"method": "dpo"}, "`rewards` would be ignored by `method: dpo`"),
    ],
)
def test_wrong_recipes(grpo: MakeRecipe, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        if "method" in changes:
            values = as_dict(grpo())
            del values["grpo"]
            make_recipe({**values, **changes})
        grpo(**changes)


def test_a_changed_reward_is_refused_once_training_has_begun(grpo: MakeRecipe) -> None:
    prefold.train(grpo())
    with pytest.raises(UserError, match=r"`rewards\.0\.target` was 3, is 4"):
        prefold.train(grpo(rewards=[{"name": "length", "target": 4}]))


def test_fresh_removes_rollouts(grpo: MakeRecipe) -> None:
    folder = prefold.train(grpo())
    prefold.train(grpo(), fresh=True)
    assert len(lines(folder / "rollouts.jsonl")) == 4 * 3


def test_summary(grpo: MakeRecipe) -> None:
    from rich.console import Console

    from prefold.reports.run_table import summary

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary(prefold.run(grpo())))
    text = console.export_text()
    assert "held-out reward" in text and "held-out prompts" in text and "finished" in text


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "cispo"])
def test_in_bfloat16_with_checkpointing(grpo: MakeRecipe, loss_type: str) -> None:
    train = {"batch_size": 3, "max_steps": 2, "learning_rate": 5e-3, "gradient_checkpointing": True}
    settings = {"loss_type": loss_type, **({"epsilon_high": 5.0} if loss_type == "cispo" else {})}
    folder = prefold.train(grpo(model={"dtype": "bfloat16"}, train=train, grpo=settings))
    metrics = lines(folder / "metrics.jsonl")
    assert all(line["grad_norm"] > 0 for line in metrics)
    assert metrics[0]["kl"] < 1e-3


def test_reference_scores_are_of_pairs(grpo: MakeRecipe) -> None:
    with pytest.raises(UserError, match="`--reference` compares chosen with rejected"):
        prefold.check(grpo(), reference=True)


def test_held_out_losses_are_not_for_rollouts(grpo: MakeRecipe) -> None:
    with pytest.raises(UserError, match=r"`train\.eval_steps` measures the loss of held-out pairs"):
        grpo(train={"batch_size": 2, "max_steps": 2, "eval_steps": 1})
