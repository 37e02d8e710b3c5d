"""The mix of seven preference sets of the `orpollama-orpo` recipe, on files with the columns of the real ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_samples import assistant, user
from transformers import PreTrainedTokenizerFast

from prefold.data.mixture import load_split
from prefold.recipe import load_recipe

Row = dict[str, Any]


def talk(number: int, answer: str) -> list[Any]:
    return [user(f"Question {number}?"), assistant(f"{answer} {number}.")]


def capybara(number: int, passes: bool) -> Row:
    turns = [user("Hello."), assistant("Hi.")]
    return {
        "source": "Airoboros",
        "conversation": [{"input": "Hello.", "output": "Hi."}],
        "original_response": "So.",
        "prompt": f"Question {number}?",
        "chosen": turns + talk(number, "So"),
        "rejected": turns + talk(number, "No"),
        "rating_chosen": 5 if passes else 4,
        "rating_rejected": 3,
    }


def intel_orca(number: int, passes: bool) -> Row:
    # Each filter alone keeps a third of the rows that must go.
    score, known, rated = ((9.5, False, True), (8.0, False, True), (10.0, True, True), (None, False, False))[
        0 if passes else 1 + number % 3
    ]
    return {
        "system": "You help." if number % 2 else "",
        "input": f"Question {number}?",
        "chosen": f"So {number}.",
        "rejected": f"No {number}.",
        "rating": [9.0, 5.0] if rated else None,
        "status": "unchanged",
        "chosen_score": score,
        "in_gsm8k_train": known,
    }


def ultrafeedback(number: int, passes: bool) -> Row:
    return {
        "source": "evol_instruct",
        "prompt": f"Question {number}?",
        "chosen": talk(number, "So"),
        "chosen-rating": 5.0 if passes else 4.75,
        "chosen-model": "a",
        "rejected": talk(number, "No"),
        "rejected-rating": 2.0,
        "rejected-model": "b",
    }


def math(number: int, passes: bool) -> Row:
    return {
        "metadata": {"labelling": None},
        "instruction": f"Question {number}?",
        "chosen_response": f"So {number}.",
        "chosen_rating": 9.0 if passes else 8.0,
        "rejected_response": f"No {number}.",
        "rejected_rating": 7.0,
    }


def plain(number: int, passes: bool) -> Row:
    return {"prompt": f"Question {number}?", "chosen": f"So {number}.", "rejected": f"No {number}.", "id": str(number)}


def process(number: int, passes: bool) -> Row:
    row = {"prompt": f"Question {number}?", "chosen": f"So {number}.", "rejected": f"No {number}."}
    return row | {"is_chosen_correct": True, "is_rejected_correct": False}


def truthy(number: int, passes: bool) -> Row:
    return {"id": str(number), "source": "truthy_dpo", "system": "You are honest."} | process(number, passes)


# In the order of the recipe: how rows look, how many the card names, how many must be filtered out.
SOURCES: list[tuple[Callable[[int, bool], Row], int, int]] = [
    (capybara, 2_882, 700),
    (intel_orca, 2_299, 900),
    (ultrafeedback, 22_799, 1_200),
    (math, 2_181, 300),
    (plain, 541, 0),
    (process, 7_958, 0),
    (truthy, 1_016, 0),
]


@pytest.mark.parametrize("share", [20, pytest.param(1, marks=pytest.mark.slow)], ids=["a twentieth", "all rows"])
def test_the_mix_has_the_published_counts(share: int, tmp_path: Path, chatml: PreTrainedTokenizerFast) -> None:
    data = load_recipe("orpollama-orpo").data
    sources = []
    for place, (make, kept, dropped) in enumerate(SOURCES):
        passing = [make(number, True) for number in range(kept // share)]
        failing = [make(number + kept, False) for number in range(dropped // share)]
        path = tmp_path / f"{place}.jsonl"
        # Mixed, so that nothing hangs on the order.
        rows = [row for pair in zip(passing, failing, strict=False) for row in pair]
        rows += passing[len(failing) :]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append(data.train[place].model_copy(update={"path": str(path), "split": None, "count": None}))
    prepared = load_split(data.model_copy(update={"train": sources}), chatml, seed=42)
    for found, (_, kept, dropped) in zip(prepared.report.sources, SOURCES, strict=True):
        assert (found.rows_used, found.rows_filtered) == (kept // share, dropped // share), found.path
    total = sum(kept // share for _, kept, _ in SOURCES)
    assert len(prepared.train) + len(prepared.held_out) == total
    assert len(prepared.held_out) == pytest.approx(total / 100, abs=1 + total / 500)
    # All sources together, in one shuffled order.
    first = {origin.source for origin in prepared.train.origins[:50]}
    assert len(first) > 3


def test_the_recipe_takes_a_thousand_rows_by_the_shares_of_the_sources() -> None:
    counts = [source.count for source in load_recipe("orpollama-orpo").data.train]
    total = sum(kept for _, kept, _ in SOURCES)
    assert sum(filter(None, counts)) == 1000
    for count, (_, kept, _) in zip(counts, SOURCES, strict=True):
        assert count and abs(count - 1000 * kept / total) < 1
