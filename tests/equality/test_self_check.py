"""What the self-check costs, and that parts of long trees show the faults that whole ones would."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import WINDOW, family
from test_packed_is_plain import FAULTS, Fault
from tiny import VOCABULARY, with_lora
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefold.trees import attention, head
from prefold.trees.attention import unwrapped
from prefold.trees.logprobs import plain_logprobs
from prefold.trees.packing import Node, TokenTree, pack
from prefold.trees.scorer import Scorer, choose_scorer
from prefold.trees.self_check import BEYOND, COMPLETION, PROMPT, in_float32, revealing

POSITIONS = {"max_position_embeddings": 4096}


def tree(prompt: int, *completions: int, seed: int = 0) -> TokenTree:
    draw = random.Random(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(VOCABULARY) for _ in range(length))

    return TokenTree(ids(prompt), tuple(map(ids, completions)))


LONG = [tree(900, 300, 250), tree(1200, 400, 500, seed=1), tree(40, 900, 30, seed=2)]


def passes(model: nn.Module) -> list[torch.Size]:
    """`[rows, tokens]` of every pass of a model from now on."""
    shapes: list[torch.Size] = []
    embeddings = unwrapped(model).get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda module, given: shapes.append(given[0].shape))
    return shapes


@pytest.mark.parametrize(("name", "most"), [("llama", 1300), ("mistral", 400), ("gemma3_text", 400)])
def test_the_cost_is_bounded(name: str, most: int) -> None:
    model = with_lora(family(name, **POSITIONS))
    shapes = passes(model)
    scorer = choose_scorer(model, LONG, 1024)
    assert scorer.packed, scorer.reason
    assert 0 < sum(shape.numel() for shape in shapes) <= most
    # One step of one of these trees takes three times its tokens, in one row.
    assert most < 3 * min(tree.size for tree in LONG)
    assert max(shape.numel() for shape in shapes) < min(tree.size for tree in LONG)


def test_past_a_long_window_one_row_at_a_time() -> None:
    """It costs no more than a step with the tree that is longer than the window."""
    window = 1000
    model = with_lora(family("mistral", sliding_window=window, **POSITIONS))
    shapes = passes(model)
    assert choose_scorer(model, LONG, 1024).packed
    beyond = [shape for shape in shapes if shape[1] > window]
    assert beyond and all(shape[0] == 1 and shape[1] <= 1.2 * window for shape in beyond)
    assert sum(shape.numel() for shape in shapes) <= 3 * LONG[1].size
    shapes.clear()
    assert choose_scorer(model, LONG[:1], 1024, deepest=tree(10, 800)).packed
    assert max(shape[1] for shape in shapes) > window  # a tree of 1,200 tokens
    shapes.clear()
    assert choose_scorer(model, [tree(300, 20, 30)], 1024).packed
    assert max(shape.numel() for shape in shapes) <= PROMPT + 2 * COMPLETION + PROMPT


def test_logits_of_prompts_are_not_computed() -> None:
    model = family("llama", **POSITIONS)
    logits: list[int] = []
    model.lm_head.register_forward_hook(lambda module, given, output: logits.append(output.shape[1]))
    plain_logprobs(model, pack([tree(500, 20, 30)]), 0)
    assert logits == [31, 21]


def test_what_is_checked() -> None:
    for window in (None, WINDOW, 500):
        for rows in (LONG, LONG[:1], [tree(3, 1)], [tree(1, 1, 1, 1, 1, 1)]):
            first, *more = revealing(rows, window)
            assert len(first) == min(3, len(rows))
            assert all(part.completions and min(map(len, part.completions)) for part in first)
            assert max(part.longest for part in first) <= min(window or 1000, PROMPT + COMPLETION)
            goes_beyond = window is not None and max(each.longest for each in rows) > window
            assert bool(more) == goes_beyond
            assert not more or window < more[0][0].longest <= window + BEYOND + COMPLETION
            assert not more or len(more[0]) == 2
    ragged = revealing(LONG, None)[0]
    assert len({len(ids) for part in ragged for ids in part.completions}) > 1
    assert len({len(part.prompt) for part in ragged}) == 3


def test_context_stays_and_leaves_something_to_score() -> None:
    given = TokenTree(tuple(range(9)), (tuple(range(100)), tuple(range(60))), (((20, 90),), ((0, 50),)))
    [[part]] = revealing([given], None)
    assert part.context[0] == ((20, 32),) and part.context[1] == ()
    assert part.scored_tokens == 20 + 24


# ---- faults -----------------------------------------------------------------------------------------------------


def another_window(difference: int) -> Fault:
    def fault(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        right = attention.lower_right

        def wrong(rows: int, columns: int, window: int | None, device: torch.device) -> Tensor:
            return right(rows, columns, window and window + difference, device)

        monkeypatch.setattr(attention, "lower_right", wrong)

    return fault


def no_window(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    segments = attention.segments
    monkeypatch.setattr(
        attention,
        "segments",
        lambda query, key, value, trees, shape: segments(*(query, key, value), trees, shape._replace(window=None)),
    )


def sees_sibling(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A completion sees what stands right before it, be it of another one."""
    changed(monkeypatch, lambda own, above: (*above, (own[0] - 1, own[0])) if above else above)


def sees_neighbour(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    changed(monkeypatch, lambda own, above: ((own[0] - 1, own[0]),) if not above and own[0] else above)


def changed(monkeypatch: pytest.MonkeyPatch, above: Callable[..., Any]) -> None:
    segments = attention.segments

    def wrong(query: Tensor, key: Tensor, value: Tensor, trees: Any, shape: Any) -> Tensor:
        nodes = tuple(Node(node.own, above(node.own, node.above), node.below) for node in trees.nodes)
        return segments(query, key, value, type(trees)(**{**vars(trees), "nodes": nodes}), shape)

    monkeypatch.setattr(attention, "segments", wrong)


def wrong_scale(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    right = head.head_of
    monkeypatch.setattr("prefold.trees.logprobs.head_of", lambda model, temperature: right(model, temperature * 1.01))


MORE = [
    (another_window(1), "mistral"),
    (another_window(-1), "mistral"),
    (another_window(1), "gemma3_text"),
    (no_window, "mistral"),
    (no_window, "qwen2"),
    (sees_sibling, "mistral"),
    (sees_neighbour, "mistral"),
    (wrong_scale, "granite"),
    (wrong_scale, "llama"),
]


@pytest.mark.parametrize(("fault", "name"), [*FAULTS, *MORE])
def test_parts_of_long_trees_show_every_fault(fault: Fault, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family(name, **POSITIONS)
    assert choose_scorer(model, LONG, 1024).packed
    fault(model, monkeypatch)
    scorer = choose_scorer(model, LONG, 1024)
    assert "differ from plain ones" in scorer.reason
    assert isinstance(scorer, Scorer) and not scorer.packed


class Giver(nn.Module):
    """Gives its own weights away."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.data


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.giver, self.layers = Giver(), nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        given: Tensor = self.giver(x)
        for layer in self.layers:
            x = layer(x).relu()
        return x @ given


def test_float32_for_the_call_alone() -> None:
    """Values and gradients are those of a model that is kept in float32, though memory is used again, and what a module
    gives away of its weights stays as it is."""
    torch.manual_seed(0)
    half = Net().bfloat16()
    wide = copy.deepcopy(half).float()
    x = torch.randn(4, 8)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    with in_float32(half):
        with torch.no_grad():
            assert torch.equal(half(x), wide(x)) and torch.equal(half(2 * x), wide(2 * x))
        for model, given in zip((half, wide), inputs, strict=True):
            model(given).square().sum().backward()
    assert inputs[0].grad is not None and torch.equal(inputs[0].grad, inputs[1].grad)
    assert all(parameter.dtype == torch.bfloat16 for parameter in half.parameters())
