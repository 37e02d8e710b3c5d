"""What the page and the terminal say of rounds: how far they helped, and why there is no further one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from prefold.evaluation.paired import beyond_half, estimate
from prefold.reports.rounds import RULE, summary, verdict, write_rounds

STEPS = {"better": 0.5, "worse": -0.5, "unclear": 0.01}
COST = {"rubric": {"calls": 100, "prompt_tokens": 52000, "completion_tokens": 2000}}


def compared(change: float) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    before = draw.normal(size=60)
    after = before + change + 0.3 * draw.normal(size=60)
    facts = estimate(before, after).facts(60, "prompt", shares=False)
    means = {"before": float(before.mean()), "after": float(after.mean())}
    return {"metric": "reward", "shares": False, **means, **facts, "n": 60, "unit": "prompt"}


def model(reward: float) -> dict[str, Any]:
    return {
        "reward": reward,
        "reward_ci": [reward - 0.1, reward + 0.1],
        "characters": 210.4,
        "cut_off": 0.03,
        "cost": COST,
    }


def facts_of(*steps: str, number: int = 3, **more: Any) -> dict[str, Any]:
    rounds = [
        {
            "round": index + 1,
            "pairs": {
                "prompts": 200,
                "pairs": 180,
                "left_out": {"equal_scores": 20},
                "why_left_out": "20 all scores equal",
                "mean_score": {"all": 0.4, "chosen": 0.8, "rejected": 0.1},
                "held_out": 50,
                "cost": COST,
            },
            "model": model(0.5 + index / 10),
            "against_before": compared(STEPS[step]),
            "against_base": compared(sum(STEPS[each] for each in steps[: index + 1])),
        }
        for index, step in enumerate(steps)
    ]
    helped = next((index for index, step in enumerate(steps) if step != "better"), len(steps))
    return {
        "recipe": {"method": "dpo", "model": {"name": "some/model"}},
        "number": number,
        "prompts": {"train": 200, "held_out": 60},
        "base": model(0.4),
        "rounds": rounds,
        "best": helped,
        "is_over": True,
        **more,
    }


@pytest.mark.parametrize(
    ("facts", "outcome", "headline", "end"),
    [
        (facts_of(is_over=False), "missing", "No round is done yet", ""),
        (
            facts_of("worse"),
            "worse",
            "The first round made the model worse",
            "Round 1 is the last: it is worse than the base, so the base is the one to keep",
        ),
        (facts_of("unclear"), "unclear", "The first round did not clearly help", "so the base is the one to keep"),
        (
            facts_of("better", is_over=False),
            "better",
            "One round made the model better",
            "Not over yet: 1 round of 3 done",
        ),
        (
            facts_of("better", "unclear"),
            "better",
            "One round made the model better",
            "it is not shown to be better than round 1, so the model of round 1 is the one to take",
        ),
        (
            facts_of("better", "better", without_pairs=3),
            "better",
            "2 rounds made the model better",
            "Round 3 was not begun: no pair could be made of the answers",
        ),
        (
            facts_of("better", "better", "better"),
            "better",
            "3 rounds made the model better",
            "Round 3 still helped, and no more were asked for",
        ),
    ],
)
def test_verdicts(facts: dict[str, Any], outcome: str, headline: str, end: str) -> None:
    found = verdict(facts)
    assert (found.outcome, found.headline) == (outcome, headline)
    if end:
        assert end in found.lines[-1].text
        assert len(found.lines) == len(facts["rounds"]) + (facts["best"] > 1) + 1


def test_the_page(tmp_path: Path) -> None:
    facts = facts_of("better", "better", "unclear")
    facts["recipe"]["model"]["name"] = "<b>some</b>"
    (tmp_path / "rounds.json").write_text(json.dumps(facts))
    write_rounds(tmp_path)
    page = (tmp_path / "rounds.html").read_text()
    assert "<b>some</b>" not in page and RULE in page
    assert (
        'href="rounds/3/report.html"' in page and "Against the base" in page and "left out: 20 all scores equal" in page
    )
    # The base, three rounds of pairs and three models.
    assert "rubric, requests" in page and "700" in page and "364\u202f000" in page
    console = Console(width=80, record=True)
    console.print(summary(tmp_path))
    shown = " ".join(console.export_text().split())
    assert "Round 3 against round 2: held-out reward" in shown and "rounds/2" in shown


def test_a_judge_has_preferences(tmp_path: Path) -> None:
    facts = facts_of("better")
    wins = np.array([1.0] * 40 + [0.0] * 20)
    rate = {"metric": "win rate", "shares": True, "before": 0.5, "after": 2 / 3, "n": 60, "unit": "prompt"}
    rate |= beyond_half(wins).facts(60, "prompt") | {"length_controlled": {"win_rate": 0.55}}
    facts["rounds"][0] |= {"against_before": rate, "against_base": rate}
    facts["base"]["reward"] = facts["rounds"][0]["model"]["reward"] = None
    assert "its answers are preferred in 66.7\u202f% of the cases, +16.7 points" in verdict(facts).lines[0].text
    (tmp_path / "rounds.json").write_text(json.dumps(facts))
    write_rounds(tmp_path)
    page = (tmp_path / "rounds.html").read_text()
    assert "at equal lengths" in page and "Against the base" not in page and ">Reward<" not in page
