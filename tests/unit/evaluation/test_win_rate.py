"""Win rate by a reward, and what a rate comes to: numbers by hand and odd cases."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefold.data.preference import Message
from prefold.errors import StageError, UserError
from prefold.evaluation.answer_rates import LEAST_PROMPTS, AnswerPair, length_controlled
from prefold.evaluation.win_rate import measure_win_rate, open_judge, win_rate
from prefold.generation.http import Refused
from prefold.recipe import Reward, dump_recipe, load_recipe
from prefold.rewards.judge import NoVerdict


def asked(*lengths: tuple[int, int]) -> list[AnswerPair]:
    prompt = [Message(role="user", content="Why?")]
    return [AnswerPair(place, prompt, "b" * one, "a" * other) for place, (one, other) in enumerate(lengths)]


def samples(*answers: tuple[str, str]) -> list[dict[str, Any]]:
    prompt = [{"role": "user", "content": "Why?"}]
    return [{"prompt": prompt, "before": [before], "after": [after]} for before, after in answers]


def token_ids(texts: Sequence[str]) -> list[list[int]]:
    return [[1] * len(text.split()) for text in texts]


def by_reward(answers: list[dict[str, Any]], **reward: Any) -> dict[str, Any]:
    found = measure_win_rate(open_judge(Reward(**reward), token_ids), answers)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def test_a_reward_prefers_what_it_gives_more() -> None:
    """Target 2 words: of five answers two came nearer, one went away, two are as far as before."""
    answers = samples(("a", "a b"), ("a b c d", "a b c"), ("a b", "a"), ("a", "b"), ("a", "a b c"))
    found = by_reward(answers, name="length", target=2)
    assert (found["wins"], found["ties"], found["losses"]) == (2, 2, 1)
    assert found["win_rate"] == pytest.approx(0.6)
    assert found["p_value"] == 1.0  # 2 against 1
    assert found["judge"] == {"kind": "reward", "name": "length"}
    assert found["verdict"] == "no difference that 5 prompts can show (too few to show any)"
    assert found["length_controlled"] is None


def test_a_reward_of_the_users_own_that_has_no_number_for_some(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def mine(completions):\n    return [None if one == '?' else len(one) for one in completions]\n")
    found = by_reward(samples(("a", "bb"), ("?", "b")), file=str(file), name="mine")
    assert (found["comparisons"], found["left_out"]["no_score"], found["win_rate"]) == (1, 1, 1.0)
    with pytest.raises(StageError, match="has no number for any of 1 pairs of answers"):
        by_reward(samples(("?", "b")), file=str(file), name="mine")


def test_a_reward_that_needs_a_column_is_refused_when_it_is_opened() -> None:
    with pytest.raises(UserError, match="needs `answer`, which is not there"):
        open_judge(Reward(name="exact_number"), token_ids)


def test_several_answers_to_a_prompt_are_one_observation() -> None:
    """Eight wins on one prompt are no evidence; on eight prompts they are."""
    prompt = [Message(role="user", content="Why?")]
    together = [AnswerPair(0, prompt, "b", "a")] * 8
    found = win_rate(together, [1.0] * 8)
    assert (found["prompts"], found["comparisons"], found["p_value"]) == (1, 8, 1.0)
    apart = win_rate(asked(*[(1, 1)] * 8), [1.0] * 8)
    assert apart["p_value"] == pytest.approx(2 / 2**8) and apart["verdict"] == "better"
    assert found["ci"][1] - found["ci"][0] > 2 * (apart["ci"][1] - apart["ci"][0])


def test_ties_count_one_half_and_say_nothing_about_a_difference() -> None:
    found = win_rate(asked(*[(1, 1)] * 30), [0.5] * 30)
    assert (found["win_rate"], found["ties"], found["p_value"]) == (0.5, 30, 1.0)
    # Student's 2.0395 for 31 times the root of 2 / 31 / 32, of which half.
    assert found["ci"] == pytest.approx([0.4542, 0.5458], abs=1e-4)
    assert found["verdict"].startswith("no difference that 30 prompts can show (all came out the same; ")


def test_the_interval_stays_within_none_and_all() -> None:
    low, high = win_rate(asked(*[(1, 1)] * 3), [1.0] * 3)["ci"]
    assert 0 <= low < high == 1


def test_replies_without_a_verdict_are_counted_and_shown() -> None:
    outcomes = [1.0, NoVerdict("Both are " + "fine " * 60), Refused("too long"), None]
    found = win_rate(asked(*[(1, 2)] * 4), outcomes)
    assert found["left_out"] == {"no_verdict": 1, "refused": 1, "no_score": 1}
    [reply] = found["replies_without_verdict"]
    assert reply.startswith("Both are fine") and len(reply) == 120


def test_nothing_to_judge() -> None:
    found = measure_win_rate(open_judge(Reward(name="length", target=2), token_ids), [])
    assert found["prompts"] == 0 and "win_rate" not in found


# ---- length -----------------------------------------------------------------------------------------------------


def test_without_an_effect_of_length_both_rates_agree() -> None:
    draw = np.random.default_rng(0)
    wins = (draw.random(2000) < 0.7).astype(float)
    found = length_controlled(wins, draw.normal(50, 100, 2000))
    assert found is not None and found["win_rate"] == pytest.approx(wins.mean(), abs=0.02)


def test_answers_that_win_by_length_alone_are_even_at_equal_lengths() -> None:
    draw = np.random.default_rng(1)
    longer = draw.normal(100, 100, 2000)
    wins = (draw.random(2000) < 1 / (1 + np.exp(-3 * np.tanh(longer / longer.std())))).astype(float)
    found = length_controlled(wins, longer)
    assert found is not None and wins.mean() > 0.75
    assert found["win_rate"] == pytest.approx(0.5, abs=0.06)
    assert found["ci"][0] < 0.5 < found["ci"][1]


@pytest.mark.parametrize("longer", [np.zeros(40), np.full(40, 9.0), np.arange(40.0) - 20])
@pytest.mark.parametrize("wins", [np.ones(40), np.zeros(40), np.full(40, 0.5), (np.arange(40) >= 20).astype(float)])
def test_there_is_an_estimate_for_any_data(longer: Any, wins: Any) -> None:
    """All wins, all even, wins that length tells perfectly: where an ordinary fit has none."""
    found = length_controlled(wins, longer)
    assert found is not None
    low, high = found["ci"]
    assert 0 <= low <= found["win_rate"] <= high <= 1 and high - low > 0.01


def test_few_prompts_have_no_controlled_rate() -> None:
    few = np.ones(LEAST_PROMPTS - 1)
    assert length_controlled(few, few) is None


# ---- the recipe -------------------------------------------------------------------------------------------------

RECIPE = "method: dpo\nmodel: {name: some/model}\ndata: {train: [{path: pairs.jsonl}]}\noutput_dir: runs/x\n"
JUDGES = ["{endpoint: 'http://localhost:8000/v1', model: big, concurrency: 1}", "{name: length, target: 50}"]


@pytest.fixture
def recipe_file(tmp_path: Path) -> str:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return str(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("judge", JUDGES)
def test_recipes_with_a_judge_are_read_and_written(judge: str, recipe_file: str, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, [f"evaluate.win_rate.judge={judge}"])
    (tmp_path / "dumped.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(str(tmp_path / "dumped.yaml")) == recipe
    assert "null" not in dump_recipe(recipe).partition("win_rate:")[2].partition("output_dir")[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.win_rate={}", "give either `judge`, a reward or a chat model, or `votes`"),
        ("evaluate.win_rate={judge: {name: repetition}, votes: v.jsonl}", "give either `judge`"),
        ("evaluate.win_rate.judge=3", "`evaluate.win_rate.judge` is 3"),
        ("evaluate.win_rate.judge={name: lenght}", "did you mean `length`?"),
        ("evaluate.win_rate.judge={name: length}", "`length` needs `target`"),
        ("evaluate.win_rate.judge={endpoint: 'http://x/v1'}", "`evaluate.win_rate.judge.model` is missing"),
        (
            "evaluate.win_rate.judge={endpoint: 'http://x/v1', model: big, modle: big}",
            "`evaluate.win_rate.judge.modle` is not a field\n  to do: did you mean `model`?",
        ),
        (
            "evaluate={prompts: 0, win_rate: {judge: {name: length, target: 5}}}",
            "`win_rate` judges the answers to `prompts`, and there are none",
        ),
        ("evaluate.compare_with=[other/model]", "`compare_with` asks other models the `tasks`, and there are none"),
    ],
)
def test_wrong_values_are_explained(recipe_file: str, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_file, [override])
    assert message in str(caught.value)
