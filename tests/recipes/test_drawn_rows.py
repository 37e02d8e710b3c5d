"""The reference is computed of the rows that a run draws, of each when it is drawn, and once for all runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_files import lines

import prefold
from prefold.data.mixture import load_split
from prefold.models.tokenizer import tokenizer_of
from prefold.recipe import RecipeBase
from prefold.runs.opened import order_of
from prefold.training.loop import TrainingLoop
from prefold.trees import reference as references
from prefold.trees.packing import TokenTree

MakeRecipe = Callable[..., RecipeBase]
ROWS, HELD_OUT = 14, 6
CONSTANT = {"lr_scheduler_type": "constant"}


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[list[TokenTree]]:
    """The trees of each call that scores them under the reference."""
    calls: list[list[TokenTree]] = []
    compute = references.compute_reference

    def counting(scorer: Any, trees: list[TokenTree], *more: Any) -> Any:
        calls.append(list(trees))
        return compute(scorer, trees, *more)

    monkeypatch.setattr(references, "compute_reference", counting)
    return calls


def drawn(recipe: RecipeBase) -> list[list[TokenTree]]:
    """Of each step, the trees that no step before it has."""
    prepared = load_split(recipe.data, tokenizer_of(recipe.model), recipe.train.seed)
    seen: set[int] = set()
    steps = []
    order = order_of(recipe, len(prepared.train))
    for step in map(order.__getitem__, range(len(order))):
        steps.append([prepared.train.trees[i] for i in dict.fromkeys(step) if i not in seen])
        seen.update(step)
    return [trees for trees in steps if trees]


def test_only_what_is_drawn_is_scored(recipe: MakeRecipe, scored: list[list[TokenTree]]) -> None:
    mine = recipe(train={"max_steps": 2})
    prefold.train(mine)
    assert scored == drawn(mine) and sum(map(len, scored)) == 8 < ROWS


def test_a_run_of_several_epochs_scores_each_row_once(recipe: MakeRecipe, scored: list[list[TokenTree]]) -> None:
    mine = recipe(train={"max_steps": None, "num_train_epochs": 2.5})
    prefold.train(mine)
    assert scored == drawn(mine) and sum(map(len, scored)) == ROWS


def test_a_mixture_is_scored_by_what_is_drawn_of_it(
    recipe: MakeRecipe, pairs: Path, tmp_path: Path, scored: list[list[TokenTree]]
) -> None:
    more = tmp_path / "more.jsonl"
    more.write_text(pairs.read_text().replace("word", "thing"))
    sources = [{"path": str(pairs), "weight": 0.7}, {"path": str(more), "weight": 0.3}]
    mine = recipe(data={"train": sources}, train={"max_steps": 3, "batch_size": 2})
    prefold.train(mine)
    assert scored == drawn(mine) and sum(map(len, scored)) == 6


def test_a_longer_run_goes_on_from_what_is_there(
    recipe: MakeRecipe, tmp_path: Path, scored: list[list[TokenTree]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It scores the rest alone, and its numbers are those of a run that had nothing, to the last byte."""
    prefold.train(recipe(train={"max_steps": 2, **CONSTANT}, output_dir=str(tmp_path / "short")))
    scored.clear()
    longer = recipe(train={"max_steps": 3, **CONSTANT}, output_dir=str(tmp_path / "longer"))
    found = prefold.train(longer)
    assert scored == drawn(longer)[2:]
    scored.clear()
    prefold.train(recipe(train={"max_steps": 3, **CONSTANT}, lora={"r": 2}, output_dir=str(tmp_path / "other")))
    assert not scored
    monkeypatch.setenv("PREFOLD_CACHE", str(tmp_path / "own"))
    straight = prefold.train(recipe(train={"max_steps": 3, **CONSTANT}, output_dir=str(tmp_path / "straight")))
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (found / name).read_bytes() == (straight / name).read_bytes(), name
    assert lines(found)[:2] == lines(tmp_path / "short")[:2]


@pytest.mark.parametrize("lora", [{"r": 4}, "none"])
def test_a_resumed_run_scores_the_rest(
    lora: Any, recipe: MakeRecipe, tmp_path: Path, scored: list[list[TokenTree]], monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = prefold.train(recipe(lora=lora, output_dir=str(tmp_path / "straight")))
    if lora == "none":  # no later than before the first step, since the weights change
        assert [*map(len, scored)] == [4, 4, 4, 2]
    monkeypatch.setenv("PREFOLD_CACHE", str(tmp_path / "own"))
    compute, mine = TrainingLoop.compute_gradients, recipe(lora=lora)

    def killed(self: TrainingLoop, batch: Any) -> Any:
        if self.state.global_step == 3:
            raise RuntimeError("killed")
        return compute(self, batch)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(TrainingLoop, "compute_gradients", killed)
        prefold.train(mine)
    resumed = prefold.train(mine)
    trained = "trained/model.safetensors" if lora == "none" else "adapter/adapter_model.safetensors"
    for name in ("metrics.jsonl", trained):
        assert (resumed / name).read_bytes() == (straight / name).read_bytes(), name


def test_held_out_rows_are_scored_at_their_first_measurement(
    recipe: MakeRecipe, scored: list[list[TokenTree]], tmp_path: Path
) -> None:
    mine = recipe(train={"max_steps": 4, "eval_steps": 2})
    prefold.train(mine)
    assert [*map(len, scored)] == [4, 4, HELD_OUT, 4, 2]
    scored.clear()
    prefold.train(recipe(train={"max_steps": 4, "eval_steps": 1}, output_dir=str(tmp_path / "again")))
    assert not scored


# ---- what was prepared once -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dpo", "kto", "grpo"])
def test_a_second_check_reads_no_rows(method: str, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = {"rewards": [{"name": "length", "target": 8}]} if method == "grpo" else {}
    mine = recipe(method=method, **rewards)
    first = prefold.check(mine).as_json()

    def not_again(*args: Any, **settings: Any) -> Any:
        raise AssertionError("rows were read again")

    for name in ("prefold.data.selection.read_rows", "prefold.data.mixture.to_records", "prefold.data.mixture.fit"):
        monkeypatch.setattr(name, not_again)
    again = prefold.check(mine).as_json()
    for name in ("sources", "findings", "tokens", "fingerprint", "examples"):
        assert again[name] == first[name], name
    with pytest.raises(AssertionError, match="read again"):
        prefold.check(recipe(method=method, **rewards, train={"seed": 5}))
