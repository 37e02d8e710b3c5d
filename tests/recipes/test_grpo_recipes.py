"""The recipes that train on rollouts, whole, on tiny random models and rows in the shape of their data."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from run_files import lines

import prefold
from prefold.recipe import load_recipe


def stand_in(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return json.dumps([{"path": str(path)}])


def run(name: str, model: Path, folder: Path, *changes: str) -> Path:
    small = ("train.max_steps=2", "train.batch_size=2", "train.learning_rate=1e-2", "train.report_to=[]")
    short = ("grpo.max_completion_length=8", "evaluate.prompts=1", "evaluate.max_new_tokens=4")
    return prefold.run(name, [f"model.name={model}", *small, *short, *changes, f"output_dir={folder}"])


def problem(number: int) -> dict[str, str]:
    return {
        "question": f"Ann has {number} apples and eats one. How many are left?",
        "answer": f"She has {number} - 1 = <<{number}-1={number - 1}>>{number - 1} apples.\n#### {number - 1}",
    }


def test_gsm8k(tiny_model: Path, tmp_path: Path) -> None:
    train = stand_in(tmp_path / "train.jsonl", [problem(number) for number in range(2, 12)])
    held_out = stand_in(tmp_path / "test.jsonl", [problem(number) for number in range(20, 24)])
    folder = run(
        "smollm2-gsm8k",
        tiny_model,
        tmp_path / "run",
        f"data.train={train}",
        f"data.eval={held_out}",
        "train.warmup_steps=0",
    )
    for line in lines(folder / "metrics.jsonl"):
        assert line["reward"] == pytest.approx(line["rewards/exact_number/mean"] + 0.2 * line["rewards/regex/mean"])
    groups = lines(folder / "rollouts.jsonl")
    assert [message["role"] for message in groups[0]["prompt"]] == ["system", "user"]
    assert "####" in groups[0]["prompt"][0]["content"] and "apples" in groups[0]["prompt"][1]["content"]
    assert json.loads((folder / "evaluation" / "rewards.json").read_text())["prompts"] == 4


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("3 - 1 = 2\n#### 2", True),
        ("so\n####1,250.50\n", True),
        ("so\n#### $-3", True),
        ("#### -3", True),
        ("#### 2 apples", False),
        ("#### 2\nThat is it.", False),
        ("it is #### 2", False),
        ("2", False),
    ],
)
def test_gsm8k_format(text: str, right: bool) -> None:
    [_, format_reward] = load_recipe("smollm2-gsm8k").rewards
    assert bool(re.search(format_reward.settings["pattern"], text)) == right


def test_length(tiny_model: Path, tmp_path: Path) -> None:
    folder = run("smollm2-length", tiny_model, tmp_path / "run")
    groups = lines(folder / "rollouts.jsonl")
    assert all(one["reward"] == -abs(50 - one["tokens"]) for group in groups for one in group["completions"])
    assert json.loads((folder / "evaluation" / "rewards.json").read_text())["prompts"] >= 40


def test_smolgrpo(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    posts = [{"prompt": f"A post about day {day}, and what came of it. TL;DR:", "completion": "x"} for day in range(40)]
    train = stand_in(tmp_path / "train.jsonl", posts)
    folder = run("smolgrpo", tiny_model, tmp_path / "run", f"data.train={train}")
    groups = lines(folder / "rollouts.jsonl")
    assert all(one["reward"] == -abs(50 - len(one["text"])) for group in groups for one in group["completions"])
    # As the tutorial had them: a KL divergence without a weight, and sampling of the answers.
    assert lines(folder / "metrics.jsonl")[1]["kl"] > 0
    shown = load_recipe("smolgrpo").evaluate
    assert (shown.prompts, shown.max_new_tokens, shown.num_answers) == (8, 256, 1)
    assert (shown.temperature, shown.min_p, shown.top_p, shown.top_k) == (0.5, 0.1, 1.0, 0)
