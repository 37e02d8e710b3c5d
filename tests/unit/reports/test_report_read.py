"""The verdict in words, numbers for people, and files that are missing, unfinished or broken."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from fake_run import HELDOUT, HOSTILE, write_run

from prefold.errors import UserError
from prefold.reports import numbers
from prefold.reports.held_out import rows_of
from prefold.reports.run_files import RunRecord, read_run, readable
from prefold.reports.verdict import Verdict, held_out_verdict


def plain(text: str) -> str:
    return text.replace("\u202f", " ").replace("\u00a0", " ").replace("\u2212", "-")


def heldout(before: float, after: float, ci: Any, p_value: float = 0.2, pairs: int = 84, **more: Any) -> dict[str, Any]:
    """As earlier versions wrote it, without a verdict."""
    return {
        "pairs": pairs,
        "before": {"accuracy": before, "accuracy_ci": [before - 0.1, before + 0.1], "margin": -0.4},
        "after": {"accuracy": after, "accuracy_ci": [after - 0.1, after + 0.1], "margin": 0.2},
        "difference": {"accuracy": after - before, "ci": ci, "p_value": p_value, **more},
    }


def verdict(heldout: dict[str, Any] | None) -> Verdict:
    files = {field.name: None for field in fields(RunRecord)}
    return held_out_verdict(RunRecord(**{**files, "heldout": heldout}))  # type: ignore[arg-type]


def test_better_is_said_with_its_numbers() -> None:
    found = verdict(HELDOUT)
    assert found.outcome == "better"
    assert plain(found.sentence) == (
        "Held-out accuracy rose from 31 % to 92 % (+61 points, 95 % interval +50 to +70, p < 0.001, 84 pairs)"
    )


def test_worse_is_said_as_plainly() -> None:
    found = verdict(heldout(0.61, 0.40, [-0.31, -0.11], p_value=0.0042))
    assert found.outcome == "worse"
    assert plain(found.sentence) == (
        "The model got worse: held-out accuracy fell from 61 % to 40 % "
        "(-21 points, 95 % interval -31 to -11, p = 0.0042, 84 pairs)"
    )


@pytest.mark.parametrize("ci", [[-0.04, 0.12], [0.0, 0.08], [-0.02, 0.0], None, [float("nan"), 0.5], "wide"])
def test_an_interval_that_holds_zero_or_is_missing_is_no_clear_difference(ci: Any) -> None:
    found = verdict(heldout(0.52, 0.56, ci))
    assert found.outcome == "unclear"
    assert plain(found.headline) == "No clear difference: held-out accuracy was 52 % before and 56 % after"


@pytest.mark.parametrize(
    ("before", "after", "headline", "difference"),
    [
        (0.500, 0.504, "50.0 % to 50.4 %", "+0.4 points"),
        (0.494, 0.596, "49.4 % to 59.6 %", "+10.2 points"),
        (0.491, 0.592, "49 % to 59 %", "+10 points"),
    ],
)
def test_rounding_neither_hides_a_difference_nor_belies_the_subtraction(
    before: float, after: float, headline: str, difference: str
) -> None:
    found = verdict(heldout(before, after, [0.02, 0.2], p_value=0.01))
    assert plain(found.headline).endswith(headline)
    assert plain(found.evidence).startswith(difference)


@pytest.mark.parametrize(
    ("ci", "p_value", "verdict_", "said"),
    [
        # Whole percentages would write the end that leaves out 0 as 0.
        (
            [0.002, 0.106],
            0.041,
            "better",
            "rose from 46.0 % to 52.0 % (+6.0 points, 95 % interval +0.2 to +10.6, p = 0.041",
        ),
        ([0.00004, 0.1], 0.0499, "better", "(+6.000 points, 95 % interval +0.004 to +10.000, p = 0.0499"),
        ([-0.0004, 0.1], 0.0501, "", "(+6.00 points, 95 % interval -0.04 to +10.00, p = 0.0501"),
        # An earlier version took both from two tests: nothing is shown, and the interval is not said.
        ([0.002, 0.106], 0.062, None, "52 % after (+6 points, no interval, p = 0.062"),
        ([-0.02, 0.106], 0.04, None, "52 % after (+6 points, no interval, p = 0.04"),
    ],
)
def test_what_is_printed_agrees(ci: list[float], p_value: float, verdict_: str | None, said: str) -> None:
    more = {} if verdict_ is None else {"verdict": verdict_}
    found = verdict(heldout(0.46, 0.52, ci, p_value, **more))
    assert found.outcome == ("better" if verdict_ else "unclear") and said in plain(found.sentence)


def test_nothing_changed_is_no_difference() -> None:
    facts = {"verdict": "no difference ...", "changed": 0, "detectable": 0.0712}
    found = verdict(heldout(0.46, 0.46, [-0.03, 0.03], 1.0, **facts))
    assert plain(found.sentence) == (
        "No difference: held-out accuracy is 46 % before and after, the same on every pair (+0 points, 95 % interval "
        "-3 to +3, p = 1, 84 pairs, 7.1 points or more would show)"
    )
    few = verdict(heldout(0.4, 0.6, [-0.5, 0.8], 1.0, 5, verdict="no difference ...", changed=1, detectable=None))
    assert few.sentence.endswith("5 pairs, too few to show any difference)")


def test_no_evaluation_and_no_finite_accuracy_have_no_verdict() -> None:
    assert verdict(None).outcome == "missing"
    assert verdict(heldout(float("nan"), 0.5, [0.1, 0.2])).outcome == "missing"
    assert verdict({"pairs": 3}).outcome == "missing"


def test_one_point_and_one_pair_are_singular() -> None:
    assert plain(verdict(heldout(0.5, 0.51, [-0.2, 0.3], pairs=1)).evidence) == (
        "+1 point, 95 % interval -20 to +30, p = 0.2, 1 pair"
    )


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (numbers.percent(0.314), "31 %"),
        (numbers.percent(float("nan")), "–"),
        (numbers.points(-0.0004), "+0"),
        (numbers.decimal(0.69315), "0.693"),
        (numbers.decimal(5e-5), "5e-05"),
        (numbers.scientific(1.2e-5), "1.2e-5"),
        (numbers.count(134515008), "134 515 008"),
        (numbers.count(True), "–"),
        (numbers.count(10**400), "–"),
        (numbers.duration(59.94), "59.9 s"),
        (numbers.duration(59.96), "1 min 00 s"),
        (numbers.duration(301.2), "5 min 01 s"),
        (numbers.duration(7384), "2 h 03 min"),
        (numbers.memory(410), "410 MB"),
        (numbers.memory(4100), "4.1 GB"),
    ],
)
def test_numbers_are_rounded_for_people(written: str, text: str) -> None:
    assert plain(written) == text


def test_numbers_keep_their_exact_value() -> None:
    assert numbers.exact(0.3095238) == "0.3095238"
    assert numbers.exact(float("nan")) == "no finite value"


@pytest.mark.parametrize("text", HOSTILE)
def test_readable_text_encodes_and_steers_nothing(text: str) -> None:
    shown = readable(text)
    shown.encode("utf-8")
    assert not [letter for letter in shown if (ord(letter) < 32 and letter not in "\t\n") or 0x7F <= ord(letter) < 0xA0]
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def test_a_folder_without_a_recipe_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no recipe\.yaml"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.json", "{", "data.json"),
        ("data.json", "[1]", "not an object"),
        ("data.json", '{"a": ' + "[" * 100_000, "data.json"),
        ("merge.json", "\udc80", "merge.json"),
        ("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 3}\n', "line 2"),
        ("metrics.jsonl", "[]\n", "line 1: not an object"),
        ("recipe.yaml", "a: [", "recipe.yaml"),
    ],
)
def test_a_broken_file_is_named_in_one_message(tmp_path: Path, name: str, content: str, message: str) -> None:
    write_run(tmp_path)
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as caught:
        read_run(tmp_path)
    assert message in str(caught.value) and name in str(caught.value)


def test_half_a_line_at_the_end_of_a_running_file_is_left_out(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.7}\n{"step": 2, "lo')
    assert read_run(tmp_path).metrics == [{"step": 1, "loss": 0.7}]


@pytest.mark.parametrize(
    ("accuracy", "ci", "outcome", "headline"),
    [
        (0.85, [0.76, 0.91], "better", "Held-out accuracy is 85 %, and 50 % by chance"),
        (0.30, [0.21, 0.41], "worse", "Worse than chance: held-out accuracy is 30 %, not 50 %"),
        (0.55, [0.44, 0.65], "unclear", "Held-out accuracy is 55 %, which is not clearly more than chance"),
        (0.55, None, "unclear", "Held-out accuracy is 55 %, which is not clearly more than chance"),
        (float("nan"), None, "missing", "No verdict: the evaluation gave no finite accuracy"),
    ],
)
def test_a_reward_model_is_compared_with_chance(accuracy: float, ci: Any, outcome: str, headline: str) -> None:
    after = {"accuracy": accuracy, "accuracy_ci": ci, "margin": 0.4}
    found = verdict({"pairs": 84, "after": after, "chance": {"accuracy": 0.5, "p_value": 0.0042}})
    assert (found.outcome, plain(found.headline)) == (outcome, headline)
    if outcome == "better":
        assert plain(found.evidence) == "95 % interval 76 % to 91 %, p = 0.0042, 84 pairs"


def test_a_reward_model_without_held_out_pairs_has_no_verdict(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, heldout={"pairs": 0, "chance": {"accuracy": 0.5}}))
    assert held_out_verdict(run).outcome == "missing" and rows_of(run) == []
