"""Two rounds of DPO on questions of GSM8K with SmolLM2: shorter answers, by a reward for 20 tokens.

About 700 answers of 50 tokens, 60 pairs and 16 steps, some ten minutes on two cores.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import prefold
from prefold.recipe import make_recipe

DATA = Path(os.environ.get("PREFOLD_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "prompts"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.real_model,
    pytest.mark.skipif(not DATA.is_dir(), reason="the public data sets are not at hand"),
]
BRIEFLY = " Answer in one or two short sentences."


@pytest.fixture
def own_cache() -> None:
    """The model is kept in the user's cache, not in one of the test's own."""


def test_two_rounds_make_answers_shorter(smollm2: Path, tmp_path: Path) -> None:
    for name, number in (("train", 36), ("test", 36)):
        rows = [json.loads(line) for line in (DATA / f"gsm8k_{name}.jsonl").read_text().splitlines()[:number]]
        prompts = [{"prompt": row["question"] + BRIEFLY, "answer": row["answer"]} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    recipe = make_recipe(
        {
            "method": "dpo",
            "model": {"name": str(smollm2), "dtype": "float32"},
            "data": {
                "train": [{"path": str(tmp_path / "train.jsonl")}],
                "eval": [{"path": str(tmp_path / "test.jsonl")}],
            },
            "rewards": [{"name": "length", "target": 20}],
            "rounds": {"number": 2, "num_completions": 4, "max_new_tokens": 96, "temperature": 1.0, "min_margin": 5.0},
            "train": {"batch_size": 4, "learning_rate": 3e-4, "num_train_epochs": 1.0},
            "evaluate": {"prompts": 2, "max_new_tokens": 64},
            "output_dir": str(tmp_path / "rounds"),
        }
    )
    folder = prefold.run(recipe)
    facts = json.loads((folder / "rounds.json").read_text())
    print(json.dumps(facts["base"]), json.dumps(facts["rounds"], indent=1))
    first, *_ = facts["rounds"]
    assert first["against_base"]["verdict"] == "better" and first["pairs"]["pairs"] >= 20
    assert facts["is_over"] and facts["best"] >= 1
    assert (folder / "rounds.html").is_file() and (folder / "rounds" / "1" / "report.html").is_file()
