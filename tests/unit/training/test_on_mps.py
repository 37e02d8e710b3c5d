"""Training and measuring on a device without float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from emulated_devices import emulated, put
from families import family
from tiny import gradients, random_trees, with_lora
from torch import Tensor

from prefold.evaluation.held_out_pairs import score_pairs
from prefold.recipe import make_recipe
from prefold.training.arguments import training_arguments
from prefold.training.loop import StepOrder, StepTrees, TrainingLoop, TreeSet
from prefold.trees.scorer import Scorer

PAIRS = random_trees(4, completions=(2,))
ADVANTAGES = [torch.tensor([0.1, -0.7], dtype=torch.float64)] * 4
REFERENCE = [torch.linspace(-4, -1, sum(map(len, tree.completions))) for tree in PAIRS]


def step(method: str, model: Any) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    """Loss, gradients and metrics of a step on the pairs."""
    values: dict[str, Any] = {"model": {"name": "unused", "dtype": "float32"}, "data": {"train": [{"path": "unused"}]}}
    values |= {"method": method, "output_dir": "unused"}
    values |= {"rewards": [{"name": "length", "target": 1}]} if method == "grpo" else {}
    recipe, unused = make_recipe(values), cast(Any, None)
    scorer, order = Scorer(model, 30, "prefold_segments"), StepOrder(4, 4, 4, 0)
    data = TreeSet(PAIRS, REFERENCE, {"advantages": ADVANTAGES} if method == "grpo" else {})
    loop = TrainingLoop(recipe.algorithm, scorer, unused, order, unused, unused, training_arguments(recipe, 1))
    loop.accelerator = SimpleNamespace(backward=Tensor.backward)  # type: ignore[assignment]
    with scorer.in_place():
        loss, metrics = loop.compute_gradients(StepTrees(data, range(4)))
    return float(loss), gradients(model), metrics


@pytest.mark.parametrize("method", ["dpo", "aot", "orpo", "grpo"])
def test_a_step_is_that_of_a_cpu(method: str) -> None:
    wanted, model = step(method, with_lora(family("llama"))), with_lora(family("llama"))
    with emulated():
        put(model, {"": "mps"})
        loss, by_weight, metrics = step(method, model)
    assert loss == pytest.approx(wanted[0], rel=1e-5)
    assert metrics == pytest.approx(wanted[2], rel=1e-4, abs=1e-5)
    for name, gradient in wanted[1].items():
        assert (by_weight[name].cpu() - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_held_out_pairs() -> None:
    whole, model = family("llama"), family("llama")
    wanted = score_pairs(Scorer(whole, 30, "prefold_segments"), PAIRS, "pairs")
    with emulated():
        put(model, {"": "mps"})
        found = score_pairs(Scorer(model, 30, "prefold_segments"), PAIRS, "pairs")
    np.testing.assert_allclose(found.sums, wanted.sums, rtol=1e-5)
    np.testing.assert_allclose(found.means, wanted.means, rtol=1e-5)
