"""SIGKILL at any moment, while checkpoints are written and weights merged too: started again, a run ends alike."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any, NamedTuple

import killing
import pytest

pytestmark = pytest.mark.slow

BEST = {"eval_steps": 1, "load_best_model_at_end": True, "early_stopping_patience": 5}
TRAIN = {"batch_size": 4, "max_steps": 9, "learning_rate": 5e-3, "save_steps": 2}
METHODS: dict[str, dict[str, Any]] = {
    # What it learns is wrong on the held-out side: the first checkpoint stays the best, and the run stops early.
    "dpo": {"method": "dpo", "train": {**TRAIN, **BEST}},
    "grpo": {
        "method": "grpo",
        "train": {**TRAIN, "max_steps": 5},
        "grpo": {"num_generations": 4, "max_completion_length": 8, "beta": 0.04},
        "rewards": [{"name": "length", "target": 3, "unit": "characters"}],
    },
}


class Straight(NamedTuple):
    """A run that nothing ended, and its file operations."""

    values: dict[str, Any]
    cache: Path
    operations: int


def moments(method: str, count: int) -> list[tuple[str, float, float]]:
    """Shares of a run's file operations, one drawn in each part of it, and seconds from there: none for every other."""
    draw = random.Random(20)
    return [
        (method, round(0.9 * (place + draw.random()) / count, 3), place % 2 * round(draw.uniform(0.01, 0.3), 2))
        for place in range(count)
    ]


@pytest.fixture(scope="module")
def straight(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Straight]:
    folder = tmp_path_factory.mktemp("killed")
    pairs = folder / "pairs.jsonl"
    rows = [{"prompt": f"Say word {i}", "chosen": f"WORD {i}!", "rejected": f"word {i}, maybe"} for i in range(20)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    turned = folder / "turned.jsonl"
    answers = [{"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:6]]
    turned.write_text("".join(json.dumps(row) + "\n" for row in answers))
    found = {}
    for name, changes in METHODS.items():
        values = {
            "model": {"name": str(tiny_model), "dtype": "float32"},
            "lora": {"r": 4, "lora_dropout": 0.1},
            "data": {"train": [{"path": str(pairs)}], "eval": [{"path": str(turned)}]},
            "evaluate": {"prompts": 2, "max_new_tokens": 8},
            "output_dir": str(folder / name),
            **changes,
        }
        if name == "grpo":
            prompts = folder / "prompts.jsonl"
            prompts.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
            values["data"] = {"train": [{"path": str(prompts)}], "eval_fraction": 0.3}
        killing.run({**values, "output_dir": str(folder / "warm")}, folder / "cache")
        assert killing.run(values, folder / "cache") == 0
        found[name] = Straight(values, folder / "cache", int((folder / f"{name}.operations").read_text()))
        (folder / "warm").rename(folder / f"warm-{name}")
    return found


@pytest.mark.parametrize(("method", "share", "delay"), moments("dpo", 20) + moments("grpo", 10))
def test_a_killed_run_ends_with_the_same_bytes(
    method: str, share: float, delay: float, straight: dict[str, Straight], tmp_path: Path
) -> None:
    wanted = straight[method]
    values = {**wanted.values, "output_dir": str(tmp_path / "run")}
    assert killing.run(values, wanted.cache, 1 + int(share * wanted.operations), delay) == -signal.SIGKILL
    print(f"\n{method} killed {delay} s after {share:.0%} of its file operations: {left(tmp_path / 'run')}")
    assert killing.run(values, wanted.cache) == 0
    assert_same(tmp_path / "run", Path(wanted.values["output_dir"]))


def left(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("*")) if folder.is_dir() else []
    return ", ".join([*names, *sorted(path.name for path in folder.glob("checkpoints/*"))]) or "nothing"


def assert_same(found: Path, wanted: Path) -> None:
    compared = ["metrics.jsonl", "guards.json", "adapter/adapter_model.safetensors", "merged/model.safetensors"]
    compared += [str(path.relative_to(wanted)) for path in wanted.glob("evaluation/*.json")]
    compared += [name for name in ("rollouts.jsonl", "samples.jsonl") if (wanted / name).is_file()]
    for name in compared:
        assert (found / name).read_bytes() == (wanted / name).read_bytes(), name
    steps = [json.loads(line)["step"] for line in (found / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    left_over = [path.name for path in found.iterdir() if path.name.endswith(".tmp")]
    assert left_over == [] and (found / "report.html").is_file()


def test_the_runs_are_worth_killing(straight: dict[str, Straight]) -> None:
    """The DPO run stops early and goes on with a checkpoint that is not its last."""
    folder = Path(straight["dpo"].values["output_dir"])
    losses = [json.loads(line)["eval_loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    best = 1 + losses.index(min(losses))
    assert best < len(losses) < 9
    name = "adapter_model.safetensors"
    kept = folder / "checkpoints" / f"checkpoint-{best}" / name
    assert (folder / "adapter" / name).read_bytes() == kept.read_bytes()
