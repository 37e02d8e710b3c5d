"""Each guard on a history made by hand: one in which it speaks, and those in which it must not."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from prefold.recipe import Guards
from prefold.training.guards import AT_THE_END, GUARDS, Facts, Trouble

FACTS = Facts(steps=200, learning_rate=5e-5, batch_size=16)
Line = dict[str, float]


def history(steps: int, line: Callable[[int], Line]) -> list[Line]:
    """`line` is given the number of the step, from 1."""
    always = {"loss": 0.5, "grad_norm": 1.0, "learning_rate": 5e-5}
    return [{"step": step, **always, **line(step)} for step in range(1, steps + 1)]


def said(name: str, lines: list[Line], facts: Facts = FACTS) -> Trouble | None:
    return {**GUARDS, **AT_THE_END}[name](lines, facts)


def at_ln2(step: int) -> Line:
    return {"loss": math.log(2), "rewards/margins": 0.0, "rewards/accuracies": 0.5}


def learning(step: int) -> Line:
    """A DPO run as it should be: chosen stays up, the margin grows and levels off."""
    margin = 1 - math.exp(-step / 40)
    return {
        "loss": math.log1p(math.exp(-margin)),
        "rewards/margins": margin,
        "rewards/accuracies": 0.5 + margin / 3,
        "logps/chosen": -200 - 10 * margin,
    }


def sampling(step: int) -> Line:
    """A GRPO run as it should be."""
    return {
        "reward": step / 100,
        "frac_reward_zero_std": 0.3,
        "completions/clipped_ratio": 0.2,
        "kl": 0.001 * step,
    }


def held_out(values: list[float]) -> list[Line]:
    """A measurement at every tenth step."""
    return history(
        10 * len(values),
        lambda step: {"eval_rewards/margins": values[step // 10 - 1]} if step % 10 == 0 else {},
    )


RED: dict[str, list[Line]] = {
    "not_finite": history(7, lambda step: {"loss": math.nan} if step == 7 else {}),
    "no_gradient": history(5, lambda step: {"grad_norm": 0.0}),
    "stuck_at_start": history(20, at_ln2),
    "chosen_falling": history(
        60, lambda step: {"logps/chosen": -200.0 - 3 * step, "rewards/margins": step / 10, "rewards/accuracies": 0.9}
    ),
    "too_easy": history(5, lambda step: {"rewards/accuracies": 1.0}),
    "held_out_falling": held_out([0.2, 0.5, 0.6, 0.5, 0.4, 0.3]),
    "kl_running_off": history(30, lambda step: {**sampling(step), "kl": 0.01 if step < 26 else 0.5}),
    "equal_rewards": history(5, lambda step: {**sampling(step), "frac_reward_zero_std": 1.0}),
    "cut_off": history(5, lambda step: {**sampling(step), "completions/clipped_ratio": 0.97}),
    "undertrained": history(200, lambda step: {"rewards/margins": 0.01, "rewards/accuracies": 0.52}),
}


@pytest.mark.parametrize("name", [*GUARDS, *AT_THE_END])
def test_it_speaks(name: str) -> None:
    found = said(name, RED[name])
    assert found is not None
    assert found.message and found.advice
    assert not {"nan", "inf"} & set(found.message.split()) or name == "not_finite"


@pytest.mark.parametrize("name", [*GUARDS, *AT_THE_END])
@pytest.mark.parametrize("line", [learning, sampling])
def test_it_is_silent_in_a_good_run(name: str, line: Callable[[int], Line]) -> None:
    whole = history(200, line)
    seen = [said(name, whole[:steps]) for steps in range(1, 201)] if name in GUARDS else [said(name, whole)]
    assert not any(seen)


@pytest.mark.parametrize("name", ["stuck_at_start", "too_easy", "held_out_falling", "undertrained"])
def test_a_reward_model_has_other_names_for_the_same(name: str) -> None:
    renamed = {"rewards/accuracies": "accuracy", "rewards/margins": "margin", "eval_rewards/margins": "eval_margin"}
    lines = [{renamed.get(metric, metric): value for metric, value in line.items()} for line in RED[name]]
    assert said(name, lines) == said(name, RED[name])


def test_not_finite_says_which_and_names_the_rows() -> None:
    found = said("not_finite", history(4, lambda step: {"grad_norm": math.inf if step == 4 else float(step)}))
    assert found is not None and found.of_rows
    assert "gradient norm inf" in found.message and "1, 2, 3" in found.message


def test_a_loss_scaler_may_leave_steps_out() -> None:
    facts = replace(FACTS, scales_gradients=True)
    assert said("not_finite", history(9, lambda step: {"grad_norm": math.inf}), facts) is None
    assert said("not_finite", history(10, lambda step: {"grad_norm": math.inf}), facts) is not None
    assert said("not_finite", history(1, lambda step: {"loss": math.nan}), facts) is not None


def test_no_gradient_of_equal_rewards_is_explained_by_these() -> None:
    equal = history(5, lambda step: {"grad_norm": 0.0, "frac_reward_zero_std": 1.0})
    assert said("no_gradient", equal) is None
    assert said("no_gradient", history(4, lambda step: {"grad_norm": 0.0})) is None
    cut = history(5, lambda step: {"grad_norm": 0.0, "completions/clipped_ratio": 1.0})
    assert said("no_gradient", cut) is None


def test_warm_up_is_not_being_stuck() -> None:
    warming = history(100, lambda step: {**at_ln2(step), "learning_rate": 5e-5 * step / 400})
    assert said("stuck_at_start", warming) is None
    assert said("stuck_at_start", history(19, at_ln2)) is None
    other = history(20, lambda step: {"loss": math.log(2), "reward": 0.0})
    assert said("stuck_at_start", other) is None


def test_both_falling_a_little_is_usual() -> None:
    lines = history(60, lambda step: {"logps/chosen": -200.0 - step, "rewards/margins": step / 10})
    assert said("chosen_falling", lines) is None
    shrinking = history(60, lambda step: {"logps/chosen": -200.0 - 3 * step, "rewards/margins": -step / 10})
    assert said("chosen_falling", shrinking) is None


def test_all_right_late_is_not_too_easy() -> None:
    lines = history(100, lambda step: {"rewards/accuracies": 1.0 if step > 50 else 0.6})
    assert not any(said("too_easy", lines[:steps]) for steps in range(1, 101))
    assert said("too_easy", history(4, lambda step: {"rewards/accuracies": 1.0})) is None


def test_too_easy_says_what_the_check_of_the_data_says() -> None:
    opening = '"Sure" begins 90 % of the chosen and 0 % of the rejected answers'
    found, alone = (said("too_easy", RED["too_easy"], replace(FACTS, telling=telling)) for telling in ([opening], []))
    assert found is not None and alone is not None
    assert f"by what the sides differ: {opening}." in found.advice and "neither" not in found.advice
    assert "found neither length nor an opening" in alone.advice


def test_steps_of_one_pair_are_right_by_luck() -> None:
    """Coins that are right seven times of ten."""
    draw, one = random.Random(1), replace(FACTS, batch_size=1)
    runs = [history(40, lambda step: {"rewards/accuracies": float(draw.random() < 0.7)}) for _ in range(20)]
    assert any(said("too_easy", lines[:steps]) for lines in runs for steps in range(1, 41))
    assert not any(said("too_easy", lines[:steps], one) for lines in runs for steps in range(1, 41))
    found = said("too_easy", history(32, lambda step: {"rewards/accuracies": 1.0}), one)
    assert found is not None and "last 32 steps" in found.message


def test_rollouts_of_one_prompt_are_equal_by_luck() -> None:
    draw = random.Random(1)
    lines = history(200, lambda step: {"frac_reward_zero_std": float(draw.random() < 0.6)})
    one = replace(FACTS, batch_size=1)
    assert any(said("equal_rewards", lines[:steps]) for steps in range(1, 201))
    assert not any(said("equal_rewards", lines[:steps], one) for steps in range(1, 201))


def test_long_answers_are_no_fall() -> None:
    """One pair a step, of any length, in runs that are as they should be."""
    draw = random.Random(1)
    for _ in range(20):
        lengths = [draw.lognormvariate(5, 0.8) for _ in range(200)]
        lines = history(200, lambda step, lengths=lengths: {**learning(step), "logps/chosen": -lengths[step - 1]})
        assert not any(said("chosen_falling", lines[:steps]) for steps in range(1, 201))


@pytest.mark.parametrize("values", [[0.2, 0.5, 0.4], [0.6, 0.5, 0.59, 0.4], [0.6, 0.59, 0.58, 0.59]])
def test_held_out_ups_and_downs_are_usual(values: list[float]) -> None:
    assert said("held_out_falling", held_out(values)) is None


def test_held_out_speaks_at_measurements_only() -> None:
    assert said("held_out_falling", [*RED["held_out_falling"], {"step": 61, "loss": 0.5}]) is None


def test_kl_above_a_nat_is_off_whatever_was_before() -> None:
    assert said("kl_running_off", history(5, lambda step: {**sampling(step), "kl": 1.2})) is not None
    # KTO has a metric of that name too, which is something else.
    assert said("kl_running_off", history(5, lambda step: {"kl": 5.0})) is None


def test_steps_between_rollouts_say_nothing_of_rewards() -> None:
    def line(step: int) -> Line:
        return {"frac_reward_zero_std": 1.0} if step % 2 else {}

    assert said("equal_rewards", history(9, line)) is not None
    assert said("equal_rewards", history(10, line)) is None
    assert said("equal_rewards", history(7, line)) is None


def test_a_run_that_learns_a_little_is_not_undertrained() -> None:
    lines = history(200, lambda step: {"rewards/margins": 0.06, "rewards/accuracies": 0.54})
    assert said("undertrained", lines) is None
    assert said("undertrained", history(200, lambda step: {"rewards/margins": 0.01, "rewards/accuracies": 0.7})) is None


def test_every_guard_has_a_field_and_every_field_a_guard() -> None:
    fields: dict[str, Any] = Guards.model_fields
    assert list({**GUARDS, **AT_THE_END}) == list(fields)
