from __future__ import annotations

import pytest

from prefold.trees.budget import split_by_budget
from prefold.trees.packing import Node, TokenTree, pack


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
