"""Every held-out pair or prompt on the report: which are first, and into which bin each falls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_run import HOSTILE, write_run

from prefold.reports import each_pair
from prefold.reports.each_pair import EachPair
from prefold.reports.page import render
from prefold.reports.run_files import read_run


def line(number: int, before: float | None, after: float | None, text: str = "yes") -> dict[str, Any]:
    prompt, chosen, rejected = (
        [{"role": role, "content": f"{text} {number}"}] for role in ("user", *2 * ["assistant"])
    )
    sides = {"margin_before": before, "margin_after": after, "chosen": chosen, "rejected": rejected}
    return {"key": str(number), "before": 1.0, "after": 0.0, "row": f"a, row {number}", "prompt": prompt, **sides}


def each_of(folder: Path, *lines: dict[str, Any], **changes: Any) -> EachPair:
    each = each_pair.each_pair(read_run(write_run(folder, pairs=list(lines), **changes)))
    assert each is not None
    return each


def test_what_got_worse_is_first(tmp_path: Path) -> None:
    each = each_of(tmp_path, line(1, -1, 1), line(2, 0.5, -0.5), line(3, None, 0), line(4, 0, 0), line(5, 3, 0))
    assert [pair.row for pair in each.shown] == [f"a, row {number}" for number in (5, 2, 3, 4, 1)]
    assert (each.got_worse, each.left_out) == (2, 0)


def test_bins_are_round_and_part_at_0(tmp_path: Path) -> None:
    each = each_of(tmp_path, line(1, -0.9, 1.1), line(2, -0.001, 0), line(3, 0.49, 0.51), line(4, None, 1.1))
    assert each.bins == [
        ("−1 to −0.8", [1, 0]),
        ("−0.8 to −0.6", [0, 0]),
        ("−0.6 to −0.4", [0, 0]),
        ("−0.4 to −0.2", [0, 0]),
        ("−0.2 to 0", [1, 0]),
        ("0 to 0.2", [0, 1]),
        ("0.2 to 0.4", [0, 0]),
        ("0.4 to 0.6", [1, 1]),
        ("0.6 to 0.8", [0, 0]),
        ("0.8 to 1", [0, 0]),
        ("1 to 1.2", [0, 2]),
    ]


@pytest.mark.parametrize(("values", "bins"), [((None, None), []), ((2.0, 2.0), [("2", [2, 2])])])
def test_values_without_a_spread(tmp_path: Path, values: tuple[float, float], bins: list[Any]) -> None:
    assert each_of(tmp_path, line(1, *values), line(2, *values)).bins == bins


def test_rewards_of_prompts(tmp_path: Path) -> None:
    texts = {"answer_before": "long", "answer_after": "short"}
    prompt = [{"role": "user", "content": "Say it."}]
    lines = [{"key": "a", "before": 1.0, "after": 0.5, "row": "p, row 1", "prompt": prompt, **texts}]
    rewards = {"prompts": 1, "before": {"reward": 1.0}, "after": {"reward": 0.5}, "difference": {"reward": -0.5}}
    recipe = "method: grpo\nrewards: [{name: length}]\n"
    each = each_of(tmp_path, *lines, heldout=None, recipe=recipe, **{"evaluation/rewards": rewards})
    assert each.measured == "reward" and each.got_worse == 1
    assert each.shown[0].answers == {"Before": ("long", False), "After": ("short", False)}
    assert "1 of 1 got worse" in render(read_run(tmp_path))


def test_a_long_list_says_what_it_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(each_pair, "MOST_SHOWN", 2)
    monkeypatch.setattr(each_pair, "MOST_CHARACTERS", 0)
    monkeypatch.setattr(each_pair, "FEWEST_CHARACTERS", 5)
    page = render(read_run(write_run(tmp_path, pairs=[line(n, 0, n, "a long text") for n in range(5)])))
    assert "0 of 5 got worse" in page and "3</span> more are in evaluation/heldout.jsonl" in page
    assert "a lon …" in page and "a long" not in page.split('id="evaluation"')[1].split("</section>")[0]


def test_an_answer_that_is_no_text_is_shown(tmp_path: Path) -> None:
    calls = [{"function": {"name": "clock", "arguments": {"zone": "UTC"}}}]
    chosen = [{"role": "assistant", "content": "", "tool_calls": calls}, {"role": "tool", "content": "12:00"}]
    shown = each_of(tmp_path, line(1, 0, 1) | {"chosen": chosen}).shown[0].answers
    call = 'tool_calls: [{"function": {"name": "clock", "arguments": {"zone": "UTC"}}}]'
    assert shown["Chosen"] == (f"{call}\n\ntool: 12:00", False) and shown["Rejected"] == ("yes 1", False)


def test_an_earlier_version_wrote_no_texts(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, pairs=[{"key": "a", "before": 1.0, "after": 0.0}]))
    assert each_pair.each_pair(run) is None and "Every pair" not in render(run)


def test_hostile_texts_stay_text(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, pairs=[line(number, 0, 1, text) for number, text in enumerate(HOSTILE)]))
    part = render(run).split('id="evaluation"')[1].split("</section>")[0]
    assert "document.title=" in part.replace("&#39;", "'") and "<script" not in part and "<img" not in part
