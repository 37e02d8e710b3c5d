"""A short run of each main method on the data that comes with prefold: the curves of its page in `docs/algorithms/`.

    python -m benchmarks.short_runs dpo orpo kto reward grpo
    python docs/algorithms/curves.py

Each run is `prefold train`, in a folder that is removed afterwards. Its metrics are written to
`results/run-NAME-cpu.json`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import prefold
from benchmarks.results import parser_for, quieten, save
from prefold.files import read_jsonl
from prefold.recipe import make_recipe

PAIRS = {
    "train": [{"path": "builtin:short_answers"}],
    "eval": [{"path": "builtin:short_answers", "split": "held_out", "count": 24}],
}
PROMPTS = {"train": [{"path": "builtin:everyday_prompts"}], "system": "Answer in a few words."}
LITTLE_MEMORY = {"max_tokens": 512, "gradient_checkpointing": True}
"""Neither changes the numbers."""
OF_PAIRS = {"learning_rate": 5e-5, "batch_size": 4, "max_steps": 20, "warmup_steps": 2, "eval_steps": 0.25}
"""A step holds about 500 tokens."""

RUNS: dict[str, dict[str, Any]] = {
    "dpo": {"data": PAIRS, "train": OF_PAIRS, "dpo": {"beta": 0.5}},
    "orpo": {"data": PAIRS, "train": {**OF_PAIRS, "learning_rate": 2e-4}, "orpo": {"beta": 0.5}},
    "kto": {"data": PAIRS, "train": {**OF_PAIRS, "batch_size": 8}},
    "reward": {"data": PAIRS, "train": {**OF_PAIRS, "learning_rate": 1e-4}},
    "grpo": {
        "data": PROMPTS,
        "rewards": [{"name": "length", "target": 20}],
        "grpo": {"num_generations": 8, "max_completion_length": 64, "beta": 0.02},
        "train": {"batch_size": 4, "max_steps": 12, "learning_rate": 3e-4, "lr_scheduler_type": "constant"},
    },
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_for("short_runs", __doc__)
    parser.add_argument("methods", nargs="+", choices=RUNS)
    options = parser.parse_args(arguments)
    quieten()
    for name in options.methods:
        save(f"run-{name}", options, run(name, options.model))


def run(name: str, model: str) -> dict[str, Any]:
    """The recipe as it was given, and a line of metrics for each step."""
    given = {"method": name, "model": {"name": model, "dtype": "float32"}, **RUNS[name]}
    with tempfile.TemporaryDirectory() as folder:
        recipe = {**given, "train": {**given["train"], **LITTLE_MEMORY}, "output_dir": f"{folder}/{name}"}
        made = prefold.train(make_recipe(recipe))
        return {"recipe": given, "metrics": list(read_jsonl(Path(made) / "metrics.jsonl"))}


if __name__ == "__main__":
    main()
