"""Questions of tasks that stand in training data are found, and counted apart."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from harness_tasks import KINDS, write_task
from simulated import scores

from prefold.data.preference import Message, Preference, Record, RowId
from prefold.evaluation.contamination import questions_in
from prefold.evaluation.scores import TaskScores
from prefold.evaluation.task_comparison import compare_tasks
from prefold.evaluation.tasks import open_tasks
from prefold.recipe import Evaluate

OPTIONS = [row["question"] for row in KINDS["tiny_options"][0]]
TOWNS = (
    ("Ahlen", "by the old mill", "apples and pears"),
    ("Brno", "near a bridge", "cheese"),
    ("Cork", "at the sea", "fish"),
)


def record(prompt: str, chosen: str = "Yes.", rejected: str = "No.") -> Record:
    asked, *answers = (
        (Message(role=role, content=text),)
        for role, text in (("user", prompt), ("assistant", chosen), ("assistant", rejected))
    )
    return Preference(asked, *answers, RowId("pairs.jsonl", 1))


def found(folder: Path, records: list[Record], *names: str, limit: int | None = None) -> list[str]:
    tasks = open_tasks(Evaluate(tasks=list(names), include_path=str(folder), limit=limit))
    return sorted(questions_in(records, tasks, limit))


@pytest.mark.usefixtures("own_caches")
def test_questions_that_the_data_holds(folder: Path) -> None:
    """Without what the task puts around each of them."""
    records = [record("Hi!", f"You asked: {OPTIONS[2].lower()}"), record("What is 3 plus 3?"), record("What is 5?")]
    asked = [f"Question: {question}\nAnswer:" for question in (OPTIONS[2], "What is 3 plus 3?")]
    assert found(folder, records, "tiny_options", "tiny_sums") == sorted(asked)
    assert found(folder, [], "tiny_options", "tiny_sums") == []


@pytest.mark.usefixtures("own_caches")
def test_what_a_task_says_each_time_is_no_question(folder: Path) -> None:
    preamble = "Q: What is life?\nA: Life is a long story with many people in it.\n\nQ: What is rain like?\nA:"
    same = [record("What is life?", "Life is a long story with many people in it.")]
    assert found(folder, same, "tiny_facts") == []
    # Four words are too few to be looked for within a message, but may be one.
    assert found(folder, [record("What is rain like?")], "tiny_facts") == [preamble]


@pytest.mark.usefixtures("own_caches")
def test_a_passage_counts_for_all_of_its_questions_that_are_asked(folder: Path) -> None:
    stories = [
        f"In {town} there is a market {where}, to which people come on foot, and they bring {what}."
        for town, where, what in TOWNS
    ]
    rows = [
        {"story": story, "question": question, "label": 0}
        for story in stories
        for question in ("Is it big?", "Is it old?")
    ]
    write_task(folder, "towns", rows, KINDS["tiny_passages"][1])
    records = [record(stories[0])]
    assert len(found(folder, records, "towns")) == 2
    assert len(found(folder, records, "towns", limit=1)) == 1


# ---- counted apart ----


Marks = tuple[bool, ...]


def compared(
    before: list[float], after: list[float], seen_before: Marks | None = None, seen: Marks | None = None
) -> dict[str, Any]:
    sides = [scores(before, contaminated=seen_before), scores(after, contaminated=seen)]
    result = compare_tasks(sides[:1], sides[1:])
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    facts: dict[str, Any] = result["tasks"]["task"]
    return facts


def test_scores_with_and_without() -> None:
    """Ten questions; the four that were trained on became right, of the others one did and one became wrong."""
    before, after = [0, 0, 0, 0, 1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 0, 1, 1, 1, 0, 0]
    facts = compared(before, after, seen=(True,) * 4 + (False,) * 6)
    seen, clean = facts["contaminated"], facts["clean"]
    assert (facts["n"], seen["n"], clean["n"]) == (10, 4, 6)
    assert (seen["before"], seen["after"], seen["difference"]) == (0.0, 1.0, 1.0)
    assert (clean["before"], clean["after"], clean["difference"], clean["p_value"]) == (0.5, 0.5, 0.0, 1.0)
    assert clean["ci"][0] < 0 < clean["ci"][1]
    alone = compared(before[4:], after[4:])
    assert {name: clean[name] for name in ("ci", "difference", "n")} == {
        name: alone[name] for name in ("ci", "difference", "n")
    }


def test_either_model_may_have_been_trained_on_a_question() -> None:
    facts = compared([0, 0, 1], [0, 1, 1], seen_before=(True, False, False), seen=(False, True, False))
    assert (facts["contaminated"]["n"], facts["clean"]["n"]) == (2, 1)


def test_where_nothing_or_all_was_trained_on_and_where_nobody_knows() -> None:
    assert compared([0, 1], [1, 1], seen=(False, False))["contaminated"] == {"n": 0}
    assert compared([0, 1], [1, 1], seen=(True, True))["clean"] == {"n": 0}
    unknown = compared([0, 1], [1, 1])
    assert unknown["contaminated"] is None and unknown["clean"] is None


def test_marks_follow_their_questions() -> None:
    first = scores([0, 1, 1], questions=("a", "b", "c"))
    second = scores([1, 1, 0], questions=("c", "a", "d"), contaminated=(True, False, True))
    facts = compare_tasks([first], [second])["tasks"]["task"]
    assert facts["n"] == 2 and facts["contaminated"]["n"] == 1 and facts["contaminated"]["before"] == 1.0


def test_marks_are_written_and_read_again() -> None:
    one = scores([0, 1], contaminated=(True, False))
    assert TaskScores.from_json(json.loads(json.dumps(asdict(one)))) == one
    earlier = {name: value for name, value in asdict(one).items() if name != "contaminated"}
    assert TaskScores.from_json(earlier).contaminated is None
