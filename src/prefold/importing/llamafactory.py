"""LLaMA-Factory's configurations. It trains with transformers' trainer, whose defaults hold for what it has from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefold.errors import UserError
from prefold.importing.draft import Draft
from prefold.importing.llamafactory_data import write_data
from prefold.importing.losses import Loss, add_supervised, known_loss, supervised, write_losses
from prefold.importing.rest import write_rest, write_template_kwargs
from prefold.importing.tables import Table, is_number, listed, read_tool, table_of
from prefold.importing.write import Tool, without_dropout, write_all_weights, write_quantised

KEYS = read_tool("llamafactory")
STAGES = {"dpo": "dpo", "kto": "kto", "rm": "reward"}
LOSSES = {name: Loss(**entry) for name, entry in KEYS["losses"].items()}


def _write_losses(draft: Draft, where: str, method: str | None) -> None:
    chosen = STAGES[_stage(draft, where, method)]
    write_data(draft, where)
    write_stage(draft, where, chosen, ["stage"], KEYS["settings"])


def write_stage(draft: Draft, where: str, chosen: str, keys: list[str], settings: Mapping[str, Any]) -> None:
    """The losses of a stage; `keys`: those that chose it."""
    if chosen != "dpo":
        write_losses(draft, [Loss(chosen)], settings[chosen], keys)
        return
    loss = known_loss(draft.look("pref_loss", "sigmoid"), LOSSES, "pref_loss", where)
    losses, keys = [loss], [*keys, *filter(draft.has, ["pref_loss"])]
    # With BCO beside it, their sum is divided by the sum of their weights.
    if is_number(part := draft.look("pref_bco_weight", 0)) and part > 0:
        losses = [Loss(loss.method, loss.settings, 1 / (1 + part)), Loss("bco", weight=part / (1 + part))]
        keys.append("pref_bco_weight")
    draft.off(*{"pref_bco_weight"} - {*keys})
    keys += add_supervised(draft, losses, "pref_ftx")
    write_losses(draft, losses, settings["dpo"], keys)


def _stage(draft: Draft, where: str, method: str | None) -> str:
    stage = str(draft.take("stage", "sft"))
    if stage in ("pt", "sft"):
        what = f"a file for {'pre-training' if stage == 'pt' else 'supervised fine-tuning'}, `stage: {stage}`"
        raise supervised(what, where, ": stage: " + " | ".join(STAGES))
    if stage not in STAGES:
        hint = "GRPO does PPO's job without a value model: `prefold recipes smolgrpo`" if stage == "ppo" else ""
        raise UserError(
            f"`stage: {stage}` has no counterpart in prefold", where=where, expected=" | ".join(STAGES), advice=hint
        )
    if method not in (None, stage):
        raise UserError(f"`--method {method}`, and the file says `stage: {stage}`", where=where, advice="leave it out")
    return stage


def _write_model(draft: Draft) -> None:
    bits = draft.take("quantization_bit")
    if bits in (4, 8):
        draft.carry(f"model.load_in_{bits}bit", True, "quantization_bit")
    elif bits is not None:
        draft.note("missing", "quantization_bit", text=f"{bits}: weights are held in 4 or 8 bits, or as they are")
    write_quantised(draft, "quantization_type", "double_quantization", double=True)
    table, kind = table_of(KEYS["adapter"]), draft.take("finetuning_type", "lora")
    if kind == "full":
        draft.note("renamed", "finetuning_type", text="lora: none, which trains all weights")
        write_all_weights(draft, table)
        return
    if kind != "lora":
        draft.note("missing", "finetuning_type", text=f"{kind}: LoRA is trained instead")
    elif "finetuning_type" in draft.given:
        draft.note("renamed", "finetuning_type", text="a section `lora`")
    if draft.has("adapter_name_or_path"):
        _write_start(draft, table)
        return
    draft.follow(table)
    draft.fill("lora.r", 8)
    if is_number(rank := draft.values["lora.r"]):
        draft.fill("lora.lora_alpha", 2 * rank, "twice the rank")
    draft.fill("lora.lora_dropout", 0.0)
    draft.fill("lora.target_modules", "all-linear")
    if draft.values["method"] != "reward":
        without_dropout(draft, draft.tool)


def _write_start(draft: Draft, table: Table) -> None:
    """An adapter to go on from brings its own settings."""
    first, *others = listed(draft.take("adapter_name_or_path"))
    draft.carry("model.adapter", first, "adapter_name_or_path", comment="it brings its own LoRA settings")
    if others:
        text = f"{', '.join(map(str, others))}: one adapter only; merge the others into the model first"
        draft.note("missing", "adapter_name_or_path", text=text)
    for key in filter(draft.has, table):
        draft.note("decided", key, text="the adapter brings its own")


def _write_more(draft: Draft) -> None:
    thinking = draft.take("enable_thinking")
    if thinking is not None:
        write_template_kwargs(draft, "enable_thinking", {"enable_thinking": thinking})
    write_rest(draft, KEYS)


LLAMAFACTORY = Tool(KEYS, _write_losses, _write_model, lambda draft: None, _write_more)
