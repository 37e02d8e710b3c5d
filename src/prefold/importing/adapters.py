"""LoRA and quantised weights, which the three tools have from peft and bitsandbytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefold.importing.draft import Draft, Table, To
from prefold.importing.shared import listed, modules

LORA: Table = {
    "lora_r": To("lora.r"),
    "lora_alpha": To("lora.lora_alpha"),
    "lora_dropout": To("lora.lora_dropout"),
    "lora_target_modules": To("lora.target_modules", modules),
    "lora_modules_to_save": To("lora.modules_to_save", listed),
    "use_rslora": To("lora.use_rslora"),
    "use_dora": To("lora.use_dora"),
}
"""As TRL names them."""


def without_dropout(draft: Draft, who: str, key: str = "") -> None:
    """The trainers of pairs set every dropout of the model to 0, that of a new adapter too."""
    keys = [name for name in (key, "lora_dropout") if draft.look(name)]
    if was := draft.values["lora.lora_dropout"]:
        comment = f"not {was}: {who} switches all dropout off, that of LoRA too"
        draft.replace("lora.lora_dropout", 0.0, comment, *keys)
    elif key in keys:
        draft.note("decided", key, text="`lora.lora_dropout` is the only dropout here")


def write_quantised(draft: Draft, defaults: Mapping[str, Any], double: str) -> None:
    """`load_in_4bit` and what belongs to it; `double`: the key of the double quantisation."""
    for key in filter(draft.has, ["load_in_4bit", "load_in_8bit"]):
        value = draft.take(key)
        if value:
            draft.carry(f"model.{key}", value, key)
        else:
            draft.note("off", key)
    fours = {"bnb_4bit_quant_type": "bnb_4bit_quant_type", double: "bnb_4bit_use_double_quant"}
    if not draft.values.get("model.load_in_4bit"):
        for key in filter(draft.has, list(fours)):
            draft.note("off", key)
        return
    draft.follow({key: To(f"model.{field}") for key, field in fours.items()})
    for field, value in defaults.items():
        draft.fill(f"model.{field}", value)
