"""Tasks compared question by question: numbers by hand, odd and small cases, and what cannot be compared."""

from __future__ import annotations

import json
from typing import Any

import pytest
from scipy.stats import binom
from simulated import scores

from prefold.evaluation.paired import estimate
from prefold.evaluation.task_comparison import FLIPPED_SHOWN, compare_tasks


def one(before: Any, after: Any, **changes: Any) -> dict[str, Any]:
    """What is said of a single task, as JSON has it."""
    found = compare_tasks([scores(before, **changes)], [scores(after, **changes)])
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    facts: dict[str, Any] = found["tasks"]["task"]
    return facts


def test_numbers_by_hand() -> None:
    """Of 20 questions, 12 right before. 8 became right and 1 became wrong: 19 right after.

    McNemar: 2 * (C(9, 0) + C(9, 1)) / 2^9 = 20 / 512. Bonett and Price: the centre is (8 - 1) / 22, and the sum of
    squares of the 22 differences 8 + 1 + 2; over 21 * 22, as for any mean, with Student's 2.0796 for 21.
    """
    before = [1] * 11 + [1] + [0] * 8
    after = [1] * 11 + [0] + [1] * 8
    facts = one(before, after)
    assert (facts["before"], facts["after"], facts["difference"]) == (0.6, 0.95, pytest.approx(0.35))
    assert (facts["n"], facts["fixed"], facts["broken"]) == (20, 8, 1)
    assert facts["p_value"] == pytest.approx(2 * 10 / 2**9)
    spread = (8 + 1 + 2 - 22 * (7 / 22) ** 2) / 21 / 22
    assert facts["ci"] == pytest.approx([7 / 22 - 2.0796 * spread**0.5, 7 / 22 + 2.0796 * spread**0.5], abs=1e-4)
    assert facts["verdict"] == "better"


def test_the_verdict_is_in_words() -> None:
    assert one([0] * 10, [1] * 10)["verdict"] == "better"
    assert one([1] * 10, [0] * 10)["verdict"] == "worse"
    assert one([0] * 10, [1] * 10, higher_is_better=False)["verdict"] == "worse"
    same = one([0, 1] * 20, [1, 0] + [0, 1] * 19)
    points = 100 * same["detectable"]
    assert (
        same["verdict"]
        == f"no difference that 40 questions can show (smallest one they could show: {points:.1f} points)"
    )


def test_fixed_and_broken_follow_what_is_better() -> None:
    facts = one([1, 1, 0], [0, 0, 1], higher_is_better=False)
    assert (facts["fixed"], facts["broken"], facts["difference"]) == (2, 1, pytest.approx(-1 / 3))
    assert [flip["question"] for flip in facts["flipped"]["fixed"]] == ["What is q0?", "What is q1?"]


def test_flipped_questions_can_be_read() -> None:
    facts = one([0] * 9 + [1], [1] * 9 + [0])
    assert facts["fixed"] == 9 and len(facts["flipped"]["fixed"]) == FLIPPED_SHOWN
    assert facts["flipped"]["broken"] == [
        {"question": "What is q9?", "before": "task says 1", "after": "task says 0", "target": "q9 is this"}
    ]


@pytest.mark.parametrize("value", [0, 1])
def test_models_that_agree_everywhere_are_not_known_to_be_equal(value: int) -> None:
    facts = one([value] * 50, [value] * 50)
    low, high = facts["ci"]
    # Student's 2.0076 for 51 times the root of 2 / 51 / 52.
    assert (low, high) == pytest.approx((-0.05513, 0.05513), abs=1e-5)
    assert (facts["p_value"], facts["difference"], facts["changed"]) == (1.0, 0.0, 0)
    said = "no difference that 50 questions can show (all came out the same; smallest one they could show: 12.0"
    assert facts["verdict"].startswith(said)


@pytest.mark.parametrize(("before", "after"), [([0], [1]), ([1], [1]), ([0.3], [0.8])])
def test_one_question_shows_nothing(before: list[float], after: list[float]) -> None:
    facts = one(before, after)
    assert facts["verdict"] == "no difference that 1 question can show (too few to show any)"
    assert facts["p_value"] == 1.0 and facts["detectable"] is None
    assert facts["ci"] is None or facts["ci"][1] - facts["ci"][0] > 1.3


def test_five_questions_can_show_no_difference_and_six_can() -> None:
    """Even if all answers changed: 2 / 2^5 is more than 0.05, 2 / 2^6 is not."""
    assert "too few" in one([0] * 5, [1] * 5)["verdict"]
    assert one([0] * 6, [1] * 6)["verdict"] == "better"


def test_an_interval_of_right_and_wrong_stays_within_all_and_none() -> None:
    low, high = one([0, 0, 0], [1, 1, 1])["ci"]
    assert -1 <= low < 1 and high == 1


def test_questions_that_share_a_passage_count_as_one_observation() -> None:
    """Twelve answers that became right, of a single passage, are no evidence; twelve of twelve passages are."""
    before, after = [0] * 12 + [1] * 28, [1] * 40
    alone = one(before, after)
    passages = ["p"] * 12 + [f"q{place}" for place in range(28)]
    together = one(before, after, clusters=passages)
    assert alone["verdict"] == "better" and alone["p_value"] == pytest.approx(2 * binom.pmf(0, 12, 0.5))
    assert together["p_value"] == 1.0 and together["verdict"].startswith("no difference")
    assert together["clusters"] == 29
    assert together["ci"][0] < 0 < alone["ci"][0]


def test_other_metrics_have_no_flips_and_their_own_test() -> None:
    before = [0.1 * place for place in range(10)]
    facts = one(before, [value + 0.05 + 0.001 * place for place, value in enumerate(before)])
    assert facts["fixed"] is None and facts["flipped"] == {"fixed": [], "broken": []}
    assert facts["p_value"] == pytest.approx(2 / 2**10)
    assert facts["verdict"] == "better"


def test_scores_that_are_no_shares_are_compared_and_not_averaged() -> None:
    before, after = [12.0, 15.0, 9.0, 30.0] * 5, [11.0, 15.5, 8.0, 29.0] * 5
    found = compare_tasks([scores(before, higher_is_better=False)], [scores(after, higher_is_better=False)])
    assert found["tasks"]["task"]["verdict"] == "better" and found["tasks"]["task"]["shares"] is False
    assert found["average"] == {"tasks": 0}


def test_values_that_are_no_numbers_are_left_out() -> None:
    assert one([0, 1, float("nan")], [1, 1, 1])["n"] == 2
    found = compare_tasks([scores([float("nan")])], [scores([1])])
    assert found["tasks"] == {} and found["left_out"] == {"task": "the models have no question in common"}


def test_only_questions_that_both_have_are_compared() -> None:
    """In whatever order; a question that is there twice is paired with itself twice."""
    first = scores([0, 0, 1, 1], questions=("a", "b", "b", "c"), clusters=("a", "b", "b", "c"))
    second = scores([1, 0, 1], questions=("b", "a", "b"), clusters=("b", "a", "b"))
    facts = compare_tasks([first], [second])["tasks"]["task"]
    assert (facts["n"], facts["before"], facts["fixed"], facts["broken"]) == (3, pytest.approx(1 / 3), 1, 0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": "2.0"}, "the version differs: 1.0 and 2.0"),
        ({"num_fewshot": 5}, "the number of examples differs: 0 and 5"),
        ({"metric": "f1"}, "the metric differs: acc and f1"),
        ({"questions": ("x", "y")}, "the models have no question in common"),
        ({"task": "other"}, "only one of the models was measured on it"),
    ],
)
def test_what_was_not_measured_alike_is_left_out(change: dict[str, Any], reason: str) -> None:
    found = compare_tasks([scores([0, 1])], [scores([0, 1], **change)])
    assert found["tasks"] == {} and found["average"] == {"tasks": 0}
    assert found["left_out"]["task"] == reason


def test_nothing_at_all() -> None:
    assert compare_tasks([], []) == {"tasks": {}, "groups": {}, "average": {"tasks": 0}}


def test_the_same_task_of_two_suites_is_told_apart() -> None:
    both = [scores([0, 1], suite="a"), scores([0, 1], suite="b", num_fewshot=5)]
    found = compare_tasks(both, both)
    assert list(found["tasks"]) == ["task (a, 0-shot)", "task (b, 5-shot)"]
    assert set(found["suites"]) == {"a", "b"} and found["suites"]["a"]["tasks"] == 1


# ---- several tasks ----------------------------------------------------------------------------------------------


def sides(*tasks: tuple[str, list[int], list[int], str | None]) -> list[list[Any]]:
    return [[scores(task[place], task=task[0], group=task[3]) for task in tasks] for place in (1, 2)]


def test_the_average_counts_a_group_once() -> None:
    """The group's tasks gain 1/2 and 0, the single task 1/4: (1/4 + 1/4) / 2, not (1/2 + 0 + 1/4) / 3."""
    found = compare_tasks(
        *sides(
            ("a", [0, 0, 0, 0], [1, 1, 0, 0], "g"),
            ("b", [0, 1, 0, 1], [0, 1, 0, 1], "g"),
            ("c", [0, 0, 1, 1], [1, 0, 1, 1], None),
        )
    )
    average, group = found["average"], found["groups"]["g"]
    assert (average["tasks"], average["groups"], average["n"]) == (3, 2, 12)
    assert average["before"] == pytest.approx((0.25 + 0.5) / 2) and average["difference"] == pytest.approx(0.25)
    assert (group["members"], group["before"], group["difference"]) == (["a", "b"], 0.25, 0.25)


def test_the_average_of_one_task_is_that_task() -> None:
    found = compare_tasks(*sides(("a", [0] * 9 + [1], [1] * 9 + [1], None)))
    assert {name: found["average"][name] for name in ("difference", "ci", "p_value")} == {
        name: found["tasks"]["a"][name] for name in ("difference", "ci", "p_value")
    }


def test_the_interval_of_the_average_is_narrower_than_those_of_its_tasks() -> None:
    before, after = [0, 1] * 50, [0, 1] * 40 + [1, 1] * 10
    found = compare_tasks(*sides(*((f"t{place}", before, after, None) for place in range(4))))
    width = {name: one["ci"][1] - one["ci"][0] for name, one in {**found["tasks"], "all": found["average"]}.items()}
    # Those of four tasks are at 98.75 %, where Student's quantile is 1.28 times as large.
    assert width["all"] == pytest.approx(width["t0"] / 2 / 1.28, rel=0.02)


def test_p_values_of_several_tasks_are_corrected_together() -> None:
    """Bonferroni: 2 / 2^6, 2 / 2^8 and 1 are taken three times each, and the intervals hold for all three at once."""
    tasks = (("a", [0] * 6, [1] * 6, None), ("b", [0] * 8, [1] * 8, None), ("c", [0, 1] * 4, [0, 1] * 4, None))
    found = compare_tasks(*sides(*tasks))["tasks"]
    assert found["b"]["p_value"] == pytest.approx(3 * 2 / 2**8) and found["b"]["verdict"] == "better"
    assert found["a"]["p_value"] == pytest.approx(3 * 2 / 2**6) and found["a"]["verdict"].startswith("no difference")
    assert found["b"]["ci"][0] > 0 >= found["a"]["ci"][0]
    assert (found["c"]["p_value"], found["c"]["tests"]) == (1.0, 3)


def test_the_tasks_of_a_group_are_corrected_among_themselves() -> None:
    """A group is one of two things that are compared; its tasks are three."""
    same = [0, 1] * 20
    found = compare_tasks(
        *sides(
            ("a", [0] * 40, [1] * 8 + [0] * 32, "g"),
            ("b", same, same, "g"),
            ("c", same, same, "g"),
            ("d", [0] * 40, [1] * 8 + [0] * 32, None),
        )
    )
    p = 2 / 2**8
    assert found["tasks"]["a"]["p_value"] == pytest.approx(3 * p)
    assert found["tasks"]["d"]["p_value"] == pytest.approx(2 * p)
    assert found["groups"]["g"]["tests"] == 2 and found["average"]["tests"] == 1


def test_a_group_of_one_task_is_that_task() -> None:
    found = compare_tasks(*sides(("a", [0] * 8, [1] * 8, "g"), ("b", [0, 1] * 4, [0, 1] * 4, None)))
    assert found["groups"] == {} and found["tasks"]["a"]["p_value"] == pytest.approx(4 / 2**8)


def test_an_estimate_without_any_spread() -> None:
    """Twice the same change shows nothing: 2 / 2^2 is the smallest p-value of two. Student's quantile for one degree of
    freedom is 12.706 at 95 %, and 1 at that p-value. Of six the p-value is 2 / 2^6, and the interval is a point."""
    two = estimate(scores_of([3.0, 4.0]), scores_of([4.0, 5.0]))
    assert two.interval() == pytest.approx([-11.706, 13.706], abs=1e-3) and two.p_value == 0.5
    six = estimate(scores_of([1.0, 2, 3, 4, 5, 6]), scores_of([2.0, 3, 4, 5, 6, 7]))
    assert six.interval() == [1.0, 1.0] and six.p_value == 2 / 2**6


def scores_of(values: list[float]) -> Any:
    import numpy as np

    return np.array(values)
