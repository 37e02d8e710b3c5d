"""The page of samples: held-out pairs in an order, rollouts by step, and answers before and after."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile_texts import HOSTILE, require_harmless
from starlette.testclient import TestClient

Client = Callable[..., TestClient]
Fake = Callable[..., Path]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def pair(name: str, before: Any, after: Any) -> dict[str, Any]:
    answer = [{"role": "assistant", "content": f"answer of {name}"}]
    return {
        **{"row": f"pairs.jsonl, row {name}", "prompt": said(f"prompt {name}"), "chosen": answer, "rejected": answer},
        **{"margin_before": before, "margin_after": after},
    }


def shown(client: TestClient, query: str = "") -> list[str]:
    return re.findall(r">prompt (\w+)<", client.get(f"/samples?run=a{query}").text)


PAIRS = [
    pair("same", 0.0, 0.0),
    pair("better", 0.0, 2.0),
    pair("worst", 3.0, 1.0),
    pair("worse", 0.0, -1.0),
    pair("none", None, 0.5),
]


@pytest.fixture
def run_a(fake_run: Fake, tmp_path: Path) -> Path:
    folder = fake_run(tmp_path / "a")
    write_lines(folder / "evaluation" / "heldout.jsonl", PAIRS)
    return folder


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_pairs_that_got_worse_are_first(ui_client: Client, run_a: Path, tmp_path: Path) -> None:
    client = ui_client(tmp_path)
    # Without a margin before, its change is what it is after.
    assert shown(client) == ["worst", "worse", "same", "none", "better"]
    assert shown(client, "&order=best") == ["better", "none", "same", "worse", "worst"]
    assert shown(client, "&order=lowest") == ["worse", "same", "none", "worst", "better"]
    assert shown(client, "&order=") == ["same", "better", "worst", "worse", "none"]
    text = client.get("/samples?run=a").text
    assert re.search(r"of which <span[^>]*>2</span> got worse", text) and "Margins" in text
    assert re.search(r"3\.000</span> → <span[^>]*>1\.000", text)


def test_many_pairs_come_in_pages(ui_client: Client, run_a: Path, tmp_path: Path) -> None:
    write_lines(run_a / "evaluation" / "heldout.jsonl", [pair(f"n{i}", 0.0, float(i)) for i in range(45)])
    client = ui_client(tmp_path)
    assert shown(client) == [f"n{i}" for i in range(20)]
    assert shown(client, "&after=40&order=worst") == [f"n{i}" for i in range(40, 45)]
    assert "after=20" in client.get("/samples?run=a").text


def test_rewards_of_prompts_are_shown_with_both_answers(ui_client: Client, fake_run: Fake, tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "a", heldout=None)
    (folder / "evaluation").mkdir(exist_ok=True)
    (folder / "evaluation" / "rewards.json").write_text('{"n": 1}')
    line = {
        "row": "p, row 1",
        "prompt": said("prompt one"),
        "before": 1.0,
        "after": 0.5,
        "answer_before": "was so",
        "answer_after": "is so",
    }
    write_lines(folder / "evaluation" / "heldout.jsonl", [line])
    text = ui_client(tmp_path).get("/samples?run=a").text
    assert "was so" in text and "is so" in text and "Rewards" in text


def group(step: int, name: str, *rewards: Any) -> dict[str, Any]:
    completions = [
        {
            "text": f"{name} {reward}",
            "tokens": 3,
            "finished": True,
            "reward": reward,
            "advantage": 0.5,
            "scores": {"x": reward, "y": 1.0},
        }
        for reward in rewards
    ]
    return {"step": step, "prompt": said(f"prompt {name}"), "completions": completions}


def test_rollouts_are_shown_by_step_the_highest_reward_first(ui_client: Client, run_a: Path, tmp_path: Path) -> None:
    groups = [group(1, "early", 0.0, 2.0, 1.0), group(1, "other", 1.0), group(4, "late", 3.0, None)]
    write_lines(run_a / "rollouts.jsonl", groups)
    client = ui_client(tmp_path)
    assert shown(client, "&kind=rollouts.jsonl") == ["late"]
    assert shown(client, "&kind=rollouts.jsonl&step=1") == ["early", "other"]
    assert shown(client, "&kind=rollouts.jsonl&step=2") == ["late"]
    text = client.get("/samples?run=a&kind=rollouts.jsonl&step=1").text
    assert text.index("early 2.0") < text.index("early 1.0") < text.index("early 0.0")
    assert "advantage" in text and ", x " in text and "step=4" in text
    with (run_a / "rollouts.jsonl").open("a") as file:
        file.write('{"step": 5, "prom')  # a run that goes on
    assert shown(client, "&kind=rollouts.jsonl") == ["late"]


def test_there_are_the_kinds_that_the_run_has(ui_client: Client, run_a: Path, tmp_path: Path) -> None:
    client = ui_client(tmp_path)
    text = client.get("/samples?run=a&kind=nonsense").text
    assert "Held-out" in text and "Answers" in text and "Rollouts" not in text
    assert "What does a compiler do?" in client.get("/samples?run=a&kind=samples.jsonl").text
    assert client.get("/samples").text.count("/samples?run=") == 1
    (tmp_path / "b").mkdir()
    assert client.get("/samples?run=b").status_code == 404


def test_hostile_samples_are_text(ui_client: Client, run_a: Path, tmp_path: Path) -> None:
    held_out = [pair(text, 0.0, 1.0) | {"prompt": said(text), "row": text} for text in HOSTILE]
    rollouts = [group(1, text, 1.0) | {"prompt": [{"role": text, "content": text}]} for text in HOSTILE]
    write_lines(run_a / "evaluation" / "heldout.jsonl", held_out)
    write_lines(run_a / "rollouts.jsonl", [*rollouts, {"step": 1}])
    write_lines(
        run_a / "samples.jsonl", [{"prompt": said(text), "before": [text], "after": [text]} for text in HOSTILE]
    )
    client = ui_client(tmp_path)
    for kind in ("evaluation/heldout.jsonl", "rollouts.jsonl", "samples.jsonl"):
        for text in HOSTILE[::12]:
            for after in range(0, len(HOSTILE), 20) if text is HOSTILE[0] else (0,):
                given = {"run": "a", "kind": kind, "order": text, "step": text, "after": str(after)}
                answer = client.get("/samples", params=given)
                assert answer.status_code == 200
                require_harmless(answer.text)
