"""The sentence, the interval and the p-value of a result never disagree, as they are written for people.

For every kind of measure 1,000 simulated worlds, of 3 to 500 questions, with ties, and with scores near none and all:
what is printed on page, card and terminal is read back.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest, wilcoxon
from simulated import World, scores

from prefold.evaluation.held_out_pairs import PairScores, against_chance, compare_pairs
from prefold.evaluation.paired import Difference, beyond_half, estimate, rate
from prefold.evaluation.task_comparison import compare_tasks
from prefold.reports.numbers import p_value
from prefold.reports.run_files import RunRecord
from prefold.reports.tasks import outcome_of
from prefold.reports.verdict import change_sentence, overall

SIZES = (3, 5, 6, 8, 12, 20, 33, 60, 120, 250, 500)
ACCURACIES = (0.02, 0.3, 0.5, 0.9, 0.99)
GAINS = (0.0, 0.0, 0.01, 0.08, 0.3)
Draw = np.random.Generator


def record(**files: Any) -> RunRecord:
    values = {field.name: [] if field.name in ("samples", "metrics") else None for field in fields(RunRecord)}
    return RunRecord(**values | {"recipe": {}} | files)  # type: ignore[arg-type]


def answers(draw: Draw, passage: int = 1) -> tuple[Any, Any, list[str]]:
    """Right and wrong of two models, of some size and quality."""
    accuracy, gain = draw.choice(ACCURACIES), draw.choice(GAINS) * draw.choice((-1, 1))
    after = float(np.clip(accuracy + gain, 0.001, 0.999))
    return World(int(draw.choice(SIZES)), accuracy, after - accuracy, passage).draw(draw)


def pairs_of(wins: Any) -> PairScores:
    """Ties where a win is one half."""
    means = np.stack([wins, np.full(len(wins), 0.5)], axis=1)
    return PairScores(means, means)


def with_ties(draw: Draw, wins: Any) -> Any:
    return np.where(draw.random(len(wins)) < draw.choice((0.0, 0.2, 0.9)), 0.5, wins)


def of_pairs(draw: Draw) -> tuple[str, str]:
    before, after, _ = answers(draw)
    if draw.random() < 0.3:
        before, after = with_ties(draw, before), with_ties(draw, after)
    return spoken(record(heldout=compare_pairs(pairs_of(before), pairs_of(after), 0.1)))


def of_a_reward_model(draw: Draw) -> tuple[str, str]:
    wins = with_ties(draw, answers(draw)[1])
    verdict = overall(record(heldout=against_chance(pairs_of(wins))))
    return verdict.outcome, verdict.sentence


def of_rewards(draw: Draw) -> tuple[str, str]:
    """Normal, skewed, of few values, mostly unchanged; of any size."""
    n, scale = int(draw.choice(SIZES)), 10.0 ** draw.integers(-3, 4)
    noise: Any = draw.normal(size=n)
    kind = draw.integers(4)
    if kind == 1:
        noise = draw.exponential(size=n) - draw.exponential(size=n)
    elif kind == 2:
        noise = draw.choice([-1.0, 0.0, 0.0, 2.5], n)
    elif kind == 3:
        noise = np.where(draw.random(n) < 0.1, noise, 0.0)
    before = draw.normal(3, 1, n)
    after = before + noise + draw.choice((0.0, 0.0, 0.2, -1.0)) * (noise != 0)
    facts = estimate(before * scale, after * scale).facts(n, "prompt", shares=False)
    facts["reward"] = facts.pop("difference")
    sides = {"before": {"reward": float(before.mean()) * scale}, "after": {"reward": float(after.mean()) * scale}}
    return spoken(record(rewards={"prompts": n, **sides, "difference": facts}))


def spoken(run: RunRecord) -> tuple[str, str]:
    verdict = overall(run)
    return verdict.outcome, verdict.sentence


def of_a_win_rate(draw: Draw) -> tuple[str, str]:
    wins = with_ties(draw, answers(draw)[1])
    facts = rate(wins, [str(prompt) for prompt in np.arange(len(wins)) // draw.choice((1, 1, 3))])
    facts.pop("difference")
    found = record(win_rate={"win_rate": float(wins.mean()), "prompts": len(wins), **facts})
    [line] = [line for line in overall(found).lines if line.text.startswith("New answers")]
    return line.outcome, line.text


def of_tasks(draw: Draw) -> tuple[str, str]:
    """Of one to four tasks, some about passages, some in a group: one of them, their group or their average."""
    number = int(draw.integers(1, 5))
    sides: tuple[list[Any], list[Any]] = ([], [])
    for task in range(number):
        before, after, passages = answers(draw, int(draw.choice((1, 4))))
        for side, values in zip(sides, (before, after), strict=True):
            side.append(scores(values, passages, f"t{task}", group="g" if task < 2 else None))
    compared = compare_tasks(*sides)
    every = [*compared["tasks"].values(), *compared["groups"].values(), compared["average"]]
    facts = every[int(draw.integers(len(every)))]
    return outcome_of(facts), change_sentence(facts)


KINDS: list[Callable[[Draw], tuple[str, str]]] = [of_pairs, of_a_reward_model, of_rewards, of_a_win_rate, of_tasks]
EVEN = {of_a_reward_model: 50.0, of_a_win_rate: 50.0}
NUMBER = r"[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_is_printed_agrees_in_1000_worlds(kind: Callable[[Draw], tuple[str, str]]) -> None:
    draw, shown = np.random.default_rng(1), 0
    for _ in range(1000):
        outcome, sentence = kind(draw)
        text = sentence.replace("\u2212", "-").replace("\u202f", "").replace("\u00a0", " ")
        p = re.search(r"p ([<=]) ([\d.e-]+)", text)
        interval = re.search(rf"95% interval ({NUMBER})%? to ({NUMBER})%?", text)
        assert p and interval, text
        low, high, even = float(interval[1]), float(interval[2]), EVEN.get(kind, 0.0)
        differs = float(p[2]) < 0.05
        assert (low > even or high < even) == differs == (outcome in ("better", "worse")), text
        assert float(p[2]) != 0.05, text
        if outcome in ("better", "worse"):
            assert (low > even) == (outcome == "better"), text
        words = bool(re.search(r"rose|fell|Held-out accuracy is .* and 50|Worse than chance", text))
        assert words == differs or kind in (of_a_win_rate, of_tasks), text
        shown += differs
    assert 50 < shown < 950  # both were seen


# ---- what is promised of each -----------------------------------------------------------------------------------


def coverage(draw: Callable[[Draw], Difference], truth: float, repeats: int = 1000) -> tuple[float, float]:
    """Of repeats: whose interval holds the truth, and which are called a difference."""
    generator, held, shown = np.random.default_rng(2), 0, 0
    for _ in range(repeats):
        difference = draw(generator)
        low, high = difference.interval() or [-np.inf, np.inf]
        assert low <= difference.mean + 1e-12 and difference.mean <= high + 1e-12
        held, shown = held + (low <= truth <= high), shown + difference.is_shown
    return held / repeats, shown / repeats


@pytest.mark.parametrize(
    ("n", "accuracy", "gain", "passage"),
    [
        (10, 0.5, 0.0, 1),
        (30, 0.5, 0.0, 1),
        (30, 0.97, 0.0, 1),
        (30, 0.9, 0.09, 1),
        (60, 0.5, 0.4, 1),
        (60, 0.5, 0.0, 4),
        (200, 0.98, 0.019, 1),
        (200, 0.98, 0.019, 4),
        (500, 0.02, 0.03, 1),
    ],
)
def test_right_and_wrong(n: int, accuracy: float, gain: float, passage: int) -> None:
    """At the floor and the ceiling too. Exact tests of few answers call less than 5 % different, so intervals are then
    too wide, never too narrow."""
    held, shown = coverage(lambda draw: estimate(*World(n, accuracy, gain, passage).draw(draw)), gain)
    assert held >= 0.93
    assert gain or shown <= 0.06
    assert n <= 60 or held <= 0.99


@pytest.mark.parametrize("n", [3, 6, 15, 26, 100])
@pytest.mark.parametrize("shift", [0.0, 0.5])
@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_other_values(n: int, shift: float, tails: str) -> None:
    def draw(generator: Draw) -> Difference:
        noise = generator.normal(size=n) if tails == "normal" else generator.standard_t(3, size=n)
        return estimate(np.arange(n, dtype=float), np.arange(n) + noise + shift)

    held, shown = coverage(draw, shift)
    assert held >= 0.93 and (n <= 6 or held <= 0.975)
    assert shift or shown <= 0.065


@pytest.mark.parametrize(("n", "rate_"), [(12, 0.5), (40, 0.5), (40, 0.9), (300, 0.6)])
def test_win_rates(n: int, rate_: float) -> None:
    """One in four is even."""

    def draw(generator: Draw) -> Difference:
        wins = (generator.random(n) < rate_).astype(float)
        return beyond_half(np.where(generator.random(n) < 0.25, 0.5, wins))

    held, shown = coverage(draw, 0.75 * (rate_ - 0.5))
    assert held >= 0.93 and (rate_ != 0.5 or shown <= 0.06)


# ---- exact tests by hand ----------------------------------------------------------------------------------------


def test_right_and_wrong_is_mcnemars_exact_test() -> None:
    """For as many that became right and wrong as there may be."""
    for n in (6, 25, 200):
        for better in range(0, n, 1 + n // 12):
            for worse in range(0, n - better, 1 + n // 12):
                change = np.array([1.0] * better + [-1.0] * worse + [0.0] * (n - better - worse))
                before = np.where(change < 0, 1.0, 0.0)
                exact = binomtest(better, better + worse).pvalue if better + worse else 1.0
                assert estimate(before, before + change).p_value == pytest.approx(exact, rel=1e-9)


def test_other_values_are_exchanged_in_every_way() -> None:
    """Changes of 1, 2, 3 and -1, which sum to 5: of the 16 sums of any signs three are 5 or more, 1 + 2 + 3 + 1 and
    those with either 1 negative, and three are their mirror images."""
    before = np.array([0.0, 10.0, 20.0, 30.5])
    found = estimate(before, before + np.array([1.0, 2.0, 3.0, -1.0]))
    assert found.p_value == 2 * 3 / 16
    # Wilcoxon's test of ranks 1 to 5 is the same one where the changes are 1 to 5.
    change = np.array([1.0, -2.0, 3.0, 4.0, 5.0])
    found = estimate(np.array([7.0, 0.0, 2.5, 9.0, 4.0]), np.array([7.0, 0.0, 2.5, 9.0, 4.0]) + change)
    assert found.p_value == pytest.approx(wilcoxon(change, method="exact").pvalue)


def test_halves_count_half() -> None:
    """A win from a loss and two that were even before: of the 8 sums of 1, 1/2 and 1/2 only 2 and its mirror are as
    far."""
    found = estimate(np.array([0.0, 0.5, 0.5, 1.0]), np.array([1.0, 1.0, 1.0, 1.0]))
    assert found.p_value == 2 / 8
    # A half against a whole one is not as much: 1 - 1/2 and its mirror, and the two that are farther.
    assert estimate(np.array([0.0, 0.5]), np.array([1.0, 0.0])).p_value == 1.0


def test_an_interval_agrees_at_every_number_of_comparisons() -> None:
    before, after = np.array([0.0] * 14 + [1.0] * 30), np.array([1.0] * 13 + [0.0] + [1.0] * 29 + [0.0])
    difference = estimate(before, after)
    assert difference.p_value == pytest.approx(2 * (1 + 14) / 2**14)
    seen = set()
    for tests in (1, 5, 20, 27, 28, 60, 1000):
        one = difference.among(tests)
        low, high = one.interval() or [0.0, 0.0]
        assert (low > 0) == one.is_shown == (one.p_value < 0.05) and low < one.mean < high
        assert outcome_of(one.facts(44)) == ("better" if one.is_shown else "unclear")
        seen.add(one.is_shown)
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0496, "p = 0.0496"),
        (0.04999, "p = 0.04999"),
        (0.0504, "p = 0.0504"),
        (0.05, "p = 0.05"),
        (0.0516, "p = 0.052"),
    ],
)
def test_a_p_value_is_not_rounded_to_the_border(value: float, text: str) -> None:
    assert p_value(value).replace("\u00a0", " ") == text
