"""Groups of completions, packed: log-probs at a temperature, the GRPO loss and its gradients are those of completions
computed one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from dense import assert_same, dense_logprobs, exactly, outcome
from families import family
from preference_batches import logprobs, step_loss
from test_packed_is_plain import Fault, leaking_sibling, position_off_by_one, wrong_predictor
from tiny import gradients, random_trees, with_lora
from torch import Tensor, nn

from prefold.algorithms.grpo import GRPO
from prefold.trees.head import Statistics
from prefold.trees.packing import TokenTree
from prefold.trees.scorer import Scorer

BACKENDS = ("prefold_joined", "prefold_segments")
TEMPERATURE, SIZE = 0.7, 4


def groups(count: int = 4) -> list[TokenTree]:
    return random_trees(count, seed=7, completions=(SIZE,))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "granite"])
def test_log_probs_at_a_temperature(name: str) -> None:
    with exactly(torch.float64):
        model, trees = with_lora(family(name, torch.float64)), groups()
        wanted = outcome(model, lambda: dense_logprobs(model, trees, TEMPERATURE))
        for backend in BACKENDS if name == "gemma2" else (*BACKENDS, None):
            scorer = Scorer(model, 64, backend, temperature=TEMPERATURE)
            assert_same(outcome(model, lambda s=scorer: s.score(trees).tokens), wanted, 1e-10)


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
def test_gradients_of_the_head_at_a_temperature(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefold.trees.head.CHUNK", 7)
    with exactly(torch.float64):
        model, trees = family(name, torch.float64, tie_word_embeddings=False), groups()
        wanted = outcome(model, lambda: dense_logprobs(model, trees, TEMPERATURE))
        scorer = Scorer(model, 64, BACKENDS[0], temperature=TEMPERATURE)
        assert_same(outcome(model, lambda: scorer.score(trees).tokens), wanted, 1e-10)


@pytest.mark.parametrize("backend", [BACKENDS[0], None])
def test_entropy_at_a_temperature(backend: str | None) -> None:
    with exactly(torch.float64):
        model, tree = family("llama", torch.float64), groups(1)[0]
        found = Scorer(model, 64, backend, temperature=TEMPERATURE).score([tree], statistics=True).statistics
        logits = model(input_ids=torch.tensor([tree.prompt + tree.completions[0]]), use_cache=False).logits
        wanted = (logits[0, len(tree.prompt) - 1 : -1] / TEMPERATURE).log_softmax(-1)
        assert found is not None
        entropy = found.entropy[: len(tree.completions[0])]
        torch.testing.assert_close(entropy, -(wanted.exp() * wanted).sum(-1), rtol=1e-10, atol=1e-10)


# ---- the loss ----

VARIANTS = [
    GRPO(num_generations=SIZE, beta=0.1, loss_type="grpo"),
    GRPO(num_generations=SIZE, beta=0.1, loss_type="dapo", importance_sampling_level="sequence"),
    GRPO(num_generations=SIZE, loss_type="cispo", epsilon_high=1.1),
]


def grpo_step(
    algorithm: GRPO, model: nn.Module, rows: list[list[TokenTree]], score: Callable[[list[TokenTree]], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a step, off-policy and against a reference, computed in these rows.

    Rewards, old log-probs and the reference's come from token ids, so that they are the same however rows are cut.
    """
    model.zero_grad()
    step = [tree for row in rows for tree in row]
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        tokens, every = score(row), [ids for tree in row for ids in tree.completions]
        ids = torch.tensor([token for ids in every for token in ids]).double()
        rewards = torch.tensor([[float(sum(ids) % 11) for ids in tree.completions] for tree in row]).double()
        policy = logprobs(
            tokens,
            [len(ids) for ids in every],
            statistics=Statistics(tokens.detach(), tokens.detach(), tokens.detach() > 0),
            extras={"advantages": GRPO().advantages(rewards).flatten(), "old": OLD + 0.4 * ids.sin()},
        )
        reference = logprobs(OLD + 0.3 * ids.cos(), policy.lengths.tolist())
        output = algorithm.loss(policy, reference)
        total = total + torch.stack([part / algorithm.units(step)[unit] for unit, part in output.loss.items()]).sum()
    total.backward()
    return total.detach()[None], gradients(model)


OLD = -4.6
"""About what a random model of 97 tokens gives each."""


def one_by_one(model: nn.Module) -> Callable[[list[TokenTree]], Tensor]:
    return lambda trees: dense_logprobs(model, trees, TEMPERATURE)


@pytest.mark.parametrize("algorithm", VARIANTS, ids=lambda algorithm: algorithm.loss_type)
def test_loss(algorithm: GRPO) -> None:
    with exactly(torch.float64):
        model, trees = with_lora(family("llama", torch.float64)), groups()
        wanted = grpo_step(algorithm, model, [trees], one_by_one(model))
        scorer = Scorer(model, 64, BACKENDS[0], temperature=TEMPERATURE)
        for rows in ([trees], [trees[:1], trees[1:]], [[tree] for tree in trees]):
            assert_same(grpo_step(algorithm, model, rows, lambda row: scorer.score(row).tokens), wanted, 1e-10)


@pytest.mark.parametrize("fault", [position_off_by_one, wrong_predictor, leaking_sibling])
def test_a_fault_is_seen(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    with exactly(torch.float64):
        model, trees = with_lora(family("llama", torch.float64)), groups()
        wanted = grpo_step(VARIANTS[0], model, [trees], one_by_one(model))
        scorer = Scorer(model, 64, BACKENDS[0], temperature=TEMPERATURE)
        fault(scorer.model, monkeypatch)
        found = grpo_step(VARIANTS[0], model, [trees], lambda row: scorer.score(row).tokens)
        with pytest.raises(AssertionError):
            assert_same(found, wanted, 1e-6)


def test_a_step_makes_the_better_completion_likelier() -> None:
    """Of one group, on-policy: what has the higher reward gains, what has the lower one loses."""
    with exactly(torch.float64):
        model = with_lora(family("llama", torch.float64))
        tree = TokenTree((5, 6, 7), ((11, 12), (13, 14)))
        scorer = Scorer(model, 64, BACKENDS[0])
        before = scorer.score([tree], statistics=True)
        advantages = GRPO().advantages(torch.tensor([[0.0, 1.0]], dtype=torch.float64)).flatten()
        output = GRPO(num_generations=2).loss(replace(before, extras={"advantages": advantages}), None)
        step_loss(output, GRPO(num_generations=2), [tree]).backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight -= 0.0 if weight.grad is None else 1e-3 * weight.grad
        worse, better = (scorer.score([tree]).sums() - before.sums()).tolist()
        assert better > 0 > worse
