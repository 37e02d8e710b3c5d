"""GRPO and pairs on a real vLLM server, where there is one (docs/servers.md)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from run_files import lines

import prefold
from prefold.recipe import make_recipe

URL, MODEL = os.environ.get("PREFOLD_VLLM_URL"), os.environ.get("PREFOLD_VLLM_MODEL")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (URL and MODEL), reason="PREFOLD_VLLM_URL and PREFOLD_VLLM_MODEL name no server"),
]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    things = ["a cat", "the sea", "a train", "winter", "bread", "a piano", "the moon", "a garden"]
    path.write_text("".join(json.dumps({"prompt": f"Describe {thing} in a few words."}) + "\n" for thing in things * 2))
    return path


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "top_p": 0.9}])
def test_ten_steps(prompts: Path, tmp_path: Path, settings: dict[str, float]) -> None:
    recipe = make_recipe(
        {
            "method": "grpo",
            "model": {"name": MODEL, "dtype": "float32"},
            "lora": {"r": 16},
            "grpo": {"num_generations": 8, "max_completion_length": 48, **settings},
            "rewards": [{"name": "length", "target": 20}],
            "data": {"train": [{"path": str(prompts)}]},
            "train": {"batch_size": 4, "max_steps": 10, "learning_rate": 3e-4},
            "generation": {"engine": "vllm", "urls": [URL]},
            "output_dir": str(tmp_path / "run"),
        }
    )
    metrics = lines(prefold.train(recipe) / "metrics.jsonl")
    assert len(metrics) == 10
    assert all(line["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=0.05) for line in metrics)
    rewards = [line["reward"] for line in metrics]
    assert sum(rewards[-3:]) > sum(rewards[:3])


def test_pairs(prompts: Path, tmp_path: Path) -> None:
    assert URL and MODEL
    settings = {"server": URL, "reward": "length:target=10", "max_new_tokens": 48, "temperature": 1.0}
    report = prefold.pairs(prompts, MODEL, tmp_path / "pairs.jsonl", **settings)
    assert report.prompts == 16 and report.answers == 64
