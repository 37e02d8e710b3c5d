"""Axolotl, LLaMA-Factory and ms-swift: every key that these tools have is known, and what their files become."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from prefold.errors import UserError
from prefold.importing import Imported, import_recipe
from prefold.importing.axolotl import AXOLOTL
from prefold.importing.draft import Draft
from prefold.importing.write import Tool
from prefold.importing.write import write as write_draft
from prefold.recipe import RecipeBase, load_recipe

HERE = Path(__file__).parent


@cache
def names_of(file: str) -> tuple[str, ...]:
    return tuple((HERE / "keys" / f"{file}.txt").read_text().split())


@cache
def imported(name: str) -> Imported:
    return import_recipe(str(HERE / "samples" / f"{name}.yaml"))


def recipe_of(name: str, folder: Path) -> RecipeBase:
    """The recipe of a sample, written to a file and read back."""
    file = folder / "mine.yaml"
    file.write_text(imported(name).text)
    return load_recipe(str(file))


@pytest.fixture
def recipe_from(tmp_path: Path):
    def written(values: dict[str, Any]) -> RecipeBase:
        (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(values))
        (tmp_path / "mine.yaml").write_text(import_recipe(str(tmp_path / "theirs.yaml")).text)
        return load_recipe(str(tmp_path / "mine.yaml"))

    return written


@pytest.fixture
def refusal(tmp_path: Path):
    def message(values: dict[str, Any], method: str | None = None) -> str:
        (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(values))
        with pytest.raises(UserError) as error:
            import_recipe(str(tmp_path / "theirs.yaml"), method)
        return str(error.value)

    return message


# ---- every key of every tool ------------------------------------------------------------------------------------

AXOLOTL_TRL = {"trl": {**dict.fromkeys(names_of("axolotl_trl"), 1), "loss_type": "grpo"}}
EVERY_KEY: list[tuple[Tool, str, dict[str, Any]]] = [
    *((AXOLOTL, "axolotl", {"rl": rl, **AXOLOTL_TRL}) for rl in ("dpo", "ipo", "orpo", "kto", "simpo", "grpo")),
    (AXOLOTL, "axolotl", {"rl": None, "reward_model": True}),
]


@pytest.mark.parametrize(("tool", "file", "head"), EVERY_KEY, ids=lambda value: str(value)[:40])
def test_no_key_of_a_tool_is_unknown(tool: Tool, file: str, head: dict[str, Any]) -> None:
    """All keys at once, switched on: what becomes of each does not hang on its value being a good one."""
    given = {**dict.fromkeys(names_of(file), 1), "process_reward_model": 0, "dpo_loss_type": "sigmoid", **head}
    draft = Draft(tool.name, given)
    write_draft(draft, tool, "theirs.yaml", None)
    draft.finish()
    assert [key for note in draft.notes if note.group == "unknown" for key in note.keys] == []
    assert all(note.text for note in draft.notes if note.group in ("decided", "missing"))
    assert {key for note in draft.notes for key in note.keys} >= set(draft.given)


def test_no_key_of_axolotls_data_sets_is_unknown(tmp_path: Path) -> None:
    entry = {**dict.fromkeys(names_of("axolotl_datasets"), "x"), "path": "a.jsonl"}
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump({"base_model": "m", "rl": "dpo", "datasets": [entry]}))
    notes = import_recipe(str(tmp_path / "theirs.yaml")).notes
    assert {key for note in notes for key in note.keys} >= {f"datasets.{name}" for name in entry}
    assert all(note.text for note in notes if note.group == "missing")


# ---- Axolotl ----------------------------------------------------------------------------------------------------
