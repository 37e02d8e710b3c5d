"""How far a model tells pairs apart before training, by numbers that can be checked by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prefold.data.preference import RowId
from prefold.evaluation.held_out_pairs import PairScores
from prefold.evaluation.separation import findings_of, separation

Margins = Sequence[float]


def scores(margins: Margins) -> PairScores:
    """Pairs of these margins per token; their sums, which do not matter here, are of another order."""
    means = np.array([[margin - 2.0, -2.0] for margin in margins])
    return PairScores(-means * 7, means)


def found(margins: Margins) -> dict[str, tuple[int, list[int]]]:
    origins = [RowId("pairs.jsonl", row) for row in range(1, len(margins) + 1)]
    return {one.kind: (one.count, [row.row for row in one.rows]) for one in findings_of(scores(margins), origins)}


def test_accuracy_quartiles_and_histogram() -> None:
    facts = separation(scores([-1.0, 0.0, 1.0, 3.0, 5.0]))
    assert facts["pairs"] == 5
    assert facts["accuracy"] == 0.7  # three right, and a tie that counts one half
    assert facts["quartiles"] == [0.0, 1.0, 3.0]
    assert facts["histogram"]["edges"][0] == -1.0 and facts["histogram"]["edges"][-1] == 5.0
    assert sum(facts["histogram"]["counts"]) == 5 and facts["histogram"]["counts"][-1] == 1


def test_pairs_that_are_separated_already() -> None:
    assert found([1.0] * 9 + [-1.0])["already_separated"] == (9, [])
    assert "already_separated" not in found([1.0] * 8 + [-1.0] * 2)


def test_pairs_that_the_model_is_far_more_against_are_named_worst_first() -> None:
    margins = [0.1, -0.1, 0.2, -0.2, 0.0, 0.3, -0.3, -4.0, 0.1, -9.0]
    assert found(margins)["likely_flipped"] == (2, [10, 8])


def test_an_outlier_on_the_right_side_is_no_flip() -> None:
    assert "likely_flipped" not in found([5.0, 5.1, 4.9, 5.0, 5.2, 4.8, 0.5, 20.0])
    assert "likely_flipped" not in found([-0.5, -0.4, -0.6, -0.5])
