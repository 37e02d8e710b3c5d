"""Every key, loss and default of the installed TRL, by its own configurations."""

from __future__ import annotations

import types
from dataclasses import MISSING, Field, fields
from typing import Any, Union, get_args, get_origin

import pytest
import yaml
from transformers import TrainingArguments
from trl import (
    DatasetMixtureConfig,
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    ModelConfig,
    RewardConfig,
    RLOOConfig,
    ScriptArguments,
    SFTConfig,
)
from trl.experimental.cpo import CPOConfig
from trl.experimental.orpo import ORPOConfig
from trl.scripts.grpo import GRPOScriptArguments
from trl.scripts.rloo import RLOOScriptArguments
from trl.scripts.utils import DatasetConfig

from prefold.errors import UserError
from prefold.importing import import_recipe
from prefold.importing.tables import read_tool
from prefold.recipe import load_recipe, parse_yaml

COMMON = (ModelConfig, DatasetMixtureConfig)
CONFIGS: dict[str, tuple[Any, ...]] = {
    "dpo": (DPOConfig, ScriptArguments),
    "orpo": (ORPOConfig, ScriptArguments),
    "cpo": (CPOConfig, ScriptArguments),
    "kto": (KTOConfig, ScriptArguments),
    "reward": (RewardConfig, ScriptArguments),
    "grpo": (GRPOConfig, GRPOScriptArguments),
}
OTHERS = {"rloo": (RLOOConfig, RLOOScriptArguments), "sft": (SFTConfig,)}
BASE: dict[str, Any] = {"model_name_or_path": "m", "dataset_name": "a.jsonl"}
VALUES: dict[str, Any] = {
    "loss_type": None,
    "dtype": "bfloat16",
    "loss_weights": [1.0],
    "datasets": [{"path": "a.jsonl"}],
    "report_to": ["wandb", "trackio"],
    "optim": "adamw_torch_fused",
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "f_divergence_type": "js_divergence",
    "reward_funcs": ["think_format_reward"],
    "reward_weights": [0.5],
    "delta": 4.0,
    "scale_rewards": "batch",
    "importance_sampling_level": "sequence",
    "alpha": 0.0,
    "metric_for_best_model": "loss",
    "eval_strategy": "steps",
    "lora_task_type": "CAUSAL_LM",
    "bnb_4bit_quant_type": "fp4",
    "top_p": 0.9,
    "min_p": 0.1,
    "ld_alpha": 0.5,
    "label_smoothing": 0.1,
    "multi_objective_aggregation": "normalize_then_sum",
}
"""Where a value made of the type would be no value."""


def value_of(field: Field[Any]) -> Any:
    """Another value than the default."""
    if field.name in VALUES:
        return VALUES[field.name]
    default = field.default if field.default is not MISSING else None
    kinds = get_args(field.type) if get_origin(field.type) in (Union, types.UnionType) else (field.type,)
    kind = next((get_origin(kind) or kind for kind in kinds if kind is not type(None)), str)
    if isinstance(default, bool) or kind is bool:
        return not default
    made = {int: (default or 2) + 1, float: 0.5, list: ["x"], dict: {"a": 1}} if not isinstance(default, str) else {}
    return made.get(kind, "x")


@pytest.fixture
def imported(tmp_path):
    file = tmp_path / "theirs.yaml"

    def made(values: dict[str, Any], method: str | None = None):
        file.write_text(yaml.safe_dump(values))
        return import_recipe(str(file), method)

    return made


@pytest.mark.parametrize("method", CONFIGS)
def test_every_key_is_carried_over_or_named_with_the_reason(method: str, imported) -> None:
    known = {field.name: field for config in (*CONFIGS[method], *COMMON) for field in fields(config)}
    assert len(known) > 120
    for name, field in known.items():
        result = imported({**BASE, "use_peft": True, "push_to_hub": True, name: value_of(field)}, method)
        notes = [note for note in result.notes if name in note.keys]
        assert notes, name
        assert not [note for note in notes if note.group == "unknown"], name
        assert all(note.text or note.group in ("same", "off") for note in notes), name


@pytest.mark.parametrize("method", CONFIGS)
def test_all_keys_at_once_at_their_defaults(method: str, imported, tmp_path) -> None:
    values = {}
    for config in (*COMMON, *CONFIGS[method]):
        for field in fields(config):
            if field.default is not MISSING and isinstance(field.default, bool | int | float | str):
                values[field.name] = field.default
    result = imported({**values, **BASE, "output_dir": "runs/x"}, method)
    assert not [note for note in result.notes if note.group == "unknown"]
    (tmp_path / "ours.yaml").write_text(result.text)
    assert load_recipe(str(tmp_path / "ours.yaml")).method == method


def test_the_clipping_and_the_advantages_of_grpo(imported, tmp_path) -> None:
    given = {"delta": 4.0, "multi_objective_aggregation": "normalize_then_sum"}
    (tmp_path / "ours.yaml").write_text(imported({**BASE, **given}, "grpo").text)
    algorithm: Any = load_recipe(str(tmp_path / "ours.yaml")).algorithm
    assert {name: getattr(algorithm, name) for name in given} == given


def test_every_key_of_a_data_set_in_a_list(imported) -> None:
    entry = {"path": "json", "name": "n", "data_dir": "d", "split": "train", "columns": ["prompt"], "fraction": 0.5}
    assert {field.name for field in fields(DatasetConfig)} - {*entry} == {"data_files"}
    notes = imported({"model_name_or_path": "m", "loss_type": "ipo", "datasets": [entry]}).notes
    assert {f"datasets.{key}" for key in entry} <= {key for note in notes for key in note.keys}


DEFAULTS = {
    "learning_rate": "train.learning_rate",
    "num_train_epochs": "train.num_train_epochs",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "adam_beta2": "train.adam_beta2",
    "beta": "beta",
    "max_length": "data.max_length",
    "desirable_weight": "desirable_weight",
    "center_rewards_coefficient": "center_rewards_coefficient",
    "cpo_alpha": "cpo_alpha",
    "num_generations": "num_generations",
    "max_completion_length": "max_completion_length",
    "temperature": "temperature",
    "epsilon": "epsilon",
    "scale_rewards": "scale_rewards",
    "use_bias_correction_kl": "use_bias_correction_kl",
    "importance_sampling_level": "importance_sampling_level",
    "top_k": "top_k",
}


@pytest.mark.parametrize("method", CONFIGS)
def test_defaults_are_trls(method: str, imported, tmp_path) -> None:
    (tmp_path / "ours.yaml").write_text(imported(BASE, method).text)
    recipe = load_recipe(str(tmp_path / "ours.yaml"))
    config = CONFIGS[method][0]
    known = {field.name: field.default for field in fields(config)}
    for name, path in DEFAULTS.items():
        if name not in known or (name, method) in (("max_length", "grpo"), ("max_completion_length", "orpo")):
            continue
        section, _, field = path.rpartition(".")
        owner = getattr(recipe, section) if section else recipe.algorithm
        if hasattr(owner, field):
            assert getattr(owner, field) == known[name], name


def test_the_keys_that_tell_commands_apart_are_trls() -> None:
    """A command that has a key is among those that the key leaves; older releases had some keys in further ones."""
    table = read_tool("trl")["told_by_keys"]
    told = {key: {*names.split()} for names, keys in table.items() for key in keys}
    shared = {field.name for config in (TrainingArguments, ModelConfig) for field in fields(config)}
    for command, configs in (CONFIGS | OTHERS).items():
        own = {field.name for config in configs for field in fields(config)} - shared
        assert own, command
        assert not [key for key in own & set(told) if command not in told[key]], command


@pytest.mark.parametrize(
    ("method", "losses", "refused"),
    [
        ("dpo", "sigmoid sigmoid_norm hinge ipo robust exo_pair nca_pair bco_pair sppo_hard aot aot_unpaired", ""),
        ("dpo", "apo_zero apo_down discopop sft", ""),
        ("cpo", "sigmoid hinge ipo simpo", "alphapo"),
        ("kto", "kto", "apo_zero_unpaired"),
        ("grpo", "grpo bnpo dr_grpo dapo cispo", "sapo luspo vespo"),
    ],
)
def test_losses_without_a_counterpart_are_refused_by_name(method: str, losses: str, refused: str, imported) -> None:
    text = "".join(str(field.metadata) for field in fields(CONFIGS[method][0]) if field.name == "loss_type")
    for loss in losses.split():
        assert f"'{loss}'" in text
        imported({**BASE, "loss_type": loss}, method)
    for loss in refused.split():
        assert f"'{loss}'" in text
        with pytest.raises(UserError, match=f"`loss_type: {loss}` has no counterpart"):
            imported({**BASE, "loss_type": loss})


def test_alphapo_by_its_own_key_is_refused(imported) -> None:
    with pytest.raises(UserError, match=r"`alpha: 0\.25` has no counterpart"):
        imported({**BASE, "loss_type": "simpo", "alpha": 0.25})


@pytest.mark.parametrize(
    ("keys", "trainer"),
    [
        ({"num_generations": 4, "normalize_advantages": True}, "rloo"),
        ({"teacher_model_name_or_path": "m", "lmbda": 0.5}, "distillation"),
        ({"reward_model_path": "m"}, "online_dpo"),
    ],
)
def test_trainers_without_a_counterpart_are_refused_by_name(keys: dict[str, Any], trainer: str, imported) -> None:
    with pytest.raises(UserError, match=f"`{trainer}` trainer, which has no counterpart"):
        imported({**BASE, **keys})


def test_dropout_is_kept_where_the_file_says_so(imported) -> None:
    values = {**BASE, "loss_type": "ipo", "use_peft": True, "lora_dropout": 0.1, "disable_dropout": False}
    result = imported(values)
    assert parse_yaml(result.text, "x")["lora"]["lora_dropout"] == 0.1
    assert "disable_dropout" in result.account
