"""Public preference data of many shapes, where it is at hand: checked and trained by path alone.

The folder is named by PREFOLD_TEST_DATA, or lies beside the repository in `shared/data`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prefold
from prefold.recipe import RecipeBase

DATA = Path(os.environ.get("PREFOLD_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the public data sets are not at hand")

# File -> method, recognised shape, and the same defects as counted by `counted`.
FILES = {
    "pairs/ultrafeedback.jsonl": ("dpo", "text"),
    "pairs/sharegpt_en.jsonl": ("dpo", "turns, ShareGPT"),
    "pairs/sharegpt_zh.jsonl": ("dpo", "turns, ShareGPT"),
    "pairs/hh_transcripts.jsonl": ("dpo", "conversations, transcripts"),
    "pairs/llmbar.jsonl": ("dpo", "votes"),
    "pairs/unpaired_en.jsonl": ("kto", "labelled messages"),
    "prompts/gsm8k_train.jsonl": ("grpo", "prompts"),
    "prompts/gsm8k_test.jsonl": ("grpo", "prompts"),
    "prompts/scitldr_train.jsonl": ("grpo", "sentences"),
    "prompts/scitldr_dev.jsonl": ("grpo", "sentences"),
}
REWARDS = {"rewards": [{"name": "length", "target": 3, "unit": "characters"}]}


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def answers_of(name: str, row: dict[str, Any]) -> tuple[Any, ...]:
    """Prompt and answers of a row, by what the data's own page says of its columns."""
    if "llmbar" in name:
        first, second = ("output_1", "output_2") if row["label"] == 1 else ("output_2", "output_1")
        return row["input"], row[first], row[second]
    if "sharegpt" in name:
        prompt = tuple((turn["from"], turn["value"]) for turn in row["conversations"])
        return prompt, row["chosen"]["value"], row["rejected"]["value"]
    if "transcripts" in name:
        halves = [row[side].rpartition("\n\nAssistant:") for side in ("chosen", "rejected")]
        return halves[0][0], halves[0][2], halves[1][2]
    return row["prompt"], row["chosen"], row["rejected"]


def counted(name: str) -> dict[str, int]:
    """Defects of pairs, counted the straightforward way: a row has the first one of these."""
    found = {"empty_text": 0, "identical": 0, "duplicate": 0, "tied_rating": 0}
    seen: set[Any] = set()
    for row in rows_of(name):
        prompt, chosen, rejected = answers_of(name, row)
        if not (str(prompt).strip() and chosen.strip() and rejected.strip()):
            found["empty_text"] += 1
        elif chosen.strip() == rejected.strip():
            found["identical"] += 1
        else:
            key = (prompt, chosen, rejected)
            found["duplicate"] += key in seen
            seen.add(key)
            ratings = row.get("metadata") or {}
            found["tied_rating"] += "score_chosen" in ratings and ratings["score_chosen"] == ratings["score_rejected"]
    return {kind: number for kind, number in found.items() if number}


def checked(name: str, recipe: Callable[..., RecipeBase], **data: Any) -> dict[str, Any]:
    method, _ = FILES[name]
    settings = {"train": [{"path": str(DATA / name)}], "max_length": 100_000, **data}
    return prefold.check(recipe(method=method, data=settings, **needs(method))).as_json()


def needs(method: str) -> dict[str, Any]:
    """What a recipe of the method must have beside data."""
    if method != "grpo":
        return {}
    return {**REWARDS, "grpo": {"num_generations": 2, "max_completion_length": 8, "beta": 0.0}}


@pytest.mark.parametrize("name", FILES)
def test_the_shape_is_recognised_and_every_row_accounted_for(name: str, recipe: Callable[..., RecipeBase]) -> None:
    found = checked(name, recipe)
    (source,) = found["sources"]
    left_out = sum(finding["count"] for finding in found["findings"] if "left out" in finding["message"])
    assert source["shape"] == FILES[name][1]
    assert source["rows_in"] == len(rows_of(name)) == source["rows_used"] + left_out


@pytest.mark.parametrize("name", [name for name, (method, _) in FILES.items() if method == "dpo"])
def test_defects_are_those_that_a_plain_script_counts(name: str, recipe: Callable[..., RecipeBase]) -> None:
    # Nothing is held out, so that repeats of both sides are counted together.
    found = checked(name, recipe, eval=[{"path": str(DATA / name)}], eval_fraction=0.0)
    twice = {finding["kind"]: finding["count"] for finding in found["findings"]}
    wanted = counted(name)
    for kind in ("empty_text", "identical", "tied_rating"):
        assert twice.get(kind, 0) == 2 * wanted.get(kind, 0), kind
    assert twice.get("duplicate", 0) == wanted.get("duplicate", 0)


LONG = ("pairs/llmbar.jsonl", "pairs/ultrafeedback.jsonl", "pairs/unpaired_en.jsonl")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in FILES]
)
def test_two_steps_by_path_alone(name: str, recipe: Callable[..., RecipeBase]) -> None:
    data = {"train": [{"path": str(DATA / name)}], "max_length": 1500}
    method, train = FILES[name][0], {"max_steps": 2, "batch_size": 2}
    folder = prefold.train(recipe(method=method, data=data, train=train, **needs(method)))
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
