"""Context inside completions, packed and plain: it is read, and nothing of it is scored, by any method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dense import Outcome, assert_same, dense_logprobs, exactly, masks, outcome
from families import family
from preference_batches import logprobs, metric_means
from test_scores import classifier, dense_scores
from tiny import gradients, with_lora
from torch import Tensor, nn

from prefold.algorithms import ALGORITHMS, Algorithm
from prefold.evaluation.held_out_pairs import score_pairs
from prefold.recipe import make_recipe
from prefold.training.arguments import training_arguments
from prefold.training.loop import StepOrder, StepTrees, TrainingLoop, TreeSet
from prefold.trees.attention import unwrapped, using_attention
from prefold.trees.head import Statistics
from prefold.trees.logprobs import TreeLogprobs
from prefold.trees.packing import Span, TokenTree
from prefold.trees.reference import Reference
from prefold.trees.scorer import Scorer, choose_scorer, reference_model

BACKENDS = ("prefold_joined", "prefold_segments", None)
PROMPT, FIRST, SECOND = (5, 6, 7, 8), (11, 12, 13, 14, 15, 16), (21, 22, 23, 24, 25)
CONTEXTS: dict[str, tuple[tuple[Span, ...], ...]] = {
    "in the first": (((2, 4),), ()),
    "in the second": ((), ((1, 3),)),
    "in both": (((1, 3),), ((2, 3),)),
    "at several places": (((1, 2), (3, 5)), ((1, 2), (3, 4))),
    "at the start": (((0, 2),), ((0, 1),)),
    "after the first token": (((1, 4),), ((1, 2),)),
    "at the end": (((4, 6),), ((3, 5),)),
    "all but the last": (((0, 5),), ((0, 4),)),
    "all but the first": (((1, 6),), ((1, 5),)),
}


def pairs() -> list[TokenTree]:
    """Of different lengths, each with context somewhere else; the last one without any."""
    whole = [replace(TokenTree(PROMPT, (FIRST, SECOND)), context=spans) for spans in CONTEXTS.values()]
    shorter = [
        replace(tree, prompt=tuple(token + 30 + i for token in tree.prompt[i % 3 :])) for i, tree in enumerate(whole)
    ]
    return [*shorter, TokenTree((3, 4), ((40, 41, 42), (50, 51)))]


# ---- log-probs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CONTEXTS)
def test_log_probs_and_gradients_of_a_tree(name: str, backend: str | None) -> None:
    tree, neighbour = TokenTree(PROMPT, (FIRST, SECOND), CONTEXTS[name]), TokenTree((9, 3), ((30, 31),))
    with exactly(torch.float64):
        model = with_lora(family("llama", torch.float64))
        wanted = outcome(model, lambda: dense_logprobs(model, [neighbour, tree, neighbour]))
        scorer = Scorer(model, 64, backend)
        assert_same(outcome(model, lambda: scorer.score([neighbour, tree, neighbour]).tokens), wanted, 1e-10)
        found, per_completion = scorer.score([tree]), [int(mask.sum()) for mask in masks(tree)]
        assert found.lengths.tolist() == per_completion
        sums = torch.stack([part.sum() for part in dense_logprobs(model, [tree]).split(per_completion)])
        torch.testing.assert_close(found.sums(), sums, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.means(), sums / found.lengths, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2"])
def test_families(name: str) -> None:
    with exactly(torch.float64):
        model, trees = with_lora(family(name, torch.float64)), pairs()
        wanted = outcome(model, lambda: dense_logprobs(model, trees))
        scorer = choose_scorer(model, trees, 64)
        assert scorer.packed, scorer.reason
        assert_same(outcome(model, lambda: scorer.score(trees).tokens), wanted, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_context_is_read(backend: str | None) -> None:
    """Another token in it changes the log-probs behind it, and none before."""
    model = family("llama")
    tree = TokenTree(PROMPT, (FIRST, SECOND), CONTEXTS["in the first"])
    other = replace(tree, completions=((*FIRST[:3], 77, *FIRST[4:]), SECOND))
    with torch.no_grad():
        before, after = (Scorer(model, 64, backend).score([each]).tokens for each in (tree, other))
    assert torch.equal(before[:2], after[:2]) and (before[2:4] != after[2:4]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_and_prompts(backend: str | None) -> None:
    """Those of the scored positions; prompts are scored as without context."""
    with exactly(torch.float64), torch.no_grad():
        model, trees = family("llama", torch.float64), pairs()
        scorer = Scorer(model, 64, backend)
        found = scorer.score(trees, statistics=True, scores_prompt=True)
        whole = scorer.score([replace(tree, context=()) for tree in trees], statistics=True, scores_prompt=True)
        mask = torch.cat([mask for tree in trees for mask in masks(tree)])
        assert found.statistics and whole.statistics and found.prompts is not None
        for value, of_all in zip(found.statistics, whole.statistics, strict=True):
            torch.testing.assert_close(value, of_all[mask], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.prompts, whole.prompts, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_are_of_whole_conversations(backend: str | None) -> None:
    with exactly(torch.float64):
        model, trees = with_lora(classifier("llama", torch.float64), task_type="SEQ_CLS"), pairs()
        wanted = outcome(model, lambda: dense_scores(model, trees))
        model.config.pad_token_id = 0
        assert_same(outcome(model, lambda: Scorer(model, 64, backend).score(trees).tokens), wanted, 1e-10)


# ---- the reference ----------------------------------------------------------------------------------------------


def test_reference_of_other_context_is_not_mixed_up(tmp_path: Path) -> None:
    model, trees = with_lora(family("llama")), pairs()
    scorer = Scorer(model, 64, "prefold_joined")
    sets = [trees, [replace(tree, context=()) for tree in trees]]
    moved = [TokenTree(PROMPT, (FIRST, SECOND), (((i, i + 1),), ())) for i in (1, 2)]
    for given in (*sets, moved[:1], moved[1:]) * 2:  # computed, and then read
        reference = Reference(scorer, given, tmp_path)
        found = [*reference.of(range(len(given))).values()]
        reference.keep()
        with torch.no_grad(), reference_model(model):
            wanted = [dense_logprobs(model, [tree]) for tree in given]
        for tree, own, dense in zip(given, found, wanted, strict=True):
            assert len(own) == tree.scored_tokens
            torch.testing.assert_close(own, dense, rtol=1e-5, atol=1e-5)
    assert len([*tmp_path.rglob("*.safetensors")]) == 4


def test_held_out_pairs_are_compared_by_their_scored_tokens() -> None:
    model, trees = family("llama"), pairs()
    found = score_pairs(Scorer(model, 64, "prefold_joined"), trees, "")
    with torch.no_grad():
        parts = [dense_logprobs(model, [tree]).split([int(mask.sum()) for mask in masks(tree)]) for tree in trees]
    for name, wanted in (("sums", torch.Tensor.sum), ("means", torch.Tensor.mean)):
        expected = [[float(wanted(part)) for part in of_tree] for of_tree in parts]
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-5)


# ---- every method -----------------------------------------------------------------------------------------------

METHODS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ALGORITHMS if name not in ("mixed", "grpo")),
    ("dpo", {"ld_alpha": 0.5}),
    ("dpo", {"use_weighting": True}),
    ("orpo", {"completion_only_loss": True}),
    ("cpo", {"loss_type": "ipo"}),
    ("mixed", {"losses": [{"name": "dpo"}, {"name": "orpo", "weight": 0.5}, {"name": "aot"}]}),
    *(
        ("grpo", {"num_generations": 2, "num_iterations": 2, "beta": 0.1, **settings})
        for settings in (
            {"loss_type": "grpo"},
            {"loss_type": "dr_grpo"},
            {"loss_type": "dapo", "importance_sampling_level": "sequence"},
            {"loss_type": "cispo", "epsilon_high": 1.1},
        )
    ),
]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def trees_of(algorithm: Algorithm) -> list[TokenTree]:
    if algorithm.kind.data != "unpaired":
        return pairs()
    return [
        TokenTree(tree.prompt, tree.completions[side : side + 1], tree.context[side : side + 1])
        for i, tree in enumerate(pairs())
        for side in [(i + 1) % 2]
    ]


def data_of(algorithm: Algorithm, model: nn.Module, trees: Sequence[TokenTree]) -> TreeSet:
    reference, extras = None, {}
    if algorithm.needs_reference:
        with torch.no_grad(), reference_model(model):
            reference = [dense_logprobs(model, [tree]) for tree in trees]
    if algorithm.kind.data == "unpaired":
        extras["label"] = [torch.tensor([i % 3 > 0]) for i in range(len(trees))]
    if algorithm.draws:
        extras["advantages"] = [torch.tensor([1.0 - i / 7, i / 3 - 1.0]) for i in range(len(trees))]
        extras["sampled"] = [torch.full((sum(int(mask.sum()) for mask in masks(tree)),), -4.0) for tree in trees]
    return TreeSet(trees, reference, extras)


def steps_of_the_loop(
    method: str, settings: dict[str, Any], model: nn.Module, data: TreeSet, scorer: Scorer, folder: Path
) -> list[Outcome]:
    """Loss and gradients of a step, and of the next one on the same trees where the method takes several."""
    recipe = make_recipe(
        {
            "method": method,
            method: settings,
            "model": {"name": "unused", "dtype": "float32"},
            "data": {"train": [{"path": "unused"}]},
            "output_dir": str(folder),
            **({"rewards": [{"name": "length", "target": 1}]} if ALGORITHMS[method].kind.samples else {}),
        }
    )
    unused: Any = None
    order = StepOrder(len(data.trees), len(data.trees), len(data.trees), seed=0)
    args = training_arguments(recipe, 2)
    loop = TrainingLoop(recipe.algorithm, scorer, unused, order, unused, unused, args)
    loop.accelerator = SimpleNamespace(backward=Tensor.backward)  # type: ignore[assignment]
    results = []
    for _ in range(recipe.algorithm.iterations):
        model.zero_grad()
        with scorer.in_place():
            loss, _ = loop.compute_gradients(StepTrees(data, range(len(data.trees))))
        results.append((loss.detach()[None], gradients(model)))
    return results


def masked(model: nn.Module, trees: Sequence[TokenTree]) -> TreeLogprobs:
    """Each conversation by itself, all its logits, and then those alone of which the mask is True."""
    tokens, lengths, prompts, entropy, squares, top1 = [], [], [], [], [], []
    with using_attention(unwrapped(model), "dense_for_tests"):
        for tree in trees:
            for ids, mask in zip(tree.completions, masks(tree), strict=True):
                whole = torch.tensor(tree.prompt + ids)
                logits = model(input_ids=whole[None], use_cache=False).logits[0, :-1].log_softmax(-1)
                own = logits.gather(-1, whole[1:, None]).squeeze(-1)
                prompts.append(own[: len(tree.prompt) - 1].sum())
                tokens.append(own[len(tree.prompt) - 1 :][mask])
                of_scored = logits.detach()[len(tree.prompt) - 1 :][mask]
                entropy.append(-(of_scored.exp() * of_scored).sum(-1))
                squares.append(of_scored.exp().square().sum(-1))
                top1.append(of_scored.argmax(-1) == whole[len(tree.prompt) :][mask])
                lengths.append(int(mask.sum()))
    depths = torch.tensor([len(tree.prompt) - 1 for tree in trees])
    first_of_tree = torch.tensor([len(tree.completions) for tree in trees]).cumsum(0) - len(trees[0].completions)
    statistics = Statistics(torch.cat(entropy), torch.cat(squares), torch.cat(top1))
    own_prompts = torch.stack(prompts)[first_of_tree]
    return logprobs(torch.cat(tokens), lengths, statistics=statistics, prompts=own_prompts, prompt_lengths=depths)


def by_hand(algorithm: Algorithm, model: nn.Module, data: TreeSet) -> Outcome:
    """The loss of a whole step over its scored tokens, divided by counts of them that are made here."""
    model.zero_grad()
    trees = data.trees
    extras = {name: torch.cat([values[i] for i in range(len(trees))]) for name, values in data.extras.items()}
    if algorithm.kind.scores:
        scores = dense_scores(model, list(trees))
        policy = logprobs(scores, [1] * len(scores))
    else:
        policy = masked(model, trees)
    reference = None
    if data.reference is not None:
        reference = logprobs(torch.cat(list(data.reference)), policy.lengths.tolist())
    if algorithm.kind.data == "unpaired":
        before = [trees[-1], *trees[:-1]]
        mismatched = [
            TokenTree(tree.prompt, other.completions, other.context) for tree, other in zip(trees, before, strict=True)
        ]
        with torch.no_grad():
            away = masked(model, mismatched).sums()
            with reference_model(model):
                reference = replace(reference, extras={"mismatched": masked(model, mismatched).sums()})
        extras["mismatched"] = away
    output = algorithm.loss(replace(policy, extras=extras), reference)
    if "mismatched" in extras:
        assert metric_means(output)["kl"] > 0.1  # else the mismatched completions would decide nothing
    per_tree = [[int(mask.sum()) for mask in masks(tree)] for tree in trees]
    chosen, prompt = sum(counts[0] for counts in per_tree), sum(len(tree.prompt) - 1 for tree in trees)
    counts = {
        "pairs": len(trees),
        "completions": sum(map(len, per_tree)),
        "chosen_tokens": chosen,
        "conversation_tokens": chosen + prompt,
        "completion_tokens": sum(map(sum, per_tree)),
    }
    loss = torch.stack([total / counts[unit] for unit, total in output.loss.items()]).sum()
    loss.backward()
    return loss.detach()[None], gradients(model)


@pytest.mark.parametrize(("method", "settings"), METHODS, ids=lambda value: str(value))
def test_a_step_of_every_method(method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Packed in one row, packed and plain in several."""
    algorithm = ALGORITHMS[method](**settings)
    dtype = torch.float32 if algorithm.kind.data == "unpaired" else torch.float64  # as the sums of further trees are
    with exactly(dtype):
        if algorithm.kind.scores:
            model = with_lora(classifier("llama", dtype), task_type="SEQ_CLS")
        else:
            model = with_lora(family("llama", dtype))
        data = data_of(algorithm, model, trees_of(algorithm))
        wanted = by_hand(algorithm, model, data)
        model.config.pad_token_id = 0
        scorers = [Scorer(model, *how) for how in ((10_000, "prefold_joined"), (40, "prefold_joined"), (40, None))]
        assert [len(scorer.rows(data.trees)) > 1 for scorer in scorers] == [False, True, True]
        for scorer in scorers:
            data.extras.pop("old", None)
            found = steps_of_the_loop(method, settings, model, data, scorer, tmp_path)
            assert len(found) == algorithm.iterations
            for loss, found_gradients in found:
                torch.testing.assert_close(loss.to(dtype), wanted[0], rtol=1e-6, atol=1e-6)  # added up in float32
                assert_same((wanted[0], found_gradients), wanted, TOLERANCE[dtype])
    if algorithm.iterations > 1:
        kept = [len(data.extras["old"][i]) for i in range(len(data.trees))]
        assert kept == [tree.scored_tokens for tree in data.trees]
