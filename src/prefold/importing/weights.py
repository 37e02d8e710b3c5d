"""What is trained: all weights, or LoRA on a base that may be quantised, by the tables of a tool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefold.importing.draft import Draft
from prefold.importing.tables import Entry, Table, listed, table_of

_PEFT_DEFAULT = ["q_proj", "v_proj"]


def write_weights(draft: Draft, keys: Mapping[str, Any]) -> None:
    """Set `lora` to none or to a new adapter's settings, or set `model.adapter`."""
    lora, quantised = keys["lora"], keys["quantised"]
    table = table_of(lora)
    key = next(filter(draft.has, lora["kind"]), lora["kind"][0])
    kind = draft.take(key, lora["unset"])
    draft.off(*lora["kind"])
    draft.off(*(other for first, other in lora.get("first", {}).items() if draft.look(first)))
    if kind in (False, "full"):
        _write_all_weights(draft, key, table, quantised)
        return
    _write_quantised(draft, quantised)
    if kind not in (True, "lora", "qlora"):
        draft.note("missing", key, text=f"{kind}: LoRA is trained instead")
    elif key in draft.given:
        draft.note("renamed", key, text="a section `lora`")
    if draft.has(lora.get("adapter", "")):
        _write_start(draft, lora["adapter"], table)
        return
    if "without_dropout" in lora:
        _switch_dropout_off(draft, lora["defaults"]["lora.lora_dropout"], **lora["without_dropout"])
    draft.follow(table)
    for field, value in lora["defaults"].items():
        why = "peft's choice for Llama, Mistral, Qwen, Gemma" if value == _PEFT_DEFAULT else ""
        draft.fill(field, value, why)


def _write_all_weights(draft: Draft, key: str, table: Table, quantised: Mapping[str, Any]) -> None:
    draft.values["lora"] = "none"
    if key in draft.given:
        draft.note("renamed", key, text="lora: none, which trains all weights")
    else:
        draft.comments["lora"] = f"no `{key}` in the file: all weights are trained"
    draft.off(*table)
    names = ["load_in_4bit", "load_in_8bit", quantised.get("bits"), *quantised["fields"]]
    draft.off(*quantised.get("by", [])[:1])
    draft.follow(dict.fromkeys(names, Entry("missing", "all weights are trained, which quantised ones cannot be")))


def _write_quantised(draft: Draft, table: Mapping[str, Any]) -> None:
    """Weights in 4 or 8 bits, from switches or a number of bits, and the settings for 4 bits."""
    draft.follow({f"load_in_{bits}bit": Entry("field", f"model.load_in_{bits}bit", "on") for bits in (4, 8)})
    key, (by, unset) = table.get("bits", ""), table.get("by", ("", ""))
    if draft.has(key):
        given = [*filter(draft.has, (key, by))]
        value, how = draft.take(key), draft.take(by, unset)
        bits = {"nf4": 4, "int8": 8}.get(str(value), value)
        if bits in (4, 8) and how in ("bnb", "bitsandbytes", "auto"):
            draft.carry(f"model.load_in_{bits}bit", True, *given)
        else:
            why = "bitsandbytes alone quantises, by `model.load_in_4bit` or `model.load_in_8bit`"
            draft.note("missing", *given, text=f"{value}, by {how}: {why}")
    draft.off(by)
    if not draft.values.get("model.load_in_4bit"):
        draft.off(*table["fields"])
        return
    draft.follow(table_of(table))
    for field, value in table["defaults"].items():
        draft.fill(field, value)


def _write_start(draft: Draft, key: str, table: Table) -> None:
    """An adapter to continue from."""
    first, *others = listed(draft.take(key))
    draft.carry("model.adapter", first, key, comment="it brings its own LoRA settings")
    if others:
        text = f"{', '.join(map(str, others))}: one adapter only; merge the others into the model first"
        draft.note("missing", key, text=text)
    for name in filter(draft.has, table):
        draft.note("decided", name, text="the adapter brings its own")


def _switch_dropout_off(draft: Draft, default: float, by: str, but_for: list[str]) -> None:
    """The trainers of most methods set every dropout of the model to 0, including that of a new adapter."""
    was = draft.look("lora_dropout", default)
    if was and draft.look("disable_dropout", draft.values["method"] not in but_for):
        keys = [*filter(draft.has, ("disable_dropout", "lora_dropout"))]
        comment = f"not {was}: {by} switches all dropout off, that of LoRA too"
        draft.carry("lora.lora_dropout", 0.0, *keys, comment=comment)
