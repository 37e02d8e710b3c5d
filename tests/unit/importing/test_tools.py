"""Axolotl, LLaMA-Factory and ms-swift: every key that these tools have is known, and what their files become."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from prefold.errors import UserError
from prefold.importing import Imported, import_recipe
from prefold.importing.axolotl import AXOLOTL
from prefold.importing.draft import Draft
from prefold.importing.llamafactory import LLAMAFACTORY
from prefold.importing.llamafactory_v1 import LLAMAFACTORY_V1
from prefold.importing.swift import KEYS as SWIFT_KEYS
from prefold.importing.swift import SWIFT
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

SOUND = {"process_reward_model": 0, "dpo_loss_type": "sigmoid", "pref_loss": "sigmoid"}
SOUND |= {"loss_type": "sigmoid", "advantage_estimator": "grpo", **dict.fromkeys(SWIFT_KEYS["vision"], 0)}
"""Values without which a file is refused."""


def in_sections(names: Iterable[str], **values: Any) -> dict[str, Any]:
    """Keys switched on, those of sections inside them."""
    given: dict[str, Any] = {}
    for outer, _, inner in (name.partition(".") for name in names if f"{name}." not in " ".join(names)):
        if inner:
            given.setdefault(outer, {})[inner] = values.get(f"{outer}.{inner}", 1)
        else:
            given[outer] = values.get(outer, 1)
    return given


V1 = in_sections(names_of("llamafactory_v1"), **{"peft_config.name": "lora", "quant_config.quantization_bit": 4})
AXOLOTL_TRL = {"trl": {**dict.fromkeys(names_of("axolotl_trl"), 1), "loss_type": "grpo"}}
EVERY_KEY: list[tuple[Tool, str, dict[str, Any]]] = [
    *((AXOLOTL, "axolotl", {"rl": rl, **AXOLOTL_TRL}) for rl in ("dpo", "ipo", "orpo", "kto", "simpo", "grpo")),
    (AXOLOTL, "axolotl", {"rl": None, "reward_model": True}),
    *((LLAMAFACTORY, "llamafactory", {"stage": stage}) for stage in ("dpo", "kto", "rm")),
    *((SWIFT, "swift", {"rlhf_type": kind, "loss_type": kind}) for kind in ("kto", "grpo")),
    *((SWIFT, "swift", {"rlhf_type": kind}) for kind in ("dpo", "orpo", "simpo", "cpo", "rm")),
    *((LLAMAFACTORY_V1, "llamafactory_v1", {**V1, **head}) for head in ({"pref_loss": "orpo"}, {"model_class": "cls"})),
]


@pytest.mark.parametrize(("tool", "file", "head"), EVERY_KEY, ids=lambda value: str(value)[:40])
def test_no_key_of_a_tool_is_unknown(tool: Tool, file: str, head: dict[str, Any]) -> None:
    """All keys at once, switched on: what becomes of each does not hang on its value being a good one."""
    given = {**{name: SOUND.get(name, 1) for name in names_of(file) if "." not in name}, **head}
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
# ---- LLaMA-Factory: the names in dataset_info.json --------------------------------------------------------------

INFO: dict[str, Any] = {
    "orca": {
        "hf_hub_url": "acme/orca-pairs",
        "subset": "en",
        "split": "train_prefs",
        "revision": "v2",
        "ranking": True,
        "num_samples": 300,
        "columns": {"prompt": "ask", "query": "", "chosen": "good", "rejected": "rejected", "system": "system_prompt"},
    },
    "thumbs": {
        "file_name": "thumbs.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "dialogue", "kto_tag": "liked"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "plain": {"file_name": "sub/plain.json", "ranking": True},
    "pictures": {"file_name": "p.json", "ranking": True, "columns": {"images": "image"}, "folder": "p"},
    "elsewhere": {"ms_hub_url": "acme/there", "ranking": True},
    "odd": {"file_name": "o.json", "formatting": "sharegpt", "tags": {"role_tag": "speaker"}},
}


@pytest.fixture
def with_info(tmp_path: Path):
    """Imports a file beside whose folder `sets` a dataset_info.json is."""
    folder = tmp_path / "sets"
    folder.mkdir()
    (folder / "dataset_info.json").write_text(json.dumps(INFO))
    head = {"model_name_or_path": "m", "stage": "dpo", "dataset_dir": "sets", "template": "llama3"}

    def written(values: dict[str, Any]) -> tuple[Imported, RecipeBase]:
        (tmp_path / "theirs.yaml").write_text(yaml.safe_dump({**head, **values}))
        result = import_recipe(str(tmp_path / "theirs.yaml"))
        (tmp_path / "mine.yaml").write_text(result.text)
        return result, load_recipe(str(tmp_path / "mine.yaml"))

    return written


def test_a_name_becomes_the_hub_data_set_that_it_stands_for(with_info) -> None:
    result, recipe = with_info({"dataset": "orca", "max_samples": 1000})
    source = recipe.data.train[0]
    assert (source.path, source.name, source.split, source.revision) == ("acme/orca-pairs", "en", "train_prefs", "v2")
    assert source.columns == {"prompt": "ask", "chosen": "good", "system": "system_prompt"}
    assert source.count == 300
    assert "not at hand" not in result.text


def test_a_name_becomes_a_file_beside_dataset_info(with_info, tmp_path: Path) -> None:
    _, recipe = with_info({"stage": "kto", "dataset": "thumbs", "eval_dataset": "plain"})
    assert recipe.data.train[0].path == str(tmp_path / "sets" / "thumbs.jsonl")
    assert recipe.data.train[0].columns == {"messages": "dialogue", "label": "liked"}
    assert (recipe.data.eval[0].path, recipe.data.eval[0].columns) == (str(tmp_path / "sets/sub/plain.json"), None)


def test_weights_of_named_data_sets(with_info) -> None:
    keys = {"dataset": "orca, plain", "mix_strategy": "interleave_under", "interleave_probs": "0.7, 0.3"}
    _, recipe = with_info(keys)
    assert [(source.weight, source.count) for source in recipe.data.train] == [(0.7, None), (0.3, None)]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pictures", "columns images: images, videos and sound cannot be trained on"),
        ("pictures", "`folder` of dataset_info.json"),
        ("elsewhere", "acme/there is on no Hub that prefold reads"),
        ("odd", "tags role_tag: speaker"),
        ("unheard", "not at hand"),
    ],
)
def test_what_of_an_entry_has_no_counterpart_is_said(name: str, said: str, with_info) -> None:
    result, _ = with_info({"dataset": name})
    assert said in " ".join((result.account + result.text).split())


def test_a_dataset_info_that_is_not_json_is_one_message(with_info, tmp_path: Path) -> None:
    (tmp_path / "sets" / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match=r"dataset_info\.json: cannot be read"):
        with_info({"dataset": "orca"})
