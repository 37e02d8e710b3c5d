from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prefold.trees.budget import split_by_budget
from prefold.trees.packing import Node, Span, TokenTree, pack


def test_the_row_of_the_module_docstring() -> None:
    row = pack([TokenTree((10, 11, 12), ((20, 21), (30, 31, 32))), TokenTree((40, 41), ((50, 51),))])
    assert row.input_ids.tolist() == [[10, 11, 12, 20, 21, 30, 31, 32, 40, 41, 50, 51]]
    assert row.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 3]]
    assert row.predictors.tolist() == [2, 3, 2, 5, 6, 9, 10]
    assert row.targets.tolist() == [20, 21, 30, 31, 32, 50, 51]
    assert row.completion.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert row.lengths.tolist() == [2, 3, 2]
    assert row.nodes == (
        Node((0, 3), (), (3, 8)),
        Node((3, 5), ((0, 3),), (5, 5)),
        Node((5, 8), ((0, 3),), (8, 8)),
        Node((8, 10), (), (10, 12)),
        Node((10, 12), ((8, 10),), (12, 12)),
    )
    assert row.prompts == [(0, 3), (8, 10)]
    without_b1 = pack([TokenTree((10, 11, 12), ((20, 21), (30, 31, 32)), ((), ((1, 2),)))])
    assert without_b1.predictors.tolist() == [2, 3, 2, 6]


@pytest.mark.parametrize(
    ("context", "predictors", "targets", "lengths"),
    [
        ((), [2, 3, 4, 2, 6, 7, 8], [20, 21, 22, 30, 31, 32, 33], [3, 4]),
        (((), ()), [2, 3, 4, 2, 6, 7, 8], [20, 21, 22, 30, 31, 32, 33], [3, 4]),
        (((), ((1, 2),)), [2, 3, 4, 2, 7, 8], [20, 21, 22, 30, 32, 33], [3, 3]),
        ((((0, 1),), ()), [3, 4, 2, 6, 7, 8], [21, 22, 30, 31, 32, 33], [2, 4]),
        ((((1, 3),), ((0, 1), (2, 4))), [2, 6], [20, 31], [1, 1]),
    ],
    ids=["none", "none of each", "in the second", "at the start", "at the ends and several"],
)
def test_context_is_laid_out_and_not_scored(
    context: tuple[tuple[Span, ...], ...], predictors: list[int], targets: list[int], lengths: list[int]
) -> None:
    whole = TokenTree((10, 11, 12), ((20, 21, 22), (30, 31, 32, 33)))
    tree = replace(whole, context=context)
    row, wanted = pack([tree], scores_prompt=True), pack([whole])
    assert (row.predictors.tolist(), row.targets.tolist()) == ([*predictors, 0, 1], [*targets, 11, 12])
    assert row.lengths.tolist() == [len(indices) for indices in tree.scored] == lengths
    assert row.completion.tolist() == [0] * lengths[0] + [1] * lengths[1]
    assert tree.scored_tokens == sum(lengths)
    assert torch.equal(row.input_ids, wanted.input_ids) and torch.equal(row.positions, wanted.positions)
    assert row.nodes == wanted.nodes
    assert (tree.size, tree.longest, tree.plain_size) == (whole.size, whole.longest, whole.plain_size)
    assert (tree == whole) is (tree.key == whole.key) is not any(context)


def test_a_completion_has_a_scored_token() -> None:
    with pytest.raises(AssertionError, match="without a scored token"):
        pack([TokenTree((1,), ((2, 3), (4,)), ((), ((0, 1),)))])


def test_sizes() -> None:
    tree = TokenTree((1, 2, 3), ((4,), (5, 6)))
    assert (tree.size, tree.plain_size) == (6, 9)


@pytest.mark.parametrize(
    ("sizes", "budget", "rows"),
    [
        ([5, 5, 5, 5], 10, [[0, 1], [2, 3]]),
        ([3, 9, 4, 6], 10, [[1], [2, 3], [0]]),
        ([30, 1, 1], 10, [[0], [1, 2]]),
        ([], 10, []),
    ],
)
def test_budget(sizes: list[int], budget: int, rows: list[list[int]]) -> None:
    assert split_by_budget(sizes, budget) == rows
