"""`prefold.generate` and `prefold.pairs` as Python calls them."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from test_pairs import LENGTH, rows_of, save_model
from tiny_tokenizer import CHATML

import prefold
from prefold import cli
from prefold.errors import UserError
from prefold.recipe import load_recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny", CHATML)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Say {i}"}) + "\n" for i in range(4)))
    return tmp_path / "prompts.jsonl"


@pytest.mark.parametrize("name", ["check", "compare", "generate", "pairs", "publish", "run", "train"])
def test_the_options_are_those_of_the_command(name: str) -> None:
    in_terminal = {"html", "as_json", "nproc", "row", "anyway"}  # in Python `check_row` is a function by itself
    command, function = (inspect.signature(getattr(home, name)).parameters for home in (cli, prefold))
    assert set(command) - in_terminal == set(function)
    for option, parameter in function.items():
        assert (parameter.default or None) == (command[option].default or None), option


def test_generate(model: Path, prompts: Path) -> None:
    [alone] = prefold.generate(model, "Say 0", max_new_tokens=4)
    assert alone["prompt"] == "Say 0" and len(alone["answers"]) == 1 and alone["finish_reasons"] == ["length"]
    found = prefold.generate(str(model), ["Hello"], file=prompts, max_new_tokens=4, num_answers=2, temperature=1.0)
    assert [entry["prompt"] for entry in found] == ["Hello", "Say 0", "Say 1", "Say 2", "Say 3"]
    assert all(len(entry["answers"]) == 2 for entry in found)
    with pytest.raises(UserError, match="no prompt"):
        prefold.generate(model)


def test_pairs(model: Path, prompts: Path, tmp_path: Path) -> None:
    report = prefold.pairs(prompts, model, tmp_path / "pairs.jsonl", reward=LENGTH, max_new_tokens=16, temperature=1.0)
    rows = rows_of(tmp_path / "pairs.jsonl")
    assert report.pairs == len(rows) > 0 and report.prompts == 4 and report.answers <= 16
    assert all(row["score_chosen"] > row["score_rejected"] for row in rows)
    listed = {"model": [str(model)], "reward": [LENGTH], "num_completions": 4}
    prefold.pairs(str(prompts), output=str(tmp_path / "again.jsonl"), max_new_tokens=16, temperature=1.0, **listed)
    assert rows_of(tmp_path / "again.jsonl") == rows


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 2.0},
        {"seed": -1},
    ],
)
def test_numbers_out_of_their_bounds(wrong: dict[str, Any], tmp_path: Path) -> None:
    [name] = wrong
    with pytest.raises(UserError, match=f"`{name}` is"):
        prefold.generate("no-such-model", "Hello", **wrong)
    with pytest.raises(UserError, match=f"`{name}` is"):
        prefold.pairs("no-such-file", "no-such-model", tmp_path / "pairs.jsonl", reward=LENGTH, **wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_completions": 0},
        {"min_margin": -0.1},
        {"max_length_ratio": 0.5},
        {"limit": 0},
        {"concurrency": 0},
        {"timeout": 0.0},
    ],
)
def test_bounds_of_pairs(wrong: dict[str, Any], tmp_path: Path) -> None:
    [name] = wrong
    with pytest.raises(UserError, match=f"`{name}` is"):
        prefold.pairs("no-such-file", "no-such-model", tmp_path / "pairs.jsonl", reward=LENGTH, **wrong)
    assert list(tmp_path.iterdir()) == []


def test_overrides_are_never_ignored() -> None:
    with pytest.raises(UserError, match="load_recipe"):
        prefold.check(load_recipe("demo"), ["train.max_steps=3"])
