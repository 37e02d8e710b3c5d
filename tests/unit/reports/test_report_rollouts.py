"""Rollouts in the report: which completions are shown, and what is said about all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from fake_run import HOSTILE, write_run
from test_report_html import Page, report

from prefold.reports.page import sampled
from prefold.reports.run_files import read_run

RECIPE = yaml.safe_dump(
    {"method": "grpo", "model": {"name": "m"}, "rewards": [{"name": "length"}], "grpo": {"max_completion_length": 96}}
)


def group(step: int, rewards: list[float | None], text: str = "text", **scores: Any) -> dict[str, Any]:
    completions = [
        {
            "text": f"{text} {place}",
            "tokens": 5,
            "finished": place > 0,
            "scores": {"length": reward, **scores},
            "reward": reward,
            "advantage": 0.5,
        }
        for place, reward in enumerate(rewards)
    ]
    return {"step": step, "prompt": [{"role": "user", "content": f"prompt {step}"}], "completions": completions}


def squeezed(page: Page) -> str:
    return " ".join(page.text.split())


def run_with(folder: Path, rollouts: Any = None, metrics: Any = None) -> Any:
    return read_run(write_run(folder, recipe=RECIPE, rollouts=rollouts, **({"metrics": metrics} if metrics else {})))


def test_first_middle_and_last_step_are_shown_with_their_best_and_worst(tmp_path: Path) -> None:
    groups = [one for step in range(1, 101) for one in (group(step, [1.0, 1.0]), group(step, [3.0, None, 7.0, 5.0]))]
    found = sampled(run_with(tmp_path, groups))
    assert [group["step"] for group, _, _ in found] == [1, 51, 100]
    for _, worst, best in found:
        assert (worst["reward"], worst["text"], worst["finished"]) == (3.0, "text 0", False)
        assert (best["reward"], best["text"], best["finished"]) == (7.0, "text 2", True)
    text = squeezed(report(tmp_path, recipe=RECIPE, rollouts=groups[:2]))
    assert "Reward +3.00, advantage +0.50; 5 tokens" in text  # a single reward is the reward
    assert "Cut off at the token limit" in text
    assert "Reward +7.00, advantage +0.50; 5 tokenstext 2" in text


def test_few_steps_and_several_rewards(tmp_path: Path) -> None:
    found = sampled(run_with(tmp_path, [group(1, [1.0, 2.0], format=0.5), group(2, [None, None], format=None)]))
    assert [group["step"] for group, _, _ in found] == [1]
    groups = [group(1, [1.0, 2.0], format=0.5)]
    text = squeezed(report(tmp_path / "page", recipe=RECIPE, rollouts=groups))
    assert "Reward +2.00, advantage +0.50, length +2.00, format +0.50; 5 tokens" in text
    assert sampled(run_with(tmp_path / "none")) == []


def test_odd_and_half_written_files(tmp_path: Path) -> None:
    folder = write_run(tmp_path, recipe=RECIPE)
    odd: list[Any] = [{}, {"completions": [1, None, {}]}, {"completions": 5, "prompt": 7}, group(3, [1.0, 2.0])]
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in odd) + '{"step": 4, "comp')
    assert [group["step"] for group, _, _ in sampled(read_run(folder))] == [3]


def test_hostile_completions_stay_text(tmp_path: Path) -> None:
    harmless = report(tmp_path / "a", recipe=RECIPE, rollouts=[group(1, [1.0, 2.0], "harmless")])
    for place, text in enumerate(HOSTILE):
        rows = [group(1, [1.0, 2.0], text)]
        rows[0]["completions"][0]["scores"] = rows[0]["completions"][1]["scores"] = {text: 1.0, "b": 2.0}
        page = report(tmp_path / str(place), recipe=RECIPE, rollouts=rows)
        assert len([tag for tag, _ in page.elements if tag == "script"]) == len(
            [tag for tag, _ in harmless.elements if tag == "script"]
        )
        assert {tag for tag, _ in page.elements} == {tag for tag, _ in harmless.elements}


def test_before_evaluation_prompts_are_what_is_held_out(tmp_path: Path) -> None:
    page: Page = report(tmp_path, recipe=RECIPE, metrics=[{"step": 1, "reward": 1.0}], heldout=None)
    assert "Held-out prompts" in page.text and "Held-out pairs" not in page.text
