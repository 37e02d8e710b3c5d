"""What the import takes for TRL's names and defaults is what the installed TRL has."""

from __future__ import annotations

import dataclasses
from typing import Any

from trl import DPOConfig, GRPOConfig, KTOConfig, ModelConfig, RewardConfig, ScriptArguments

from prefold.importing import losses, trl
from prefold.importing.draft import Draft
from prefold.importing.write import write


def default(config: Any, name: str) -> Any:
    return next(field for field in dataclasses.fields(config) if field.name == name).default


def test_the_defaults_are_those_of_the_installed_trl() -> None:
    for config in (DPOConfig, GRPOConfig, KTOConfig):
        assert default(config, "learning_rate") == 1e-6
    assert default(RewardConfig, "learning_rate") == trl.KEYS["method_defaults"]["reward"]["train.learning_rate"]
    for name in ("num_train_epochs", "lr_scheduler_type", "warmup_steps", "gradient_checkpointing"):
        assert default(DPOConfig, name) == trl.KEYS["defaults"][f"train.{name}"]
    assert [default(ModelConfig, f"lora_{name}") for name in ("r", "alpha", "dropout")] == [16, 32, 0.05]
    assert default(DPOConfig, "per_device_train_batch_size") == 8
    assert (default(DPOConfig, "beta"), default(KTOConfig, "beta"), default(GRPOConfig, "beta")) == (0.1, 0.1, 0.0)
    assert default(GRPOConfig, "max_completion_length") == 512
    assert (default(DPOConfig, "disable_dropout"), default(GRPOConfig, "disable_dropout")) == (True, False)


def test_every_key_of_the_installed_trl_is_known_or_of_the_trainer_it_extends() -> None:
    own = {name for config in (DPOConfig, ModelConfig, ScriptArguments) for name in config.__annotations__}
    values = dict.fromkeys(own, "1") | {"dataset_name": "a.jsonl", "loss_type": ["sigmoid"], "use_peft": True}
    draft = Draft("TRL", values)
    write(draft, trl.TRL, "x", "dpo")
    draft.finish()
    assert [note.keys for note in draft.notes if note.group == "unknown"] == []


def test_the_losses_are_those_of_the_installed_trl() -> None:
    named = next(field for field in dataclasses.fields(DPOConfig) if field.name == "loss_type").metadata["help"]
    assert all(f"'{name}'" in named for name in losses.LOSSES["dpo"] if name != "aot_pair")
