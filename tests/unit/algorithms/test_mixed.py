"""Weighted sums of losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from preference_batches import case, step_loss

from prefold.algorithms import Algorithm
from prefold.algorithms.bco import BCO
from prefold.algorithms.dpo import DPO
from prefold.algorithms.mixed import Mixed
from prefold.algorithms.nca import NCA
from prefold.algorithms.orpo import ORPO
from prefold.algorithms.sft import SFT


def value_and_gradient(algorithm: Algorithm) -> tuple[float, torch.Tensor]:
    pairs = case("ordinary")
    output = algorithm.loss(pairs.policy, pairs.reference if algorithm.needs_reference else None)
    loss = step_loss(output, algorithm, pairs.trees)
    return loss.item(), torch.autograd.grad(loss, pairs.policy.tokens)[0]


def test_sum_of_the_parts() -> None:
    mixed = Mixed(
        losses=[{"name": "dpo", "weight": 2, "beta": 0.3}, {"name": "sft", "weight": 0.5}, {"name": "nca", "weight": 3}]
    )
    value, gradient = value_and_gradient(mixed)
    parts = [(2.0, DPO(beta=0.3)), (0.5, SFT()), (3.0, NCA())]
    of_parts = [(weight, *value_and_gradient(part)) for weight, part in parts]
    assert value == pytest.approx(sum(weight * part for weight, part, _ in of_parts))
    torch.testing.assert_close(gradient, sum(weight * part for weight, _, part in of_parts))


def test_units_are_kept_apart() -> None:
    """Pairs, tokens of chosen completions and tokens of chosen conversations are different counts."""
    pairs = case("ordinary")
    mixed = Mixed(losses=[{"name": "dpo"}, {"name": "sft"}, {"name": "orpo"}, {"name": "cpo"}])
    parts = [SFT().units(pairs.trees), ORPO().units(pairs.trees)]
    assert mixed.units(pairs.trees) == {"pairs": 4} | parts[0] | parts[1]
    assert parts[0]["chosen_tokens"] != parts[1]["conversation_tokens"]


def test_needs_are_those_of_the_parts() -> None:
    free = Mixed(losses=[{"name": "simpo"}, {"name": "sft"}])
    assert not (free.needs_reference or free.scores_prompt or free.needs_statistics or free.couples_step)
    all_of_them = Mixed(losses=[{"name": "orpo"}, {"name": "aot"}, {"name": "dpo", "use_weighting": True}])
    assert all_of_them.needs_reference and all_of_them.scores_prompt
    assert all_of_them.needs_statistics and all_of_them.couples_step


def test_metrics_and_scale_are_those_of_the_first_with_a_reference() -> None:
    pairs = case("ordinary")
    mixed = Mixed(losses=[{"name": "sft"}, {"name": "dpo", "beta": 0.3}, {"name": "ipo", "beta": 0.7}])
    assert mixed.reward_scale == 0.3
    metrics = mixed.loss(pairs.policy, pairs.reference).metrics
    wanted = DPO(beta=0.3).loss(pairs.policy, pairs.reference).metrics
    assert metrics["rewards/chosen"] == wanted["rewards/chosen"]
    assert "nll_loss" in metrics


def test_states_of_the_parts() -> None:
    """Two BCO losses with different beta carry different means; each is given its own."""
    pairs = case("ordinary")
    mixed = Mixed(losses=[{"name": "sft"}, {"name": "bco", "beta": 0.1}, {"name": "bco", "beta": 0.2}])
    first = mixed.loss(pairs.policy, pairs.reference)
    assert set(first.state) == {"1.mean", "1.count", "2.mean", "2.count"}
    assert first.state["2.mean"] == pytest.approx(2 * first.state["1.mean"])
    second = mixed.loss(pairs.policy, pairs.reference, first.state)
    assert second.state["1.count"] == 2 * first.state["1.count"]


def test_default_is_mpo() -> None:
    assert [(weight, type(part)) for weight, part in Mixed().parts] == [(0.8, DPO), (0.2, BCO), (1.0, SFT)]


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([], "losses must name at least one loss"),
        ([{"weight": 1.0}], "`None` is not the name of a loss of pairs; they are dpo, "),
        ([{"name": "mixed"}], "`mixed` is not the name of a loss of pairs"),
        ([{"name": "kto"}], "`kto` is not the name of a loss of pairs"),
        ([{"name": "dpo", "weight": 0}], "the weight of `dpo` must be a number greater than 0, got 0"),
        ([{"name": "dpo", "weight": True}], "the weight of `dpo` must be a number greater than 0, got True"),
        ([{"name": "dpo", "weight": "1"}], "the weight of `dpo` must be a number greater than 0, got '1'"),
        (
            [{"name": "hinge", "label_smoothing": 0.1}],
            "`label_smoothing` is not a setting of `hinge`; its settings: beta, ",
        ),
        ([{"name": "sft", "beta": 0.1}], "`beta` is not a setting of `sft`; its settings: none"),
        ([{"name": "dpo", "beta": "high"}], "`beta` of `dpo` cannot be 'high'"),
        ([{"name": "dpo", "use_weighting": 1}], "`use_weighting` of `dpo` cannot be 1"),
        ([{"name": "dpo", "f_divergence_type": "kl"}], "`f_divergence_type` of `dpo` cannot be 'kl'"),
        ([{"name": "dpo", "beta": -1}], "beta must be greater than 0, got -1"),
    ],
)
def test_mistakes(losses: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        Mixed(losses=losses)
    assert str(caught.value).startswith(said)


def test_settings_of_every_type_are_taken() -> None:
    Mixed(losses=[{"name": "dpo", "ld_alpha": None, "use_weighting": True, "f_divergence_type": "js_divergence"}])
    Mixed(losses=[{"name": "ipo", "ld_alpha": 0, "beta": 1}])
