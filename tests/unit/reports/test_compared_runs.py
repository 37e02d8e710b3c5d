"""`prefold compare` of run folders on what both have measured beside tasks, and why it could not."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_run import DATA, HELDOUT, RECIPE, SAMPLES, sample, write_run
from fake_tasks import ASKED
from rich.console import Console
from test_report_html import Page

from prefold.cli import main
from prefold.errors import UserError
from prefold.files import write_json
from prefold.reports.comparison import summary, write_comparison
from prefold.runs.comparison import compare

N = 90
GRPO = """\
method: grpo
model: {name: HuggingFaceTB/SmolLM2-135M-Instruct}
data: {train: [{path: prompts.jsonl}], eval_fraction: 0.1}
grpo: {num_generations: 4, max_completion_length: 64, temperature: 1.0, beta: 0.0}
rewards:
- {name: length, target: 50}
output_dir: runs/grpo
"""
REWARD = RECIPE.replace("method: dpo", "method: reward").partition("dpo:")[0] + "output_dir: runs/reward\n"
JUDGED = RECIPE.replace("evaluate:\n", "evaluate:\n  win_rate: {judge: {name: length, target: 5}}\n")


def plain(text: str) -> str:
    for space in ("\u202f", "\u00a0"):
        text = text.replace(space, " ")
    return " ".join(text.replace("\u2212", "-").split())


def lines(right: int, keys: str = "k", start: int = 0, before: int = 42, n: int = N) -> list[dict[str, Any]]:
    """Of `n` pairs, the first `right` after training, and the first `before` before it."""
    sides = [{"before": float(row < before), "after": float(row < right)} for row in range(n)]
    return [({"key": f"{keys}{start + row}"} if keys else {}) | side for row, side in enumerate(sides)]


def run(folder: Path, **changes: Any) -> str:
    return str(write_run(folder, **changes))


def reason(first: str, second: str) -> str:
    with pytest.raises(UserError, match="nothing can be compared with") as caught:
        compare([first, second])
    return str(caught.value)


def test_runs_on_the_same_pairs_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """81 and 42 of the same 90 pairs: 39 differ, all one way, 2 / 2^39. Terminal, JSON and page say the same."""
    one, two = run(tmp_path / "one", pairs=lines(42)), run(tmp_path / "two", pairs=lines(81))
    page = tmp_path / "page.html"
    monkeypatch.setattr(sys, "argv", ["prefold", "compare", one, two, "--html", str(page), "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    found = json.loads(capfd.readouterr().out)
    facts = found["models"][two]["measures"]["held-out pairs"]
    assert (facts["before"], facts["after"], facts["n"], facts["verdict"]) == (42 / 90, 0.9, 90, "better")
    assert facts["p_value"] == pytest.approx(2 / 2**39) and facts["ci"][0] > 0.3
    said = "held-out pairs: 46.7 % to 90.0 % (+43.3 points, 95 % interval"
    text = plain(Page(page.read_text(encoding="utf-8")).text)
    assert "Better on held-out pairs" in text and said in text
    shown = printed(found)
    assert "Better on held-out pairs" in plain(shown) and "accuracy, 90 pairs" in plain(shown)
    assert "46.7 % 90.0 % +43.3 better" in plain(shown)
    assert all(len(line.rstrip()) <= 80 for line in shown.splitlines())
    # The other way round it is worse, and it is the same with the pairs in another order.
    mixed = run(tmp_path / "three", pairs=lines(42)[::-1])
    assert compare([two, mixed])["models"][mixed]["measures"]["held-out pairs"]["verdict"] == "worse"
    same = compare([one, mixed])["models"][mixed]["measures"]["held-out pairs"]
    assert same["changed"] == 0 and "all came out the same" in same["verdict"]
    said = "No difference in anything that was measured: all came out the same"
    assert said in plain(printed(compare([one, mixed])))


def printed(found: dict[str, Any]) -> str:
    file = io.StringIO()
    Console(file=file, width=80, color_system=None, force_terminal=False).print(summary(found))
    return file.getvalue()


def test_what_is_shared_is_compared_and_counted(tmp_path: Path) -> None:
    one = run(tmp_path / "one", pairs=lines(42))
    two = run(tmp_path / "two", pairs=lines(60, start=30, n=80))
    found = compare([one, two])
    facts = found["models"][two]["measures"]["held-out pairs"]
    assert (facts["n"], facts["asked"]) == (60, [90, 80])
    write_comparison(tmp_path / "page.html", found)
    text = Page((tmp_path / "page.html").read_text(encoding="utf-8")).text
    assert "accuracy, 60 pairs shared, of 90 and 80" in plain(text)
    assert "shared" in printed(found)


def test_runs_of_an_earlier_version_are_matched_by_their_set(tmp_path: Path) -> None:
    one, two = (run(tmp_path / name, pairs=lines(right, "")) for name, right in (("one", 42), ("two", 81)))
    assert compare([one, two])["models"][two]["measures"]["held-out pairs"]["n"] == 90
    other = run(tmp_path / "other", pairs=lines(81, ""), data=DATA | {"fingerprint": {"held_out": "another"}})
    newer = run(tmp_path / "newer", pairs=lines(81))
    for folder in (other, newer):
        assert "an earlier version that did not write down which pairs" in reason(one, folder)


def test_one_run_is_compared_with_itself_before(tmp_path: Path) -> None:
    one = run(tmp_path / "one", pairs=lines(81))
    facts = compare([one])["models"][one]["measures"]["held-out pairs"]
    assert (facts["before"], facts["after"]) == (42 / 90, 0.9)


def rewarded(folder: Path, recipe: str = GRPO, keys: str = "k", **changes: Any) -> str:
    side = {"reward": 1.0, "reward_ci": [0.5, 1.5], "rewards": {}, "tokens": 40.0, "finished": 1.0}
    rewards = {
        "prompts": 8,
        "before": side,
        "after": side,
        "difference": {"reward": 0.0, "ci": [-1, 1], "p_value": 1.0},
    }
    own = [{"key": f"{keys}{row}", "before": 1.0, "after": 2.0 + 0.1 * row} for row in range(8)] + [
        {"key": f"{keys}none", "before": None, "after": 9.0}
    ]
    found = run(folder, recipe=recipe, heldout=None, pairs=own, **changes)
    (folder / "evaluation" / "rewards.json").write_text(json.dumps(rewards))
    return found


def test_rewards_of_the_same_prompts(tmp_path: Path) -> None:
    """8 prompts have both, all are higher: 2 / 2^8."""
    one = rewarded(tmp_path / "one")
    facts = compare([one])["models"][one]["measures"]["held-out prompts"]
    assert (facts["n"], facts["asked"], facts["shares"], facts["verdict"]) == (8, [9, 9], False, "better")
    assert facts["p_value"] == 2 / 2**8
    same = rewarded(tmp_path / "same", GRPO.replace("num_generations: 4", "num_generations: 8"))
    assert compare([one, same])["models"][same]["measures"]["held-out prompts"]["changed"] == 0


def test_a_reward_file_is_known_by_its_contents(tmp_path: Path) -> None:
    def own(name: str, digest: str) -> str:
        file = tmp_path / f"{name}.py"
        file.write_text("def mine(completions):\n    return [1.0 for _ in completions]\n")
        recipe = GRPO.replace("{name: length, target: 50}", f"{{file: {file}, name: mine}}")
        folder = rewarded(tmp_path / name, recipe)
        write_json(Path(folder) / "inputs.json", {"read": {"train": {"rewards.0": {file.name: digest}}}})
        return folder

    one, moved, changed = own("one", "abc"), own("moved", "abc"), own("changed", "def")
    assert compare([one, moved])["models"][moved]["measures"]["held-out prompts"]["n"] == 9
    assert "the rewards: not the same" in reason(one, changed)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("temperature: 1.0", "temperature: 0.7"), "`temperature`: 1.0 and 0.7"),
        (("max_completion_length: 64", "max_completion_length: 32"), "`max_completion_length`: 64 and 32"),
        (("target: 50", "target: 60"), "the rewards: not the same"),
        (("eval_fraction: 0.1", "eval_fraction: 0.1, template: none"), "`data.template`: chat and none"),
    ],
)
def test_rewards_with_other_settings(change: tuple[str, str], why: str, tmp_path: Path) -> None:
    one, two = rewarded(tmp_path / "one"), rewarded(tmp_path / "two", GRPO.replace(*change))
    assert f"held-out prompts: {why}" in reason(one, two)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"pairs": lines(81, "other")}, "held-out pairs: no pair is the same in both"),
        ({"pairs": None}, "held-out pairs: only .*one has measured it"),
        ({"pairs": lines(81), "recipe": RECIPE.replace("max_length", "template: none\n  max_length")}, "chat and none"),
        (
            {"pairs": lines(81), "recipe": RECIPE.replace("overlong: drop", "overlong: truncate_prompt")},
            "lengths that prompts are cut to: not the same",
        ),
        (
            {
                "pairs": lines(81),
                "recipe": REWARD,
                "heldout": {"pairs": N, "after": HELDOUT["after"], "chance": {"accuracy": 0.5, "verdict": ""}},
            },
            "measured by: log-probs of answers and scores of answers",
        ),
    ],
)
def test_why_pairs_are_not_compared(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    one = run(tmp_path / "one", pairs=lines(42))
    assert re.search(why, reason(one, run(tmp_path / "two", **changes)))


def test_reward_models_are_compared_with_each_other_and_with_chance(tmp_path: Path) -> None:
    scored = {"pairs": N, "after": HELDOUT["after"], "chance": {"accuracy": 0.5, "p_value": 0.001, "verdict": "better"}}
    folders = []
    for name, right in (("one", 42), ("two", 81)):
        own = [{"key": row["key"], "after": row["after"]} for row in lines(right)]
        folders.append(run(tmp_path / name, recipe=REWARD, heldout=scored, samples=None, pairs=own))
    found = compare(folders)["models"][folders[1]]["measures"]["held-out pairs"]
    assert (found["before"], found["after"], found["verdict"]) == (42 / 90, 0.9, "better")
    alone = compare([folders[0]])["models"][folders[0]]["measures"]["held-out pairs"]
    assert alone["before"] == 0.5 and alone["verdict"].startswith("no difference that 90 pairs can show")
    with pytest.raises(UserError, match="scores answers and gives none"):
        compare(folders, ["everyday_facts"])


def judged(folder: Path, outcomes: list[float | None], before: str = "", older: bool = False, **judge: Any) -> str:
    samples = [
        sample(f"{prompt} {row}", before or first, after) for row in range(3) for prompt, first, after in SAMPLES
    ]
    facts = {
        "judge": {"kind": "reward", "name": "length"} | judge,
        "prompts": 12,
        "win_rate": 0.5,
        "ci": [0.2, 0.8],
        "p_value": 1.0,
        "verdict": "no difference",
        "outcomes": [[outcome] for outcome in outcomes],
    }
    if older:
        del facts["outcomes"]
    return run(folder, recipe=JUDGED, win_rate=facts, samples=samples)


def test_win_rates_on_the_same_prompts(tmp_path: Path) -> None:
    one = judged(tmp_path / "one", [0.0] * 8 + [1.0, 1.0, 0.5, None])
    two = judged(tmp_path / "two", [1.0] * 8 + [1.0, 1.0, 0.5, 0.0])
    facts = compare([one, two])["models"][two]["measures"]["win rate"]
    assert (facts["n"], facts["changed"], facts["verdict"]) == (11, 8, "better")
    assert facts["p_value"] == 2 / 2**8
    # Alone: how often it is preferred to its own model before training, against one half.
    alone = compare([two])["models"][two]["measures"]["win rate"]
    assert (alone["before"], alone["after"], alone["p_value"]) == (0.5, 10.5 / 12, pytest.approx(2 * 12 / 2**11))
    older = judged(tmp_path / "older", [1.0] * 12, older=True)
    assert "an earlier version that did not write down which prompts" in reason(one, older)
    other = judged(tmp_path / "other", [1.0] * 12, before="Another answer.")
    assert "win rate: no prompt is the same in both, with the same answer before training" in reason(one, other)
    model = judged(tmp_path / "model", [1.0] * 12, model="big")
    assert "win rate: the judge: not the same" in reason(one, model)


def test_tasks_asked_otherwise_are_not_compared(tmp_path: Path) -> None:
    values = [float(place < 6) for place in range(8)]
    keys = [f"q{place}" for place in range(8)]
    task = dict.fromkeys(("questions", "clusters", "texts", "answers", "targets"), keys)
    task |= {
        "task": "task",
        "metric": "acc",
        "version": "1",
        "num_fewshot": 0,
        "higher_is_better": True,
        "values": values,
    }
    scored = {"scores_after": json.dumps([task]), "scores_before": json.dumps([task])}
    one = run(tmp_path / "one", recipe=ASKED, pairs=lines(42), tasks={"tasks": {}}, **scored)
    two = run(tmp_path / "two", recipe=ASKED, pairs=lines(81), tasks={"tasks": {}}, **scored)
    assert list(compare([one, two])["models"][two]["tasks"]) == ["task"]
    template = ASKED.replace("evaluate:\n", "evaluate:\n  apply_chat_template: true\n")
    (tmp_path / "two" / "recipe.yaml").write_text(template)
    found = compare([one, two])
    assert found["models"][two]["tasks"] == {}
    assert found["models"][two]["left_out"]["tasks"] == f"only {two} was asked with its chat template"
    text = plain(printed(found))
    assert "not compared: tasks (only" in text and "Better on held-out pairs" in text
    write_comparison(tmp_path / "page.html", found)
    assert "Not compared: tasks (only" in plain(Page((tmp_path / "page.html").read_text(encoding="utf-8")).text)
    # A run that was asked nothing is still compared by its pairs.
    three = run(tmp_path / "three", pairs=lines(81))
    left_out = compare([one, three])["models"][three]["left_out"]
    assert left_out["tasks"] == f"only {one} was asked tasks"


def test_a_file_that_cannot_be_read_is_one_message(tmp_path: Path) -> None:
    one, two = run(tmp_path / "one", pairs=lines(42)), run(tmp_path / "two", pairs=[{"key": "a"}])
    with pytest.raises(UserError, match=r"two/evaluation: cannot be read \('after'\)"):
        compare([one, two])
