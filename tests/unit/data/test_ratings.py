"""Ratings beside chosen and rejected, under the names that data sets give them."""

from __future__ import annotations

from typing import Any

import pytest
from data_samples import to_record

from prefold.data.formats import RawRow
from prefold.data.preference import Preference, RowId
from prefold.data.shapes import find_shape
from prefold.data.votes import ratings


@pytest.mark.parametrize(
    "row, found",
    [
        ({"chosen-rating": 5.0, "rejected-rating": 2.5}, (5.0, 2.5)),
        ({"rating_chosen": 5, "rating_rejected": 4}, (5.0, 4.0)),
        ({"chosen_score": "9.5", "rejected_score": "7"}, (9.5, 7.0)),
        ({"metadata": {"score_chosen": 8, "score_rejected": 8}}, (8.0, 8.0)),
        ({"Score-Chosen": 1, "score.rejected": 0}, None),
        ({"chosen_score": 9.0}, None),
        ({"chosen_score": True, "rejected_score": False}, None),
        ({"chosen_score": "good", "rejected_score": "bad"}, None),
        ({"chosen_score": float("nan"), "rejected_score": 1}, None),
        ({"chosen_model": 3, "rejected_model": 4}, None),
    ],
)
def test_ratings(row: dict[str, Any], found: tuple[float, float] | None) -> None:
    assert ratings(row) == found


def test_a_pair_carries_its_ratings() -> None:
    row = {"prompt": "Why?", "chosen": "So.", "rejected": "No.", "rejected-rating": 3, "chosen-rating": 2}
    raw = RawRow(RowId("pairs.jsonl", 1), row)
    record = to_record(raw, find_shape([raw], "pairs.jsonl", kinds=("pairs",)))
    assert isinstance(record, Preference) and record.ratings == (2.0, 3.0)
