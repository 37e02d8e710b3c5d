"""Adapters from a folder: one that training goes on with, one that is merged; and what training starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import PreTrainedModel

from prefold.errors import UserError
from prefold.files import without_home
from prefold.models.chat_format import vocabulary_rows
from prefold.models.load import UNREADABLE, add_lora, chat_tokens, first_line, load_model, quiet, ready_to_train
from prefold.recipe import Lora, Model
from prefold.trees.head import SCORE, score_layer
from prefold.trees.scorer import freeze_reference

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def load_policy(
    section: Model, lora: Lora | None, seed: int, head_seed: int | None = None, sharded: bool = False
) -> PeftModel:
    """The model to train: quantised if the section says so, with fresh LoRA weights or the adapter that it names.

    Args:
        lora: None beside `model.adapter`, which brings its own settings.
        head_seed: see `load_model`.
        sharded: as `load_model`; the LoRA weights are whole in every process.
    """
    model = load_model(section, quantised=True, head_seed=head_seed, sharded=sharded)
    if section.adapter is None:
        return add_lora(model, lora or Lora(), seed, chat_tokens(section))
    policy = open_adapter(model, Path(section.adapter).expanduser(), is_trainable=True)
    ready_to_train(policy)
    freeze_reference(policy)
    return policy


def load_start(section: Model, *, dtype: str | None = None) -> PreTrainedModel:
    """The unquantised model that training starts from: the base, with the adapter that the section names merged in."""
    model = load_model(section, dtype=dtype)
    if section.adapter is None:
        return model
    with quiet():
        merged = cast(Any, open_adapter(model, Path(section.adapter).expanduser())).merge_and_unload()
    return cast(PreTrainedModel, merged.eval())


def open_adapter(model: PreTrainedModel, folder: Path, *, is_trainable: bool = False) -> PeftModel:
    """Put the LoRA adapter of a folder on its base.

    Raises:
        UserError: there is none, it is not LoRA as safetensors, it was made for another base, or has no score head for
            a model that scores conversations.
    """
    where = without_home(str(folder))
    config = _config_of(folder, where)
    _require_same_base(config, model, where)
    if score_layer(model) is not None and SCORE not in (config.get("modules_to_save") or ()):
        advice = "merge it, and train a reward model on the merged model"
        raise UserError("has no score head", where=where, expected="an adapter of a reward model", advice=advice)
    try:
        with quiet():
            adapted = PeftModel.from_pretrained(
                model, str(folder), is_trainable=is_trainable, torch_device=str(model.device)
            )
            wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    except (*UNREADABLE, AttributeError) as error:
        raise _does_not_fit(first_line(error), model, where) from None
    with safe_open(folder / WEIGHTS, "pt") as file:
        stored = set(file.keys())
    if missing := wanted - stored:
        raise _does_not_fit(f"it lacks {len(missing)} tensors, e.g. {min(missing)}", model, where)
    if unknown := stored - wanted:
        raise _does_not_fit(f"it holds {len(unknown)} tensors without a place, e.g. {min(unknown)}", model, where)
    return adapted


def _config_of(folder: Path, where: str) -> dict[str, Any]:
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        missing = CONFIG if not (folder / CONFIG).is_file() else WEIGHTS
        what = f"is not an adapter folder: {missing} is missing"
        raise UserError(what, where=where, expected=f"{CONFIG} and {WEIGHTS}, e.g. a run's `adapter/`")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (ValueError, KeyError, TypeError):
        expected = "what peft's `save_pretrained` writes"
        raise UserError(f"{CONFIG} cannot be read", where=where, expected=expected) from None
    if kind != "LORA":
        raise UserError(f"is an adapter of kind {kind}", where=where, expected="a LoRA adapter")
    return cast("dict[str, Any]", config)


def _require_same_base(config: dict[str, Any], model: PreTrainedModel, where: str) -> None:
    """By name, wherever the two lie; and the tokens that the adapter trains are in the vocabulary."""
    named = str(config.get("base_model_name_or_path") or "").rstrip("/")
    if named and Path(named).name.lower() != Path(str(model.name_or_path)).name.lower():
        raise UserError(
            f"is an adapter of `{without_home(named)}`, not of `{model.name_or_path}`",
            where=where,
            advice=f"name its base in `model.name`; if the two are one, mend `base_model_name_or_path` in {CONFIG}",
        )
    tokens = config.get("trainable_token_indices") or []
    largest = max((max(ids) for ids in (tokens.values() if isinstance(tokens, dict) else [tokens]) if ids), default=0)
    if largest >= vocabulary_rows(model):
        raise UserError(
            f"trains token {largest}, which the vocabulary of the model does not have",
            where=where,
            advice="set `model.chat_template` as it was when the adapter was made",
        )


def _does_not_fit(reason: str, model: PreTrainedModel, where: str) -> UserError:
    what = f"does not fit the model `{model.name_or_path}`: {reason}"
    return UserError(what, where=where, expected="an adapter that was trained on this model")
