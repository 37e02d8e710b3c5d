"""ms-swift's argument files: `swift rlhf FILE`. It trains with TRL's trainers, by defaults of its own."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefold.errors import UserError
from prefold.importing.draft import Draft
from prefold.importing.losses import (
    GRPO_LOSSES,
    Loss,
    known_loss,
    supervised,
    write_dpo,
    write_losses,
    write_rewards,
)
from prefold.importing.rest import VISION, write_rest, write_template_kwargs
from prefold.importing.tables import Entry, listed, read_tool, table_of
from prefold.importing.write import (
    Tool,
    has_held_out,
    samples,
    without_dropout,
    write_all_weights,
    write_quantised,
)

KEYS = read_tool("swift")
TYPES = KEYS["types"]
MODELSCOPE = "a name on ModelScope, unless the file has `use_hf: true`: see that the Hub's is the same"


def _write_losses(draft: Draft, where: str, method: str | None) -> None:
    kind = _type(draft, where, method)
    _refuse_images(draft, where)
    settings, keys = KEYS["settings"], [*filter(draft.has, ["rlhf_type"])]
    if kind == "dpo":
        write_dpo(draft, where, settings["dpo"])
        if keys:
            draft.note("renamed", *keys, text=f"method: {draft.values['method']}")
    elif kind == "simpo" or (kind == "cpo" and draft.look("loss_type") == "simpo"):
        _write_simpo(draft, kind, keys)
    elif kind == "grpo":
        _write_grpo(draft, where, keys)
    else:
        if kind == "kto":
            known_loss(draft.look("loss_type", "kto"), {"kto": Loss("kto")}, "loss_type", where)
            keys += filter(draft.has, ["loss_type"])
        write_losses(draft, [Loss(TYPES[kind])], settings[TYPES[kind]], keys)


def _type(draft: Draft, where: str, method: str | None) -> str:
    """`rlhf_type`, which is DPO's where a file has settings that no other command has."""
    kind = draft.look("rlhf_type")
    if kind is None and method is None and any(map(draft.has, KEYS["aligns"])):
        kind = "dpo"
    if kind is None and method is None:
        what = "neither `rlhf_type` nor a setting of `swift rlhf` is in the file"
        raise supervised(what, where, ": rlhf_type: " + " | ".join(TYPES))
    if kind is not None and method not in (None, kind):
        raise UserError(
            f"`--method {method}`, and the file says `rlhf_type: {kind}`", where=where, advice="leave it out"
        )
    kind = str(kind or method)
    if kind == "ppo":
        raise UserError(
            "`rlhf_type: ppo` has no counterpart in prefold",
            where=where,
            expected=" | ".join(TYPES),
            advice="GRPO does PPO's job without a value model: `prefold recipes smolgrpo`",
        )
    known_loss(kind, dict.fromkeys(TYPES, Loss("dpo")), "rlhf_type", where)
    return kind


def _refuse_images(draft: Draft, where: str) -> None:
    name = str(draft.look("model", ""))
    asked = [key for key in KEYS["vision"] if draft.look(key)]
    asked += [key for key in ("freeze_vit", "freeze_aligner") if draft.given.get(key) is False]
    if asked or re.search(VISION, name.rpartition("/")[2].lower()):
        what = f"`{asked[0]}`" if asked else f"`model: {name}`"
        raise UserError(
            f"{what} is of a model of images, videos or sound",
            where=where,
            expected="a file for a language model: prefold trains on text alone",
        )


def _write_simpo(draft: Draft, kind: str, keys: list[str]) -> None:
    """The trainer of CPO adds the supervised loss, with weight 1 where nothing is said; its beta is CPO's own."""
    defaults = {**KEYS["loss_defaults"]["simpo"], **({"beta": 0.1} if kind == "cpo" else {})}
    alpha = draft.look("cpo_alpha", 1.0)
    losses = [Loss("simpo"), *([Loss("sft", weight=alpha)] if alpha else [])]
    keys += filter(draft.has, ["loss_type", "cpo_alpha"])
    write_losses(draft, losses, KEYS["settings"]["simpo"], keys, defaults)
    if "cpo_alpha" not in draft.given:
        draft.comments["mixed.losses"] = "the trainer adds the supervised loss unless the file has `cpo_alpha: 0`"


def _write_grpo(draft: Draft, where: str, keys: list[str]) -> None:
    known_loss(draft.look("loss_type", "grpo"), GRPO_LOSSES, "loss_type", where)
    known_loss(draft.look("advantage_estimator", "grpo"), {"grpo": Loss("grpo")}, "advantage_estimator", where)
    draft.off("advantage_estimator")
    for key in filter(draft.has, ("response_length", "max_new_tokens")):
        if not draft.has("max_completion_length"):
            draft.carry("grpo.max_completion_length", draft.take(key), key)
    # It was a yes or no once.
    if isinstance(value := draft.look("scale_rewards"), bool):
        draft.carry("grpo.scale_rewards", "group" if value else "none", "scale_rewards")
    settings = {name: key for name, key in KEYS["settings"]["grpo"].items() if f"grpo.{name}" not in draft.values}
    write_losses(draft, [Loss("grpo")], settings, keys, KEYS["loss_defaults"]["grpo"])
    given = [*filter(draft.has, ("reward_funcs", "reward_model"))]
    names, models = listed(draft.take("reward_funcs", [])), listed(draft.take("reward_model", []))
    rewards = [KEYS["rewards"].get(name) if isinstance(name, str) else None for name in names]
    lost = [str(name) for name, reward in zip(names, rewards, strict=True) if reward is None]
    rewards += [{"name": "reward_model", "model": model} for model in models]
    write_rewards(draft, rewards, given, "reward_weights")
    if lost:
        draft.note("missing", "reward_funcs", text=f"{', '.join(lost)}: write it as a function of your own")


def _write_bits(draft: Draft) -> None:
    keys = [*filter(draft.has, ("quant_method", "quant_bits"))]
    method, bits = draft.take("quant_method", "bnb"), draft.take("quant_bits")
    if method == "bnb" and bits in (4, 8):
        draft.carry(f"model.load_in_{bits}bit", True, *keys)
    elif keys:
        text = f"{method}, {bits} bits: bitsandbytes alone quantises, `model.load_in_4bit` or `model.load_in_8bit`"
        draft.note("missing", *keys, text=text)
    write_quantised(draft, "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", double=True)
    if not draft.values.get("model.load_in_4bit"):
        draft.off("bnb_4bit_compute_dtype")


def _write_model(draft: Draft) -> None:
    _write_bits(draft)
    key = "tuner_type" if draft.has("tuner_type") else "train_type"
    table, kind = table_of(KEYS["adapter"]), draft.take(key, "lora")
    draft.off("train_type")
    if kind == "full":
        draft.note("renamed", key, text="lora: none, which trains all weights")
        write_all_weights(draft, table)
        draft.off("target_regex", "adapters")
        return
    if kind != "lora":
        draft.note("missing", key, text=f"{kind}: LoRA is trained instead")
    elif key in draft.given:
        draft.note("renamed", key, text="a section `lora`")
    if draft.has("adapters"):
        _write_start(draft)
        return
    if draft.has("target_regex"):
        draft.carry("lora.target_modules", draft.take("target_regex"), "target_regex")
        draft.off("target_modules")
    draft.follow(table)
    for field, value in {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}.items():
        draft.fill(f"lora.{field}", value)
    if not samples(draft):
        without_dropout(draft, "TRL's trainer")


def _write_start(draft: Draft) -> None:
    """Adapters to go on from, of which there can be one; it brings its own settings."""
    first, *others = listed(draft.take("adapters"))
    draft.carry("model.adapter", first, "adapters", comment="it brings its own LoRA settings")
    if others:
        text = f"{', '.join(map(str, others))}: one adapter only; merge the others into the model first"
        draft.note("missing", "adapters", text=text)
    if draft.has("ref_adapters") and listed(draft.look("ref_adapters")) == [first]:
        draft.note("decided", "ref_adapters", text="a frozen copy of `model.adapter` is the reference")
    for key in [*filter(draft.has, table_of(KEYS["adapter"])), *filter(draft.has, ["target_regex"])]:
        draft.note("decided", key, text="the adapter brings its own")


def _write_data(draft: Draft) -> None:
    """Longer rows are left out unless the file has them cut."""
    columns = _columns(draft)
    weights = listed(draft.take("interleave_prob", []))
    for key, field in {"dataset": "data.train", "val_dataset": "data.eval"}.items():
        if not draft.has(key):
            continue
        names = [str(name) for name in listed(draft.take(key))]
        sources = [source | ({"columns": columns} if columns else {}) for name in names for source in _sources(name)]
        for source, weight in zip(sources, weights, strict=False):
            source.pop("count", None)
            source["weight"] = weight
        there = any(_is_hub_id(source["path"]) for source in sources) and not draft.look("use_hf")
        draft.carry(field, sources, key, comment=MODELSCOPE if there else "")
    if weights:
        draft.note("renamed", "interleave_prob", text="`weight` of each source")
    if _is_hub_id(str(draft.look("model", ""))) and not draft.look("use_hf"):
        draft.comments["model.name"] = MODELSCOPE
    _write_lengths(draft)
    _write_batch(draft)
    system = draft.take("system")
    if isinstance(system, str) and system.endswith(".txt"):
        draft.note("missing", "system", text=f"write the text of {system} into `data.system`")
    elif system is not None:
        draft.carry("data.system", str(system).replace("\\n", "\n"), "system")
    if (thinking := draft.take("enable_thinking")) is not None:
        write_template_kwargs(draft, "enable_thinking", {"enable_thinking": thinking})
    if (thinking := draft.take("preserve_thinking")) is not None:
        draft.note("missing", "preserve_thinking", text="`model.chat_template_kwargs` takes what the template knows")


def _columns(draft: Draft) -> dict[str, str]:
    """Columns by the roles that they have, from `{column: name}`, which may be JSON."""
    if not draft.has("columns"):
        return {}
    value = draft.take("columns")
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, Mapping):
        draft.note("missing", "columns", text="not a mapping; write `columns` into the sources")
        return {}
    roles = {**KEYS["columns"], **({"response": "completion"} if draft.values["method"] == "kto" else {})}
    columns = {roles[name]: column for column, name in value.items() if name in roles}
    if columns:
        draft.note("renamed", "columns", text="`columns` of each source")
    if lost := [f"{column}: {name}" for column, name in value.items() if name not in roles]:
        draft.note("missing", "columns", text=f"{', '.join(lost)}: a source has no such role")
    return columns


def _sources(text: str) -> list[dict[str, Any]]:
    """What `hub::name:subset/subset#count` stands for."""
    name, _, count = text.partition("#")
    name = re.sub("^(hf|ms)::", "", name, flags=re.IGNORECASE)
    name, _, subsets = name.partition(":") if not Path(name).exists() else (name, "", "")
    number = {"count": int(count)} if count.isdigit() and int(count) else {}
    return [{"path": name, **({"name": subset} if subset else {}), **number} for subset in subsets.split("/")]


def _is_hub_id(name: str) -> bool:
    is_file = Path(name).suffix in (".jsonl", ".json", ".csv", ".parquet", ".txt") or Path(name).exists()
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not is_file


def _write_lengths(draft: Draft) -> None:
    if not draft.has("max_length"):
        draft.carry("data.max_length", 4096, comment="to set: the file has the model's own limit")
    choices = {"delete": "drop", "left": "truncate_prompt"}
    cut = str(draft.take("truncation_strategy", "left" if samples(draft) else "delete"))
    if "truncation_strategy" in draft.given and cut in choices:
        draft.carry("data.overlong", choices[cut], "truncation_strategy")
    elif cut in choices:
        draft.fill("data.overlong", choices[cut])
    else:
        draft.note("missing", "truncation_strategy", text=f"{cut}: answers are never cut; see `data.overlong`")


def _write_batch(draft: Draft) -> None:
    """Where the file says nothing, gradients are accumulated until a step has 16 pairs or more."""
    device = draft.look("per_device_train_batch_size", 1)
    if samples(draft) or "gradient_accumulation_steps" in draft.given or not isinstance(device, int) or device < 1:
        return
    comment = "a multiple of the batch of a device, 16 or more; the tool's own choice on one device"
    given = [*filter(draft.has, ["per_device_train_batch_size"])]
    draft.carry("train.batch_size", device * math.ceil(16 / device), *given, comment=comment)


def _write_steps(draft: Draft) -> None:
    """The rate, which hangs on how the model is trained, and when held-out data is measured."""
    if not draft.has("learning_rate"):
        draft.fill("train.learning_rate", 1e-5 if draft.values.get("lora") == "none" else 1e-4)
    if has_held_out(draft) and not samples(draft) and not draft.has("eval_strategy"):
        if draft.has("eval_steps"):
            draft.follow({"eval_steps": Entry("field", "train.eval_steps")})
        elif draft.look("save_strategy", "steps") == "steps":
            draft.fill("train.eval_steps", draft.look("save_steps", 500), "as often as checkpoints")
    write_rest(draft, KEYS)


SWIFT = Tool(KEYS, _write_losses, _write_model, _write_data, _write_steps)
