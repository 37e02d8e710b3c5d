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


def words(name: str) -> str:
    """What is said of a sample, on one line."""
    return " ".join(imported(name).account.split())


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


def test_axolotl_dpo(tmp_path: Path) -> None:
    recipe = recipe_of("axolotl_llama3_dpo_lora", tmp_path)
    assert (recipe.model.load_in_8bit, recipe.lora.r, recipe.lora.target_modules) == (True, 32, "all-linear")
    assert recipe.data.train[0].columns == {"messages": "conversation"}
    assert (recipe.data.eval_fraction, recipe.data.max_length, recipe.train.batch_size) == (0.05, 4096, 8)
    # Once and four times in each of four epochs.
    assert (recipe.train.save_steps, recipe.train.eval_steps, recipe.train.warmup_steps) == (1 / 4, 1 / 16, 10)
    assert "chat_template llama3: the model's own chat template" in words("axolotl_llama3_dpo_lora")


def test_axolotl_full_dpo_holds_out_nothing_and_measures_nothing(tmp_path: Path) -> None:
    recipe = recipe_of("axolotl_qwen_dpo_full", tmp_path)
    assert (recipe.lora, recipe.algorithm.label_smoothing, recipe.train.warmup_steps) == ("none", 0.1, 0.1)
    assert (recipe.train.save_steps, recipe.train.eval_steps, recipe.train.save_total_limit) == (0.1667, None, 3)
    assert (recipe.train.gradient_checkpointing, recipe.train.optim) == (True, "adamw_torch_fused")


def test_axolotl_kto_and_orpo(tmp_path: Path) -> None:
    kto = recipe_of("axolotl_llama3_kto_qlora", tmp_path)
    assert (kto.method, kto.algorithm.beta, kto.data.duplicates) == ("kto", 0.5, "drop_exact")
    assert (kto.algorithm.desirable_weight, kto.algorithm.undesirable_weight) == (0.2, 0.8)
    orpo = recipe_of("axolotl_mistral_orpo_qlora", tmp_path)
    assert (orpo.method, orpo.algorithm.beta, orpo.data.overlong) == ("orpo", 0.1, "drop")
    assert (orpo.train.eval_steps, orpo.train.save_steps, orpo.train.report_to) == (0.25, 0.5, ["wandb"])


def test_axolotl_names_columns_and_words_around_them(tmp_path: Path) -> None:
    recipe = recipe_of("axolotl_phi_dpo", tmp_path)
    columns = {"system": "system_text", "prompt": "question", "chosen": "good", "rejected": "bad"}
    assert (recipe.data.train[0].columns, recipe.data.eval[0].path) == (columns, "held_out.jsonl")
    assert recipe.lora.target_modules == "model.layers.[0-9]+.self_attn.(qkv|o)_proj"
    assert (recipe.train.eval_steps, recipe.train.max_steps, recipe.train.warmup_steps) == (50, 400, 12)
    assert "datasets.prompt_format 'Answer this: {prompt}': the model's own" in words("axolotl_phi_dpo")
    assert "chosen_format '" not in words("axolotl_phi_dpo")


def test_axolotl_gspo(tmp_path: Path) -> None:
    recipe = recipe_of("axolotl_gspo", tmp_path)
    algorithm = recipe.algorithm
    assert (algorithm.importance_sampling_level, algorithm.loss_type) == ("sequence", "dr_grpo")
    assert (algorithm.epsilon, algorithm.epsilon_high, algorithm.scale_rewards) == (0.0003, 0.0004, "none")
    assert (algorithm.mask_truncated_completions, recipe.train.batch_size) == (True, 8 * 4 // 8)
    assert [(one.file, one.name, one.weight) for one in recipe.rewards] == [
        ("rewards.py", "format_reward", 0.5),
        ("rewards.py", "accuracy_reward", 1.0),
    ]
    assert (recipe.model.load_in_4bit, recipe.model.bnb_4bit_quant_type) == (True, "nf4")
    assert "datasets.type rewards.gsm8k_transform: code that makes rows" in words("axolotl_gspo")


def test_axolotl_template_of_a_file_and_code_that_makes_rows(tmp_path: Path) -> None:
    recipe = recipe_of("axolotl_ipo_jinja", tmp_path)
    assert (recipe.method, recipe.model.chat_template) == ("ipo", "templates/mine.jinja")
    assert [source.path for source in recipe.data.train] == ["a.parquet", "b.jsonl"]
    assert "my_project.strategies.rewrite: code that makes rows" in words("axolotl_ipo_jinja")


def test_axolotl_sums_losses_and_trains_reward_models(tmp_path: Path) -> None:
    losses = recipe_of("axolotl_dpo_losses", tmp_path).algorithm.losses
    assert [(loss["name"], loss["weight"]) for loss in losses] == [("dpo", 0.8), ("bco", 0.2), ("sft", 1.0)]
    reward = recipe_of("axolotl_reward", tmp_path)
    assert (reward.method, reward.algorithm.center_rewards_coefficient) == ("reward", 0.01)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"rl": "gdpo"}, "`rl: gdpo` has no counterpart"),
        ({"rl": "ebft"}, "`rl: ebft` has no counterpart"),
        ({"process_reward_model": True}, "scores steps of an answer"),
        ({"rl": "grpo", "trl": {"loss_type": "sapo"}}, "`trl.loss_type: sapo` has no counterpart"),
        ({"rl": "dpo", "dpo_loss_type": ["kto_pair"]}, "`dpo_loss_type: kto_pair` has no counterpart"),
    ],
)
def test_what_axolotl_trains_and_prefold_does_not(keys: dict[str, Any], said: str, refusal) -> None:
    assert said in refusal({"base_model": "m", "datasets": [{"path": "a.jsonl"}], **keys})


# ---- LLaMA-Factory: the names in dataset_info.json --------------------------------------------------------------

INFO: dict[str, Any] = {
    "orca": {
        "hf_hub_url": "acme/orca-pairs",
        "subset": "en",
        "split": "train_prefs",
        "revision": "v2",
        "ranking": True,
        "num_samples": 300,
        "columns": {"prompt": "ask", "query": "", "response": "out", "chosen": "good", "system": "system_prompt"},
    },
    "thumbs": {
        "file_name": "thumbs.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "dialogue", "kto_tag": "liked"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "plain": {"file_name": "sub/plain.json", "ranking": True},
    "asked": {"file_name": "a.json", "ranking": True, "columns": {"prompt": "instruction", "query": "query"}},
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


# ---- LLaMA-Factory, both layouts --------------------------------------------------------------------------------


def test_llamafactory_dpo_and_kto(tmp_path: Path) -> None:
    dpo = recipe_of("llamafactory_qwen3_dpo", tmp_path)
    assert (dpo.method, dpo.algorithm.beta, dpo.train.batch_size, dpo.train.warmup_steps) == ("dpo", 0.1, 8, 0.1)
    assert (dpo.lora.r, dpo.lora.lora_alpha, dpo.train.save_steps, dpo.data.train[0].count) == (8, 16, 500, 1000)
    kto = recipe_of("llamafactory_llama3_kto", tmp_path)
    assert (kto.algorithm.undesirable_weight, kto.lora.target_modules) == (1.33, ["q_proj", "v_proj"])
    assert (kto.data.eval_fraction, kto.train.eval_steps, kto.train.save_total_limit) == (0.1, 500, 4)


def test_llamafactory_simpo_and_a_mixture(tmp_path: Path) -> None:
    simpo = recipe_of("llamafactory_simpo_qlora", tmp_path)
    assert simpo.algorithm.losses == [
        {"name": "simpo", "weight": 1.0, "beta": 2.0, "simpo_gamma": 1.0},
        {"name": "sft", "weight": 0.1},
    ]
    assert (simpo.model.load_in_4bit, simpo.model.bnb_4bit_use_double_quant) == (True, False)
    assert ([source.weight for source in simpo.data.train], simpo.data.system) == ([0.6, 0.4], "Answer briefly.")
    full = recipe_of("llamafactory_dpo_full", tmp_path)
    # A weight of 0.25 for BCO: the sum is divided by 1.25.
    assert [(loss["name"], loss["weight"]) for loss in full.algorithm.losses] == [("ipo", 0.8), ("bco", 0.2)]
    assert (full.lora, full.train.run_name, full.train.seed) == ("none", "full-ipo", 3)


def test_llamafactory_v1(tmp_path: Path) -> None:
    dpo = recipe_of("llamafactory_v1_dpo_lora", tmp_path)
    assert (dpo.method, dpo.algorithm.beta, dpo.train.batch_size, dpo.train.max_steps) == ("dpo", 0.2, 32, 100)
    assert (dpo.lora.r, dpo.lora.lora_alpha, dpo.lora.lora_dropout, dpo.lora.target_modules) == (
        16,
        32,
        0.05,
        "all-linear",
    )
    reward = recipe_of("llamafactory_v1_rm", tmp_path)
    assert (reward.method, reward.lora, reward.train.lr_scheduler_type) == ("reward", "none", "constant")
    orpo = recipe_of("llamafactory_v1_orpo_qlora", tmp_path)
    assert (orpo.method, orpo.algorithm.beta, orpo.algorithm.completion_only_loss) == ("orpo", 0.2, True)
    # Once in each of two epochs.
    assert (orpo.model.load_in_4bit, orpo.lora.use_rslora, orpo.train.save_steps) == (True, True, 0.5)
    assert (orpo.train.learning_rate, orpo.train.batch_size, orpo.train.seed) == (1e-4, 4, 5)


def test_llamafactory_v1_reads_its_file_of_data_sets(tmp_path: Path, recipe_from) -> None:
    sets = {
        "one": {"path": "acme/pairs", "split": "train_prefs", "converter": "pair", "size": 200},
        "two": {"path": "two.jsonl", "source": "local", "converter": "pair", "weight": 0.5},
    }
    (tmp_path / "sets.yaml").write_text(yaml.safe_dump(sets))
    recipe = recipe_from({"model": "m", "model_class": "llm", "train_dataset": "sets.yaml", "micro_batch_size": 2})
    assert recipe.method == "dpo"
    assert [(one.path, one.split, one.count) for one in recipe.data.train] == [
        ("acme/pairs", "train_prefs", 200),
        ("two.jsonl", None, 0.5),
    ]


def test_llamafactory_v1_asks_for_its_command(refusal, tmp_path: Path) -> None:
    file = {"model": "m", "model_class": "llm", "train_dataset": "a.jsonl"}
    assert "--method dpo | rm" in refusal(file)
    assert "none of LLaMA-Factory v1's" in refusal(file, "kto")
    assert "the file is for `rm`" in refusal({**file, "model_class": "cls"}, "dpo")
    (tmp_path / "sets.yaml").write_text(yaml.safe_dump({"a": {"path": "a.jsonl", "converter": "alpaca"}}))
    assert "supervised fine-tuning" in refusal({**file, "train_dataset": "sets.yaml"})


# ---- ms-swift ---------------------------------------------------------------------------------------------------


def test_swift_dpo(tmp_path: Path) -> None:
    lora = recipe_of("swift_dpo_lora", tmp_path)
    assert lora.algorithm.losses == [{"name": "dpo", "weight": 1.0, "beta": 0.1}, {"name": "sft", "weight": 0.1}]
    assert [(one.path, one.name, one.count) for one in lora.data.train] == [
        ("acme/dpo-pairs", None, 5000),
        ("acme/multi", "english", None),
        ("acme/multi", "german", None),
    ]
    assert (lora.data.eval_fraction, lora.train.eval_steps, lora.train.warmup_steps) == (0.01, 50, 0.05)
    assert (lora.lora.r, lora.lora.lora_alpha, lora.lora.lora_dropout) == (8, 32, 0)
    full = recipe_of("swift_dpo_full", tmp_path)
    assert [(loss["name"], loss["weight"]) for loss in full.algorithm.losses] == [
        ("dpo", 0.8),
        ("bco", 0.2),
        ("sft", 1),
    ]
    assert full.data.train[0].columns == {"prompt": "question", "chosen": "good", "rejected": "bad"}
    # Batches of 3 until there are 16 pairs or more; the rate of full fine-tuning.
    assert (full.train.batch_size, full.train.learning_rate, full.data.overlong) == (18, 1e-5, "truncate_prompt")


def test_swift_without_a_reference(tmp_path: Path) -> None:
    orpo = recipe_of("swift_orpo_qlora", tmp_path)
    assert (orpo.model.load_in_4bit, orpo.model.bnb_4bit_compute_dtype) == (True, "bfloat16")
    assert (orpo.data.eval[0].path, orpo.train.eval_steps, orpo.train.learning_rate) == ("held_out.jsonl", 100, 1e-4)
    simpo = recipe_of("swift_simpo", tmp_path)
    assert simpo.algorithm.losses == [
        {"name": "simpo", "weight": 1.0, "beta": 2.0, "simpo_gamma": 0.8},
        {"name": "sft", "weight": 0.5},
    ]
    cpo = recipe_of("swift_cpo", tmp_path)
    assert (cpo.algorithm.loss_type, cpo.algorithm.cpo_alpha, cpo.algorithm.beta) == ("hinge", 0.5, 0.1)
    assert cpo.lora.target_modules == "model.layers.[0-9]+.self_attn.[qv]_proj"


def test_swift_kto_and_reward_model(tmp_path: Path) -> None:
    kto = recipe_of("swift_kto", tmp_path)
    assert (kto.model.adapter, kto.lora, kto.algorithm.undesirable_weight) == ("checkpoints/sft", None, 0.33)
    assert kto.data.train[0].columns == {"prompt": "ask", "completion": "answer", "label": "liked"}
    reward = recipe_of("swift_rm", tmp_path)
    assert (reward.method, reward.algorithm.center_rewards_coefficient) == ("reward", 0.01)
    assert (reward.data.eval_fraction, reward.train.eval_steps, reward.train.save_steps) == (0.05, 200, 200)


def test_swift_grpo(tmp_path: Path) -> None:
    lora, text = recipe_of("swift_grpo_lora", tmp_path), imported("swift_grpo_lora").text
    algorithm = lora.algorithm
    assert (algorithm.beta, algorithm.temperature, algorithm.top_p, algorithm.top_k) == (0.001, 1.0, 0.95, 40)
    assert (algorithm.loss_type, algorithm.epsilon_high, algorithm.mask_truncated_completions) == ("bnpo", 0.28, True)
    assert (lora.train.batch_size, lora.data.max_length, lora.lora.lora_dropout) == (8 * 2 // 8, 512, 0.05)
    assert [(one.name, one.weight) for one in lora.rewards] == [("symbolic_equality", 1.0), ("regex", 0.2)]
    assert "soft_overlong: write it as a function" in words("swift_grpo_lora")
    assert "a name on ModelScope" in text and "a name on ModelScope" not in imported("swift_dpo_lora").text
    full = recipe_of("swift_grpo_full", tmp_path)
    assert (full.algorithm.importance_sampling_level, full.algorithm.scale_rewards) == ("sequence", "none")
    assert (full.rewards[0].model, full.train.batch_size, full.algorithm.temperature) == ("acme/reward-model", 4, 0.9)


SWIFT_FILE = {"model": "m", "dataset": "a.jsonl", "tuner_type": "lora"}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "neither `rlhf_type` nor a setting of `swift rlhf`"),
        ({"rlhf_type": "ppo"}, "GRPO does PPO's job"),
        ({"rlhf_type": "gkd"}, "`rlhf_type: gkd` has no counterpart"),
        ({"rlhf_type": "grpo", "advantage_estimator": "rloo"}, "`advantage_estimator: rloo` has no counterpart"),
        ({"rlhf_type": "grpo", "loss_type": "sapo"}, "`loss_type: sapo` has no counterpart"),
        ({"rlhf_type": "dpo", "loss_type": "kto_pair"}, "`loss_type: kto_pair` has no counterpart"),
        ({"rlhf_type": "dpo", "model": "Qwen/Qwen2.5-VL-3B-Instruct"}, "of a model of images, videos or sound"),
        ({"rlhf_type": "dpo", "model": "Qwen/Qwen2.5-Omni-7B"}, "of a model of images, videos or sound"),
        ({"rlhf_type": "dpo", "freeze_vit": False}, "`freeze_vit` is of a model of images"),
        ({"rlhf_type": "dpo", "max_pixels": 1000}, "`max_pixels` is of a model of images"),
    ],
)
def test_what_swift_trains_and_prefold_does_not(keys: dict[str, Any], said: str, refusal) -> None:
    assert said in refusal({**SWIFT_FILE, **keys})


def test_swift_trains_dpo_where_the_file_does_not_say(recipe_from, refusal) -> None:
    assert recipe_from({**SWIFT_FILE, "beta": 0.2}).method == "dpo"
    assert "the file says `rlhf_type: kto`" in refusal({**SWIFT_FILE, "rlhf_type": "kto"}, "dpo")


def test_a_file_of_json_with_tabs(tmp_path: Path) -> None:
    file = tmp_path / "args.json"
    file.write_text(json.dumps({**SWIFT_FILE, "rlhf_type": "kto", "learning_rate": 1e-05}, indent="\t"))
    result = import_recipe(str(file))
    assert result.tool == "ms-swift" and "method: kto" in result.text and "learning_rate: 1.0e-05" in result.text


def test_texts_of_swift_in_files_and_escaped(recipe_from) -> None:
    assert recipe_from({**SWIFT_FILE, "rlhf_type": "dpo", "system": "One.\\nTwo."}).data.system == "One.\nTwo."
    assert recipe_from({**SWIFT_FILE, "rlhf_type": "dpo", "system": "prompt.txt"}).data.system is None


# ---- what tools have in common ----------------------------------------------------------------------------------

HEADS: dict[str, dict[str, Any]] = {
    "TRL": {"model_name_or_path": "m", "dataset_name": "a/b", "loss_type": "ipo"},
    "Axolotl": {"base_model": "m", "datasets": [{"path": "a/b"}], "rl": "dpo"},
    "LLaMA-Factory": {"model_name_or_path": "m", "dataset": "a/b", "stage": "dpo", "template": "qwen3"},
    "LLaMA-Factory v1": {"model": "m", "train_dataset": "a/b", "pref_loss": "sigmoid"},
    "ms-swift": {**SWIFT_FILE, "rlhf_type": "dpo"},
}


@pytest.mark.parametrize("tool", ["LLaMA-Factory", "ms-swift"])
@pytest.mark.parametrize("value", [True, False])
def test_thinking_is_switched_by_the_template(tool: str, value: bool, recipe_from) -> None:
    recipe = recipe_from({**HEADS[tool], "enable_thinking": value})
    assert recipe.model.chat_template_kwargs == {"enable_thinking": value}


@pytest.mark.parametrize("tool", ["TRL", "Axolotl"])
@pytest.mark.parametrize("value", [{"enable_thinking": False}, '{"enable_thinking": false}'])
def test_keywords_of_the_template_are_carried(tool: str, value: Any, recipe_from) -> None:
    recipe = recipe_from({**HEADS[tool], "chat_template_kwargs": value})
    assert recipe.model.chat_template_kwargs == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("tool", "keys"),
    [
        ("TRL", {"use_peft": False, "load_in_4bit": True}),
        ("Axolotl", {"load_in_8bit": True}),
        ("LLaMA-Factory", {"finetuning_type": "full", "quantization_bit": 4}),
        ("LLaMA-Factory v1", {"quant_config": {"quantization_bit": 4}}),
        ("ms-swift", {"tuner_type": "full", "quant_bits": 8}),
    ],
)
def test_quantised_weights_cannot_be_trained_whole(tool: str, keys: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump({**HEADS[tool], **keys}))
    result = import_recipe(str(tmp_path / "theirs.yaml"))
    assert result.tool == tool and "lora: none" in result.text
    notes = [note for note in result.notes if note.text.startswith("all weights are trained, which quantised")]
    assert [note.group for note in notes] == ["missing"]


@pytest.mark.parametrize(("split", "kept"), [("train", None), ("train[:10]", "train[:10]")])
def test_files_have_no_splits(split: str, kept: str | None, recipe_from) -> None:
    datasets = [{"path": "a.jsonl.gz", "ds_type": "json", "split": split}, {"path": "a/b", "split": split}]
    recipe = recipe_from({**HEADS["Axolotl"], "datasets": datasets})
    assert [source.split for source in recipe.data.train] == [kept, split]


def test_columns_of_tools_and_histories(recipe_from, with_info) -> None:
    entry = {"path": "a/b", "field_tools": "functions", "field_messages": "turns", "field_history": "before"}
    recipe = recipe_from({**HEADS["Axolotl"], "datasets": [entry]})
    columns = {"tools": "functions", "messages": "turns", "history": "before"}
    assert recipe.data.train[0].columns == columns
    swift = {
        "functions": "tools",
        "before": "history",
        "worse": "rejected_messages",
        "keywords": "chat_template_kwargs",
    }
    columns = {"tools": "functions", "history": "before", "rejected": "worse", "chat_template_kwargs": "keywords"}
    assert recipe_from({**HEADS["ms-swift"], "columns": swift}).data.train[0].columns == columns
    _, recipe = with_info({"dataset": "asked"})
    assert recipe.data.train[0].columns == {"prompt": "instruction", "input": "query"}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"roles": {"user": ["human"], "assistant": ["bot"]}}, "datasets.roles bot: other names of roles"),
        ({"message_property_mappings": {"role": "speaker", "content": "content"}}, "speaker: other names of roles"),
        ({"message_field_role": "from"}, "datasets.message_field_role: recognised"),
    ],
)
def test_names_of_roles_that_are_not_recognised_are_missing(keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump({**HEADS["Axolotl"], "datasets": [{"path": "a/b", **keys}]}))
    assert said in " ".join(import_recipe(str(tmp_path / "theirs.yaml")).account.split())


@pytest.mark.parametrize(("reference", "group"), [("m", "decided"), ("other", "missing")])
def test_another_reference_than_the_model_is_said(reference: str, group: str, tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump({**HEADS["ms-swift"], "ref_model": reference}))
    notes = import_recipe(str(tmp_path / "theirs.yaml")).notes
    assert [note.group for note in notes if "ref_model" in note.keys] == [group]


def test_a_seed_of_0_is_one(tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump({**HEADS["TRL"], "data_seed": 0}))
    assert "data_seed: `train.seed` is the seed of everything" in import_recipe(str(tmp_path / "theirs.yaml")).account
