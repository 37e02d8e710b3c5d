"""A tiny random chat model in a folder, and pairs that teach it something."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import save_chat_model

from prefold.algorithms import ALGORITHMS
from prefold.recipe import RecipeBase, make_recipe


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFOLD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def exact_plan() -> None:
    """Asked for by tests whose runs are to be planned in earnest."""


@pytest.fixture(autouse=True)
def rough_plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is planned as for a model that allows no dry run, which takes most of the time of a tiny run."""

    def no_dry_run(*args: Any) -> Any:
        raise RuntimeError("no dry run in this test")

    if "exact_plan" not in request.fixturenames:
        monkeypatch.setattr("prefold.plan.passes._scored", no_dry_run)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Twenty pairs whose chosen answers shout."""
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Say word {i}", "chosen": f"WORD {i}!", "rejected": f"word {i}, maybe"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def recipe(tiny_model: Path, pairs: Path, tmp_path: Path) -> Callable[..., RecipeBase]:
    """A recipe for the tiny model; sections given by name are updated."""

    def make(**changes: Any) -> RecipeBase:
        values: dict[str, Any] = {
            "method": "dpo",
            "model": {"name": str(tiny_model), "dtype": "float32"},
            "lora": {"r": 4, "lora_dropout": 0.1},
            "data": {"train": [{"path": str(pairs)}], "eval_fraction": 0.3},
            "train": {"batch_size": 4, "max_steps": 6, "learning_rate": 5e-3, "save_steps": 2},
            "evaluate": {"prompts": 2, "max_new_tokens": 8},
            "output_dir": str(tmp_path / "run"),
        }
        for name, change in changes.items():
            values[name] = (
                {**values[name], **change}
                if isinstance(values.get(name), dict) and isinstance(change, dict)
                else change
            )
        if ALGORITHMS[values["method"]].kind.scores and "evaluate" not in changes:
            del values["evaluate"]
        return make_recipe(values)

    return make
