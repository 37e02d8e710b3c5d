"""Groups without advantages take no pass, and the numbers of the step are those of computing them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dense import exactly
from families import family
from tiny import gradients, with_lora
from torch import Tensor, nn

from prefold.algorithms.grpo import GRPO
from prefold.data.examples import Example, Examples
from prefold.data.preference import Message, Prompt, RowId
from prefold.recipe import make_recipe
from prefold.rewards.scoring import LoadedReward
from prefold.training.arguments import training_arguments
from prefold.training.loop import StepOrder, TrainingLoop
from prefold.training.sampled_trees import SampledTrees
from prefold.trees.packing import TokenTree
from prefold.trees.scorer import Scorer

PROMPTS, SIZE, SCALE = 5, 3, 1e-12
TOKENIZER: Any = SimpleNamespace(eos_token_id=2, decode=lambda ids, **how: " ".join(map(str, ids)))
OF_COMPUTED = "sampling/sampling_logp_difference/mean"
"""Of the tokens that are computed, by its definition."""
Step = tuple[Tensor, dict[str, Tensor], dict[str, float]]
"""Loss, gradients and metrics."""


def of_odd_prompts(prompts: Sequence[Any], completion_ids: Sequence[Any], **columns: Any) -> list[float | None]:
    """Groups of even prompts are all equal, at a number whose sums are rounded."""
    return [
        0.1 if int(prompt[-1]["content"]) % 2 == 0 else float(sum(ids) % 7)
        for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]


def same(prompts: Sequence[Any], **columns: Any) -> list[float | None]:
    return [0.3] * len(prompts)


def silent(prompts: Sequence[Any], **columns: Any) -> list[float | None]:
    return [None] * len(prompts)


class Passes:
    """A scorer's passes, counted."""

    def __init__(self, scorer: Scorer, monkeypatch: pytest.MonkeyPatch):
        self.trees = 0
        score = scorer.score

        def counted(trees: Sequence[TokenTree], *args: Any, **how: Any) -> Any:
            self.trees += len(trees)
            return score(trees, *args, **how)

        monkeypatch.setattr(scorer, "score", counted)


def source_of(algorithm: GRPO, scorer: Scorer, reward: Any) -> SampledTrees:
    examples = Examples.of(
        Example(
            Prompt((Message(role="user", content=str(row)),), {}, RowId("p", row)),
            TokenTree((5, 6 + row, 7), ()),
        )
        for row in range(PROMPTS)
    )
    order = StepOrder(PROMPTS, PROMPTS, PROMPTS, 0, algorithm.iterations)
    rewards = [LoadedReward("mine", reward)]
    return SampledTrees(algorithm, scorer, examples, rewards, [], TOKENIZER, order, [], 0, torch.float64)


def loop_of(algorithm: GRPO, scorer: Scorer, source: SampledTrees, folder: Path) -> TrainingLoop:
    recipe = make_recipe(
        {
            "method": "grpo",
            "model": {"name": "unused", "dtype": "float32"},
            "data": {"train": [{"path": "unused"}]},
            "rewards": [{"name": "length", "target": 1}],
            "output_dir": str(folder),
        }
    )
    unused: Any = None
    args = training_arguments(recipe, algorithm.iterations)
    loop = TrainingLoop(algorithm, scorer, source, source.order, unused, unused, args)
    loop.accelerator = SimpleNamespace(backward=Tensor.backward)  # type: ignore[assignment]
    return loop


def steps(
    algorithm: GRPO, model: nn.Module, leaves_out: bool, folder: Path, reward: Any, max_tokens: int = 40
) -> list[Step]:
    """The steps of a rollout, each of which moves the weights, which are put back in the end."""
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    scorer = Scorer(model, max_tokens, "prefold_joined", temperature=algorithm.temperature)
    source = source_of(algorithm, scorer, reward)
    assert source.leaves_out
    source.leaves_out = leaves_out
    loop, results = loop_of(algorithm, scorer, source, folder), []
    for step in range(algorithm.iterations):
        model.zero_grad()
        with scorer.in_place():
            loss, metrics = loop.compute_gradients(source(step))
        results.append((loss, gradients(model), metrics))
        with torch.no_grad():
            for weight in model.parameters():
                weight -= 0.05 * weight.grad if weight.grad is not None else 0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(before[name])
    return results


def make(**settings: Any) -> GRPO:
    how: Any = {"epsilon_high": 1.0001} if settings.get("loss_type") == "cispo" else {"epsilon": 1e-4}
    return GRPO(
        num_generations=SIZE, max_completion_length=6, temperature=0.7, num_iterations=2, top_p=0.95, **settings, **how
    )


@pytest.fixture
def model() -> nn.Module:
    policy = with_lora(family("llama", torch.float64))
    policy.generation_config.eos_token_id = list(range(2, 30))  # so that completions differ in length
    return policy


LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss", LOSSES)
def test_numbers_are_the_same(loss: str, level: str, scale: str, model: nn.Module, tmp_path: Path) -> None:
    masked = scale == "batch"
    algorithm = make(
        loss_type=loss, importance_sampling_level=level, scale_rewards=scale, mask_truncated_completions=masked
    )
    with exactly(torch.float64):
        without = steps(algorithm, model, True, tmp_path, of_odd_prompts)
        wanted = steps(algorithm, model, False, tmp_path, of_odd_prompts)
    assert without[0][2].pop("groups/left_out") == 3
    for step, (mine, other) in enumerate(zip(without, wanted, strict=True)):
        torch.testing.assert_close(mine[0], other[0], rtol=SCALE, atol=SCALE)
        assert mine[1].keys() == other[1].keys()
        for name, gradient in mine[1].items():
            torch.testing.assert_close(gradient, other[1][name], rtol=SCALE, atol=SCALE)
        assert sum(gradient.abs().sum() for gradient in mine[1].values()) > 1e-3
        # Later steps have the entropy of what is left out as it was drawn.
        apart = {OF_COMPUTED, *(["entropy"] if step else [])}
        assert mine[2].keys() == other[2].keys()
        assert {name for name in mine[2] if mine[2][name] != pytest.approx(other[2][name], abs=SCALE)} <= apart
    clipped = [value for name, value in without[1][2].items() if "clip_ratio" in name and "completions" not in name]
    assert max(clipped) > 0


def test_the_others_alone_take_passes(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with exactly(torch.float64):
        algorithm = make()
        scorer = Scorer(model, 40, "prefold_joined", temperature=algorithm.temperature)
        source = source_of(algorithm, scorer, of_odd_prompts)
        loop, batch, passes = loop_of(algorithm, scorer, source, tmp_path), source(0), Passes(scorer, monkeypatch)
        with scorer.in_place():
            loop.compute_gradients(batch)
    assert (passes.trees, batch.left_out) == (2, {i for i in range(PROMPTS) if source.order[0][i] % 2 == 0})


@pytest.mark.parametrize("reward", [same, silent])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_of_equal_rewards_alone(
    loss: str, reward: Any, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a step, its loss and gradients are 0, and its metrics are there."""
    with exactly(torch.float64):
        monkeypatch.setattr(Scorer, "score", None)
        first, second = steps(make(loss_type=loss), model, True, tmp_path, reward)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    for loss_, gradients_, metrics in (first, second):
        assert loss_ == 0 and gradients_.keys() == trained
        assert all(bool((gradient == 0).all()) for gradient in gradients_.values())
        assert metrics["entropy"] > 0 and OF_COMPUTED not in metrics
    assert first[2]["groups/left_out"] == PROMPTS


def test_with_a_divergence_all_are_computed(model: nn.Module) -> None:
    scorer = Scorer(model, 40, "prefold_joined")
    assert not source_of(GRPO(beta=0.1), scorer, same).leaves_out


def test_with_a_loss_of_routers_all_are_computed(model: nn.Module) -> None:
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.01
    scorer = Scorer(model, 40, None)
    assert not source_of(GRPO(), scorer, same).leaves_out
