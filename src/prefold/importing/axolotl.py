"""Axolotl's configurations. It trains with TRL's trainers, whose defaults hold where it has none of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefold.errors import UserError
from prefold.importing.draft import Draft
from prefold.importing.losses import Loss, known_loss, supervised, write_dpo, write_grpo, write_losses, write_simpo
from prefold.importing.rest import share, write_rest, write_template_kwargs
from prefold.importing.sources import write_sources
from prefold.importing.tables import Entry, read_tool, table_of
from prefold.importing.write import (
    Tool,
    has_held_out,
    samples,
    without_dropout,
    write_all_weights,
    write_quantised,
    write_template,
)

KEYS = read_tool("axolotl")
METHODS = ("dpo", "ipo", "orpo", "kto", "simpo", "grpo")
QUANTISED = {"nf4": "load_in_4bit", "int8": "load_in_8bit"}
"""What `peft.weight_dtype` asks of bitsandbytes."""


def _write_losses(draft: Draft, where: str, method: str | None) -> None:
    for section in ("trl", "peft"):
        draft.section(section)
    wanted = _wanted(draft, where, method)
    if wanted == "grpo":
        write_grpo(draft, where, "trl.")
        return
    beta = next(filter(draft.has, KEYS["beta"]), "rl_beta")
    settings = {"beta": beta, **KEYS["settings"]["dpo" if wanted == "ipo" else wanted]}
    if wanted == "simpo":
        write_simpo(draft, settings)
    elif wanted in ("dpo", "ipo"):
        write_dpo(draft, where, settings, "dpo_", default="ipo" if wanted == "ipo" else "sigmoid")
    else:
        write_losses(draft, [Loss(wanted)], settings, [*filter(draft.has, ["rl"])])


def _wanted(draft: Draft, where: str, method: str | None) -> str:
    """What `rl` says."""
    wanted = draft.look("rl")
    if draft.look("process_reward_model"):
        raise UserError(
            "`process_reward_model`: a model that scores steps of an answer",
            where=where,
            expected="`reward_model: true`, whose model scores whole answers, or rl: " + " | ".join(METHODS),
        )
    if wanted is None and draft.take("reward_model", False):
        draft.note("renamed", "reward_model", text="method: reward")
        wanted = "reward"
    if wanted is None:
        what = "a file for supervised fine-tuning or pre-training: it has no `rl`"
        raise supervised(what, where, ": rl: " + " | ".join(METHODS))
    if wanted not in (*METHODS, "reward"):
        known_loss(wanted, dict.fromkeys(METHODS, Loss("dpo")), "rl", where)
    if method not in (None, wanted):
        raise UserError(f"`--method {method}`, and the file says `rl: {wanted}`", where=where, advice="leave it out")
    return str(wanted)


def _write_model(draft: Draft) -> None:
    table, kind = table_of(KEYS["adapter"]), draft.take("adapter")
    if kind is None:
        write_all_weights(draft, table, "no `adapter` in the file: all weights are trained")
        draft.off("lora_target_linear", "load_in_4bit", "load_in_8bit")
        return
    if kind in ("lora", "qlora"):
        draft.note("renamed", "adapter", text="a section `lora`" + (", `model.load_in_4bit`" * (kind == "qlora")))
    else:
        draft.note("missing", "adapter", text=f"{kind}: LoRA is trained instead")
    dtype = draft.look("peft.weight_dtype")
    if draft.look("peft.backend") == "bnb" and dtype in QUANTISED:
        draft.carry(f"model.{QUANTISED[dtype]}", True, "peft.backend", "peft.weight_dtype")
    write_quantised(draft, "bnb_4bit_quant_type", "", double=True)
    draft.follow(table)
    if draft.take("lora_target_linear", False):
        draft.carry("lora.target_modules", "all-linear", "lora_target_linear")
    elif draft.given.get("lora_target_linear") is not None:
        draft.note("off", "lora_target_linear")
    if "model.adapter" in draft.values:
        for field in [field for field in draft.values if field.startswith("lora.")]:
            del draft.values[field]
        draft.comments["model.adapter"] = "it brings its own LoRA settings; those of the file are left out"
        return
    draft.fill("lora.target_modules", ["q_proj", "v_proj"], "peft's choice for Llama, Mistral, Qwen, Gemma")
    draft.fill("lora.lora_dropout", 0.0)
    if not samples(draft):
        without_dropout(draft, "TRL's trainer")


def _write_data(draft: Draft) -> None:
    """Longer rows are dropped unless the file has them cut, which prefold does from the left of the prompt alone."""
    fields = {"datasets": "data.train", "test_datasets": "data.eval"}
    for key in filter(draft.has, fields):
        entries = draft.look(key)
        write_sources(draft, key, fields[key])
        _note_types(draft, key, entries if isinstance(entries, list) else [entries])
    if not draft.has("sequence_len"):
        draft.fill("data.max_length", 512)
    if draft.has("excess_length_strategy"):
        choices = {"drop": "drop", "raise": "error", "truncate": "truncate_prompt"}
        value = draft.take("excess_length_strategy")
        comment = "the answer stays whole" if value == "truncate" else ""
        draft.carry("data.overlong", choices.get(str(value), value), "excess_length_strategy", comment=comment)
    _write_template(draft)


def _note_types(draft: Draft, key: str, entries: list[Any]) -> None:
    """Name what a `type` does to rows beyond finding their columns: code of its own, and words around a prompt."""
    types = [entry["type"] for entry in entries if isinstance(entry, Mapping) and entry.get("type")]
    own = [kind for kind in types if isinstance(kind, str) and kind.partition(".")[0] not in KEYS["types"]]
    if own:
        draft.notes = [note for note in draft.notes if f"{key}.type" not in note.keys]
        text = f"{', '.join(dict.fromkeys(own))}: code that makes rows; write what it makes to a file, and name that"
        draft.note("missing", f"{key}.type", text=text)
    formats = {
        name: value
        for kind in types
        if isinstance(kind, Mapping)
        for name, value in kind.items()
        if name.endswith("_format") and value and str(value).strip("{} ") not in KEYS["roles"]
    }
    draft.notes = [note for note in draft.notes if not {f"{key}.{name}" for name in formats} & {*note.keys}]
    for name, value in formats.items():
        text = f"{value!r}: the model's own chat template writes the turns; other words belong into the rows"
        draft.note("missing", f"{key}.{name}", text=text)


def _write_template(draft: Draft) -> None:
    """A template of one's own is carried over from a file; a named one gives way to the model's own."""
    if isinstance(draft.look("chat_template_jinja"), str):
        write_template(draft, "chat_template_jinja")
        if draft.has("chat_template"):
            draft.note("renamed", "chat_template", text="as `chat_template_jinja` says")
    name = str(draft.look("chat_template", ""))
    if draft.has("chat_template") and not name.startswith("tokenizer_default"):
        text = f"{name}: the model's own chat template writes the turns; `model.chat_template` gives a base model one"
        draft.note("missing", "chat_template", text=text)
    for key in filter(draft.has, ["chat_template_kwargs", "trl.chat_template_kwargs"]):
        write_template_kwargs(draft, key, draft.take(key))


def _write_steps(draft: Draft) -> None:
    """The warm-up where the file says nothing, trackers by their switches, and when checkpoints and measurements are
    made."""
    if steps := draft.values.get("train.max_steps"):
        draft.fill("train.warmup_steps", min(int(0.03 * steps), 100), f"0.03 of {steps} steps")
    else:
        draft.fill("train.warmup_steps", 0.03, "a share of all steps, and at most 100 there")
    trackers = {"wandb": ("use_wandb", "wandb_project"), "tensorboard": ("use_tensorboard",)}
    wanted = [name for name, keys in trackers.items() if any(draft.look(key) for key in keys)]
    given = [key for key in ("use_wandb", "use_tensorboard") if draft.has(key)]
    if wanted:
        draft.carry("train.report_to", wanted, *given)
    elif given:
        draft.note("off", *given)
    measured = has_held_out(draft) and not samples(draft)
    # It needs no strategy beside it.
    if measured and draft.has("eval_steps") and not draft.has("eval_strategy"):
        draft.follow({"eval_steps": Entry("field", "train.eval_steps")})
    why = "" if measured else "nothing is measured while training, for want of held-out pairs"
    _write_per_epoch(draft, "evals_per_epoch", "train.eval_steps", "measured before and after training", why)
    _write_per_epoch(draft, "saves_per_epoch", "train.save_steps", "the last step is saved anyway")
    write_rest(draft, KEYS)


def _write_per_epoch(draft: Draft, key: str, field: str, at_the_end: str, why_not: str = "") -> None:
    """How often in an epoch, as a share of all steps."""
    if not draft.has(key):
        return
    number = draft.take(key)
    part = share(1, number, draft.values.get("train.num_train_epochs", 1))
    if part is None:
        draft.note("decided" if number else "off", key, text=at_the_end)
    elif why_not:
        draft.note("missing", key, text=why_not)
    else:
        draft.carry(field, part, key, comment=f"{number} times an epoch, as a share of all steps")


AXOLOTL = Tool(KEYS, _write_losses, _write_model, _write_data, _write_steps)
