"""The data sets that come with prefold are what their page, docs/demo-data.md, says of them."""

from __future__ import annotations

import re

import pytest

from prefold.data.sources import read_rows
from prefold.recipe import Source

SPLITS = ("train", "held_out")


def rows_of(name: str, split: str) -> list[dict[str, str]]:
    return [dict(row.value or {}) for row in read_rows(Source(path=f"builtin:{name}", split=split))]


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?:]) ", text)


@pytest.mark.parametrize(("name", "numbers"), [("short_answers", (150, 52)), ("everyday_prompts", (150, 52))])
def test_no_prompt_is_trained_on_and_held_out(name: str, numbers: tuple[int, int]) -> None:
    prompts = [[row["prompt"] for row in rows_of(name, split)] for split in SPLITS]
    assert tuple(map(len, prompts)) == numbers
    assert len({prompt for each in prompts for prompt in each}) == sum(numbers)


@pytest.mark.parametrize("split", SPLITS)
def test_rejected_is_the_chosen_answer_padded(split: str) -> None:
    for row in rows_of("short_answers", split):
        before, found, behind = row["rejected"].partition(row["chosen"])
        assert found and len(sentences(row["chosen"])) <= 3
        assert len(sentences(before.strip())) <= 2 and len(sentences(behind.strip())) >= 2


def test_nothing_of_the_padding_is_trained_on_and_held_out() -> None:
    train, held_out = (
        {part for row in rows_of("short_answers", split) for part in row["rejected"].split(row["chosen"]) if part}
        for split in SPLITS
    )
    words = [{sentence for part in each for sentence in sentences(part.strip())} for each in (train, held_out)]
    assert not words[0] & words[1]
