"""The engine and the demo on SmolLM2-135M-Instruct."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from run_files import lines

import prefold
from prefold.data.mixture import load_split
from prefold.models.load import load_model
from prefold.models.tokenizer import load_tokenizer
from prefold.recipe import Model, load_recipe
from prefold.trees.scorer import Scorer, choose_scorer

pytestmark = pytest.mark.real_model


@pytest.fixture
def own_cache() -> None:
    """The model is kept in the user's cache, not in one of the test's own."""


def test_packed_is_plain(smollm2: Path) -> None:
    recipe = load_recipe("demo")
    trees = [example.tree for example in load_split(recipe.data, load_tokenizer(smollm2), seed=0).held_out[:6]]
    model = load_model(Model(name=str(smollm2), dtype="float32"))
    assert choose_scorer(model, trees[:3], 2048).packed
    with torch.no_grad():
        packed = Scorer(model, 2048, "prefold_joined").score(trees).tokens
        plain = Scorer(model, 2048, None).score(trees).tokens
    torch.testing.assert_close(packed, plain, rtol=1e-5, atol=5e-5)


@pytest.mark.slow
def test_the_demo_teaches_what_it_says(smollm2: Path, tmp_path: Path) -> None:
    folder = prefold.run("demo", [f"output_dir={tmp_path / 'demo'}"])
    heldout = json.loads((folder / "evaluation" / "heldout.json").read_text())
    assert heldout["pairs"] >= 50
    assert heldout["after"]["accuracy"] >= 0.85
    assert heldout["difference"]["ci"][0] > 0
    reasons = [sample["finish_reasons"] for sample in lines(folder / "samples.jsonl")]
    ended = {when: sum(each[when] == ["stop"] for each in reasons) for when in ("before", "after")}
    assert ended["before"] <= 3 and ended["after"] >= 7
