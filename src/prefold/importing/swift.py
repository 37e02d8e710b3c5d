"""ms-swift's argument files: `swift rlhf FILE`. It trains with TRL's trainers, with its own defaults."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefold.errors import UserError
from prefold.importing.draft import Draft
from prefold.importing.losses import Loss, known, require_method, supervised, write_command
from prefold.importing.sources import carry_sources, is_file, take_weights, weigh
from prefold.importing.tables import NoCounterpartError, listed, mapping, read_tool
from prefold.importing.write import Tool, has_held_out, samples

KEYS = read_tool("swift")
MODELSCOPE = "a name on ModelScope, unless the file has `use_hf: true`: see that the Hub's is the same"


def _write_losses(draft: Draft, where: str, method: str | None) -> None:
    command = known(_type(draft, where, method), KEYS["commands"], "rlhf_type", where)
    _refuse_images(draft, where)
    if command == "grpo":
        known(draft.look("advantage_estimator", "grpo"), {"grpo": Loss("grpo")}, "advantage_estimator", where)
        draft.off("advantage_estimator")
        for key in filter(draft.has, ("response_length", "max_new_tokens")):
            if not draft.has("max_completion_length"):
                draft.carry("grpo.max_completion_length", draft.take(key), key)
    write_command(draft, where, command, KEYS, ["rlhf_type"])


def _type(draft: Draft, where: str, method: str | None) -> str:
    """The file's `rlhf_type`, else `method`; without both `dpo`, if a setting rules out supervised fine-tuning."""
    kind = draft.look("rlhf_type")
    if kind is None and method is None:
        if any(map(draft.has, KEYS["aligns"])):
            return "dpo"
        what = "neither `rlhf_type` nor a setting of `swift rlhf` is in the file"
        raise supervised(what, where, ": rlhf_type: " + " | ".join(KEYS["commands"]))
    if kind is not None:
        require_method(method, kind, "rlhf_type", where)
    return str(kind or method)


def _refuse_images(draft: Draft, where: str) -> None:
    name = str(draft.look("model", ""))
    asked = [key for key in KEYS["vision"] if draft.look(key)]
    asked += [key for key in KEYS["vision_if_false"] if draft.given.get(key) is False]
    if asked or re.search(KEYS["vision_names"], name.rpartition("/")[2].lower()):
        what = f"`{asked[0]}`" if asked else f"`model: {name}`"
        raise UserError(
            f"{what} is of a model of images, videos or sound",
            where=where,
            expected="a file for a language model: prefold trains on text alone",
        )


def _write_data(draft: Draft, where: str) -> None:
    """Sources, and what becomes of rows that are too long: unless the file says, prompts are cut if the method samples,
    else rows are dropped."""
    columns, weights = _columns(draft), take_weights(draft, "interleave_prob")
    for key, field in {"dataset": "data.train", "val_dataset": "data.eval"}.items():
        if not draft.has(key):
            continue
        sources = [source for name in listed(draft.take(key)) for source in _sources(str(name), columns)]
        weigh(sources, weights)
        is_elsewhere = any(map(_is_hub_id, (source["path"] for source in sources))) and not draft.look("use_hf")
        carry_sources(draft, key, field, sources, comment=MODELSCOPE if is_elsewhere else "")
    if _is_hub_id(str(draft.look("model", ""))) and not draft.look("use_hf"):
        draft.comments["model.name"] = MODELSCOPE
    if draft.has("ref_model") and draft.look("ref_model") == draft.look("model"):
        draft.note("decided", "ref_model", text="the model before training is the reference")
    if draft.has("ref_adapters") and listed(draft.look("ref_adapters")) == [draft.values.get("model.adapter")]:
        draft.note("decided", "ref_adapters", text="a frozen copy of `model.adapter` is the reference")
    if not draft.has("max_length"):
        draft.carry("data.max_length", 4096, comment="to set: the file has the model's own limit")
    if not draft.has("truncation_strategy"):
        draft.fill("data.overlong", "truncate_prompt" if samples(draft) else "drop")
    _write_batch(draft)
    system = draft.take("system")
    if isinstance(system, str) and system.endswith(".txt"):
        draft.note("missing", "system", text=f"write the text of {system} into `data.system`")
    elif system is not None:
        draft.carry("data.system", str(system).replace("\\n", "\n"), "system")


def _columns(draft: Draft) -> dict[str, str]:
    """Columns by role, from `{column: name}`, which may be JSON."""
    if not draft.has("columns"):
        return {}
    try:
        value = mapping(draft.take("columns"))
    except NoCounterpartError as reason:
        draft.note("missing", "columns", text=str(reason))
        return {}
    roles = {**KEYS["columns"], **({"response": "completion"} if draft.values["method"] == "kto" else {})}
    columns = {roles[name]: column for column, name in value.items() if name in roles}
    if columns:
        draft.note("renamed", "columns", text="`columns` of each source")
    if lost := [f"{column}: {name}" for column, name in value.items() if name not in roles]:
        draft.note("missing", "columns", text=f"{', '.join(lost)}: a source has no such role")
    return columns


def _sources(text: str, columns: Mapping[str, str]) -> list[dict[str, Any]]:
    """The sources that `hub::name:subset/subset#count` means, one for each subset."""
    name, _, count = text.partition("#")
    name = re.sub("^(hf|ms)::", "", name, flags=re.IGNORECASE)
    name, _, subsets = name.partition(":") if not Path(name).exists() else (name, "", "")
    more: dict[str, Any] = {"count": int(count)} if count.isdigit() and int(count) else {}
    more |= {"columns": dict(columns)} if columns else {}
    return [{"path": name, **({"name": subset} if subset else {}), **more} for subset in subsets.split("/")]


def _is_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not is_file(name)


def _write_batch(draft: Draft) -> None:
    """The default batch: gradients are accumulated until a step has 16 pairs or more."""
    device = draft.look("per_device_train_batch_size", 1)
    if samples(draft) or "gradient_accumulation_steps" in draft.given or not isinstance(device, int) or device < 1:
        return
    comment = "a multiple of the batch of a device, 16 or more; the tool's own choice on one device"
    given = [*filter(draft.has, ["per_device_train_batch_size"])]
    draft.carry("train.batch_size", device * math.ceil(16 / device), *given, comment=comment)


def _write_steps(draft: Draft) -> None:
    """The default learning rate, which depends on LoRA, and how often held-out data is measured."""
    if not draft.has("learning_rate"):
        draft.fill("train.learning_rate", 1e-5 if draft.values.get("lora") == "none" else 1e-4)
    measures = has_held_out(draft) and not samples(draft) and not any(map(draft.has, ("eval_strategy", "eval_steps")))
    if measures and draft.look("save_strategy", "steps") == "steps":
        draft.fill("train.eval_steps", draft.look("save_steps", 500), "as often as checkpoints")


SWIFT = Tool(KEYS, _write_losses, _write_data, _write_steps)
