"""Rewards of held-out prompts before and after: numbers by hand."""

from __future__ import annotations

import pytest

from prefold.data.preference import Message, Prompt, RowId
from prefold.evaluation.held_out_rewards import compare_rewards
from prefold.generation.sampling import Completion
from prefold.rewards.scoring import Group


def groups(*rewards: list[float | None]) -> list[Group]:
    """One group for each list of rewards, which are those of the reward `a`; completions have 2 tokens and end."""
    prompt = Prompt((Message(role="user", content="x"),), {}, RowId("p", 1))
    return [Group(prompt, [Completion((1, 2), "x", True) for _ in row], {"a": row}, row) for row in rewards]


def test_numbers_by_hand() -> None:
    """Means 1, 2, 3 before and 2, 4, 6 after. Of the eight ways to exchange within prompts, the found one and its
    mirror image have the largest difference: p = 2 / 8."""
    found = compare_rewards(groups([0.0, 2.0], [2.0], [3.0]), groups([2.0], [4.0], [6.0]))
    assert found["prompts"] == 3
    assert found["before"]["reward"] == 2.0 and found["after"]["reward"] == 4.0
    assert found["before"]["rewards"] == {"a": pytest.approx(7 / 4)}
    assert found["before"]["tokens"] == 2.0 and found["after"]["finished"] == 1.0
    assert found["difference"]["reward"] == 2.0
    # 2 +- 4.303 (Student's, two degrees of freedom) times 1 / sqrt(3).
    assert found["difference"]["ci"] == pytest.approx([-0.484, 4.484], abs=1e-3)
    assert found["difference"]["p_value"] == pytest.approx(0.25)


def test_only_prompts_with_both_rewards_are_compared() -> None:
    found = compare_rewards(groups([1.0], [None], [5.0]), groups([2.0], [9.0], [None]))
    assert found["prompts"] == 1
    assert found["difference"]["reward"] == 1.0
    assert found["difference"]["ci"] is None


def test_nothing_to_compare() -> None:
    assert compare_rewards([], []) == {"prompts": 0}
    assert compare_rewards(groups([None]), groups([1.0])) == {"prompts": 0}


def test_nothing_changed() -> None:
    one = groups([1.0], [4.0], [-2.0])
    difference = compare_rewards(one, one)["difference"]
    assert (difference["reward"], difference["ci"], difference["p_value"]) == (0.0, [0.0, 0.0], 1.0)
    assert difference["verdict"] == "no difference that 3 prompts can show (all came out the same; too few to show any)"


def test_rewards_of_right_and_wrong_are_tested_exactly() -> None:
    """-1 and 1 are wrong and right: of 8 prompts 7 became right and 1 wrong, 2 * (1 + 8) / 2^8."""
    one, two = groups(*[[-1.0]] * 7, [1.0]), groups(*[[1.0]] * 7, [-1.0])
    difference = compare_rewards(one, two)["difference"]
    assert difference["p_value"] == pytest.approx(18 / 256) and difference["ci"][0] < 0 < difference["ci"][1] <= 2
