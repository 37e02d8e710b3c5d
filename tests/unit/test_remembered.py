"""What an examination found is used again while nothing has changed that it depends on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import save_chat_model

from prefold.errors import UserError
from prefold.plan.machine import Machine
from prefold.plan.plan import Growth
from prefold.runs import examination, remembered
from prefold.runs.check import CheckReport, check


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PREFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    save_chat_model(tmp_path / "model", max_position_embeddings=512, num_hidden_layers=2)
    rows = [{"prompt": f"Word {i}", "chosen": f"WORD {i}!", "rejected": f"word {i}"} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "method: dpo\nmodel: {name: model}\ndata: {train: [{path: pairs.jsonl}]}\n"
        "train: {warmup_steps: 100, batch_size: 4}\noutput_dir: run\n"
    )
    return str(path)


@pytest.fixture
def examinations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each that was made."""
    made: list[Any] = []
    real = examination.findings_and_plan

    def counted(*arguments: Any) -> Any:
        made.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(examination, "findings_and_plan", counted)
    return made


def without_machine(found: CheckReport) -> dict[str, Any]:
    facts = found.as_json()
    for name in ("at_hand", "largest_budget"):
        facts["plan"].pop(name)
    facts["plan"]["disk"].pop("free")
    return facts


def test_the_second_check_says_the_same(recipe: str, examinations: list[Any]) -> None:
    first, second = check(recipe), check(recipe)
    assert len(examinations) == 1
    assert without_machine(second) == without_machine(first)
    assert [finding.kind for finding in second.prepared.report.findings].count("warmup_too_long") == 1


@pytest.mark.parametrize(
    ("changed", "overrides"),
    [
        ("", ["train.batch_size=2"]),
        ("", ["output_dir=elsewhere"]),
        ("model/config.json", []),
        ("model/another.json", []),
        ("pairs.jsonl", []),
    ],
)
def test_what_has_changed_is_examined(
    recipe: str, examinations: list[Any], tmp_path: Path, changed: str, overrides: list[str]
) -> None:
    check(recipe)
    if changed:
        with (tmp_path / changed).open("a") as file:
            file.write('{"prompt": "One more", "chosen": "yes", "rejected": "no"}\n' if "pairs" in changed else "\n")
    check(recipe, overrides)
    assert len(examinations) == 2


def test_another_version_of_a_package_is_another_answer(
    recipe: str, examinations: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    check(recipe)
    before = remembered.environment()
    monkeypatch.setattr(remembered, "environment", lambda: {**before, "packages": {"torch": "0.1"}})
    check(recipe)
    assert len(examinations) == 2


def test_with_little_memory_it_is_examined_anew(
    recipe: str, examinations: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = check(recipe).plan
    short = Machine("cpu", remembered.ENOUGH * plan.peak - 1, plan.memory["train"]["process"])
    monkeypatch.setattr(Machine, "here", staticmethod(lambda device: short))
    check(recipe)
    assert len(examinations) == 2
    assert check(recipe).plan.at_hand == short.memory  # the same memory as before
    assert len(examinations) == 2


def test_the_memory_and_disk_of_now_are_shown(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest budget too: it is as a plan made with that memory has it."""
    plan = check(recipe).plan
    machine = Machine("cpu", plan.at_hand + 10**9, plan.memory["train"]["process"])
    monkeypatch.setattr(Machine, "here", staticmethod(lambda device: machine))
    again = check(recipe).plan
    monkeypatch.setattr(remembered, "read", lambda *arguments: None)
    anew = check(recipe).plan
    assert again.at_hand == anew.at_hand == machine.memory
    assert again.largest_budget == anew.largest_budget != plan.largest_budget


def test_for_a_named_gpu(recipe: str, examinations: list[Any]) -> None:
    plans = [check(recipe, device_memory=memory).plan for memory in ("24GB", "24GB", "80GB")]
    assert [plan.at_hand for plan in plans] == [24 * 10**9, 24 * 10**9, 80 * 10**9]
    assert len(examinations) == 2


def test_a_refusal_is_not_remembered(recipe: str, examinations: list[Any]) -> None:
    for _ in range(2):
        with pytest.raises(UserError, match="adapter"):
            check(recipe, ["model.adapter=nowhere"])
    assert len(examinations) == 2


def test_what_others_hold_is_asked_each_time(recipe: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whether something can be published depends on more than files of the recipe."""
    overrides = ["publish.to=published"]
    check(recipe, overrides)
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "mine.txt").write_text("")
    with pytest.raises(UserError, match="published"):
        check(recipe, overrides)


def test_a_broken_entry_is_none(recipe: str, examinations: list[Any], tmp_path: Path) -> None:
    check(recipe)
    [entry] = (tmp_path / "cache" / "plans").iterdir()
    entry.write_text(entry.read_text()[:-40])
    check(recipe)
    assert len(examinations) == 2


def test_old_entries_go(recipe: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remembered, "KEPT", 2)
    for size in (2, 3, 4):
        check(recipe, [f"train.batch_size={size}"])
    assert len(list((tmp_path / "cache" / "plans").iterdir())) == 2


@pytest.mark.parametrize(("at_hand", "largest"), [(1499, None), (1500, 50), (1639, 50), (1640, 64), (7400, 640)])
def test_growth(at_hand: int, largest: int | None) -> None:
    assert Growth(fixed=1000.0, per_token=10.0, longest=50).largest(at_hand) == largest
