"""LLaMA-Factory's configurations. It trains with transformers' trainer, whose defaults hold for the shared keys."""

from __future__ import annotations

from collections.abc import Mapping

from prefold.importing.draft import Draft
from prefold.importing.llamafactory_data import write_data
from prefold.importing.losses import (
    Loss,
    add_supervised,
    known,
    losses_of,
    require_method,
    supervised,
    write_losses,
)
from prefold.importing.tables import is_number, read_tool
from prefold.importing.write import Tool

KEYS = read_tool("llamafactory")
LOSSES = losses_of(KEYS["losses"])


def _write_losses(draft: Draft, where: str, method: str | None) -> None:
    stage = str(draft.take("stage", "sft"))
    if stage in ("pt", "sft"):
        what = f"a file for {'pre-training' if stage == 'pt' else 'supervised fine-tuning'}, `stage: {stage}`"
        raise supervised(what, where, ": stage: " + " | ".join(KEYS["commands"]))
    command = known(stage, KEYS["commands"], "stage", where)
    require_method(method, stage, "stage", where)
    write_stage(draft, where, command, ["stage"], KEYS["settings"])


def write_stage(
    draft: Draft, where: str, command: str, keys: list[str], settings: Mapping[str, Mapping[str, str]]
) -> None:
    """Set the losses of a stage; `keys`: those that chose the stage."""
    if command != "dpo":
        write_losses(draft, [Loss(command)], settings[command], keys)
        return
    loss = known(draft.look("pref_loss", "sigmoid"), LOSSES, "pref_loss", where)
    losses, keys = [loss], [*keys, *filter(draft.has, ["pref_loss"])]
    # With BCO beside it, the weighted sum of the two is divided by the sum of their weights.
    if is_number(part := draft.look("pref_bco_weight", 0)) and part > 0:
        losses = [Loss(loss.method, loss.settings, 1 / (1 + part)), Loss("bco", weight=part / (1 + part))]
        keys.append("pref_bco_weight")
    else:
        draft.off("pref_bco_weight")
    keys += add_supervised(draft, losses, "pref_ftx")
    write_losses(draft, losses, settings["dpo"], keys)


def _write_data(draft: Draft, where: str) -> None:
    write_data(draft, where)
    rank = draft.values.get("lora.r")
    if rank is not None and is_number(rank):
        draft.fill("lora.lora_alpha", 2 * rank, "twice the rank")


LLAMAFACTORY = Tool(KEYS, _write_losses, _write_data)
