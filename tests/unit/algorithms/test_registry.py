"""What holds for every method: the recipe takes it, its units are what it returns, splitting changes nothing."""

from __future__ import annotations

import runpy
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_batches import case, logprobs, random_batch, step_loss

from prefold.algorithms import ALGORITHMS, Algorithm
from prefold.recipe import Recipe, RecipeBase, make_recipe
from prefold.recipe.section import all_fields
from prefold.trees.logprobs import TreeLogprobs

DOCS = Path(__file__).parents[3] / "docs" / "algorithms"
OF_PAIRS = {name: kind for name, kind in ALGORITHMS.items() if kind.kind.data == "pairs"}


def recipe(method: str, **sections: Any) -> RecipeBase:
    if ALGORITHMS[method].kind.samples:
        sections = {"rewards": [{"name": "length", "target": 50}], **sections}
    return make_recipe(
        {"method": method, "model": {"name": "m"}, "data": {"train": [{"path": "d"}]}, "output_dir": "o", **sections}
    )


def with_prompts(logs: TreeLogprobs, trees: list[Any]) -> TreeLogprobs:
    lengths = torch.tensor([len(tree.prompt) - 1 for tree in trees])
    return logprobs(
        logs.tokens, logs.lengths.tolist(), statistics=logs.statistics, prompts=-1.5 * lengths, prompt_lengths=lengths
    )


@pytest.mark.parametrize("name", ALGORITHMS)
def test_recipe_takes_it(name: str) -> None:
    chosen = recipe(name)
    assert type(chosen.algorithm) is ALGORITHMS[name]
    assert chosen.train.learning_rate == ALGORITHMS[name].defaults["train.learning_rate"]
    assert set(ALGORITHMS[name].defaults) <= set(all_fields(Recipe))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_frozen(name: str) -> None:
    algorithm = ALGORITHMS[name]()
    for setting in fields(algorithm):
        with pytest.raises(FrozenInstanceError):
            setattr(algorithm, setting.name, None)


@pytest.mark.parametrize("name", OF_PAIRS)
def test_units_metrics_and_gradients(name: str) -> None:
    algorithm, pairs = OF_PAIRS[name](), case("ordinary")
    output = algorithm.loss(with_prompts(pairs.policy, pairs.trees), pairs.reference)
    assert set(output.loss) == set(algorithm.units(pairs.trees))
    assert all(total.shape == () for total in output.loss.values())
    assert not any(metric[0].requires_grad for metric in output.metrics.values())
    (gradient,) = torch.autograd.grad(step_loss(output, algorithm, pairs.trees), pairs.policy.tokens)
    assert gradient.isfinite().all() and gradient.count_nonzero() > 0


def sums_of_parts(algorithm: Algorithm) -> tuple[dict[str, float], dict[str, float]]:
    """Loss sums of eight pairs in one piece, and in two of three and five pairs."""
    lengths = [3, 4, 1, 2, 5, 5, 2, 7, 1, 1, 6, 2, 3, 3, 4, 1]
    pairs = random_batch(lengths)
    cut, split = sum(lengths[:6]), [lengths[:6], lengths[6:]]

    def sums(part: slice, lengths: list[int], trees: slice) -> dict[str, float]:
        policy = with_prompts(logprobs(pairs.policy.tokens[part], lengths), pairs.trees[trees])
        output = algorithm.loss(policy, logprobs(pairs.reference.tokens[part], lengths))
        return {unit: total.item() for unit, total in output.loss.items()}

    whole = sums(slice(None), lengths, slice(None))
    first, second = sums(slice(cut), split[0], slice(3)), sums(slice(cut, None), split[1], slice(3, None))
    return whole, {unit: first[unit] + second[unit] for unit in first}


@pytest.mark.parametrize("name", OF_PAIRS)
def test_splitting_changes_nothing_unless_the_step_is_coupled(name: str) -> None:
    algorithm = OF_PAIRS[name]()
    whole, parts = sums_of_parts(algorithm)
    assert (parts == pytest.approx(whole, rel=1e-12)) is not algorithm.couples_step


def test_table_is_up_to_date() -> None:
    assert (DOCS / "README.md").read_text(encoding="utf-8") == runpy.run_path(str(DOCS / "table.py"))["page"](), (
        "run: python docs/algorithms/table.py > docs/algorithms/README.md"
    )
