"""TRL's configurations: `trl dpo --config FILE`, and the same for its other trainers."""

from __future__ import annotations

from collections.abc import Sequence

from prefold.importing.commands import command_of
from prefold.importing.draft import Draft
from prefold.importing.handbook import write_mixer, write_mixture
from prefold.importing.losses import Loss, known_loss, write_dpo, write_grpo, write_losses, write_simpo
from prefold.importing.rest import write_template_kwargs
from prefold.importing.sources import write_sources
from prefold.importing.tables import read_tool, table_of
from prefold.importing.write import (
    Tool,
    samples,
    without_dropout,
    write_all_weights,
    write_quantised,
    write_template,
)

KEYS = read_tool("trl")
CPO_LOSSES = {name: Loss("simpo" if name == "simpo" else "cpo") for name in ("sigmoid", "hinge", "ipo", "simpo")}
REWARD_RATE = 1e-4
"""The learning rate of reward models; the others' is in the table."""


def _write_losses(draft: Draft, where: str, method: str | None) -> None:
    command, settings = command_of(draft, where, method), KEYS["settings"]
    if command == "dpo":
        write_dpo(draft, where, settings["dpo"])
    elif command == "grpo":
        write_grpo(draft, where)
    elif command == "cpo":
        _write_cpo(draft, where)
    elif command == "kto":
        known_loss(draft.look("loss_type", "kto"), {"kto": Loss("kto")}, "loss_type", where)
        write_losses(draft, [Loss("kto")], settings["kto"], [key for key in ("loss_type",) if draft.has(key)])
    else:
        write_losses(draft, [Loss(command)], settings[command])


def _write_cpo(draft: Draft, where: str) -> None:
    loss = known_loss(draft.look("loss_type", "sigmoid"), CPO_LOSSES, "loss_type", where)
    if alpha := draft.look("alpha"):
        known_loss(alpha, {"0": loss}, "alpha", where)
    if loss.method == "simpo":
        write_simpo(draft, KEYS["settings"]["simpo"])
    else:
        write_losses(draft, [loss], KEYS["settings"]["cpo"])


def _write_model(draft: Draft) -> None:
    table = table_of(KEYS["adapter"])
    for key in filter(draft.has, ("chat_template", "chat_template_path")):
        write_template(draft, key)
    if draft.has("chat_template_kwargs"):
        write_template_kwargs(draft, "chat_template_kwargs", draft.take("chat_template_kwargs"))
    quiet = draft.take("disable_dropout", not samples(draft))
    if not draft.look("use_peft"):
        if "use_peft" in draft.given:
            draft.note("renamed", "use_peft", text="lora: none, which trains all weights")
        if draft.look("disable_dropout") is not None:
            draft.note("decided", "disable_dropout", text="`lora.lora_dropout` is the only dropout here")
        write_all_weights(draft, table)
        for key in filter(draft.has, ["load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant"]):
            draft.note("missing", key, text="all weights are trained, which quantised ones cannot be")
        return
    draft.note("renamed", "use_peft", text="a section `lora`")
    draft.follow(table)
    draft.fill("lora.r", 16)
    draft.fill("lora.lora_alpha", 32)
    draft.fill("lora.lora_dropout", 0.05)
    draft.fill("lora.target_modules", ["q_proj", "v_proj"], "peft's choice for Llama, Mistral, Qwen, Gemma")
    if quiet:
        without_dropout(draft, "TRL", "disable_dropout")
    elif draft.look("disable_dropout") is not None:
        draft.note("off", "disable_dropout")
    write_quantised(draft, "bnb_4bit_quant_type", "use_bnb_nested_quant", double=False)


def _write_data(draft: Draft) -> None:
    write_sources(draft, "datasets", "data.train")
    write_mixture(draft)
    write_mixer(draft)
    _write_named(draft)
    if samples(draft):
        # Where completions are sampled, `data.max_length` bounds the prompt alone.
        if draft.has("max_prompt_length"):
            draft.carry("data.max_length", draft.take("max_prompt_length"), "max_prompt_length")
            draft.values["data.overlong"] = "truncate_prompt"
        return
    if draft.has("max_length"):
        draft.carry("data.max_length", draft.take("max_length"), "max_length")
    elif "max_length" in draft.given:
        draft.carry("data.max_length", 1024, comment="no limit in the file, and prefold needs one")
    draft.fill("data.max_length", 1024)
    if draft.has("max_prompt_length"):
        draft.values["data.overlong"] = "truncate_prompt"
        draft.comments["data.overlong"] = "TRL cuts answers as well, which prefold never does"
    if draft.has("max_completion_length"):
        draft.note("decided", "max_completion_length", text="answers are never cut; see `data.max_length`")


def _write_named(draft: Draft) -> None:
    """`dataset_name` and its splits; `datasets` goes before it."""
    keys: Sequence[str] = ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split")
    name, config, train, test = (draft.take(key) for key in keys)
    given, prompt = [key for key in keys if draft.look(key)], draft.take("dataset_prompt_column")
    if "data.train" in draft.values or name is None:
        if given:
            draft.note("off", *given)
        return
    source = {"path": name, **({"name": config} if config else {})}
    if prompt is not None:
        draft.note("renamed", "dataset_prompt_column", text="`columns.prompt`")
        source |= {"columns": {"prompt": prompt}} if prompt != "prompt" else {}
    used = [key for key in given if key != "dataset_test_split"]
    draft.carry("data.train", [{**source, **({"split": train} if train else {})}], *used)
    measured = any(draft.look(key) not in (None, False, "no") for key in ("eval_strategy", "evaluation_strategy"))
    if test and test != train:
        draft.carry("data.eval", [{**source, "split": test}], "dataset_test_split")
    elif measured:
        draft.fill("data.eval", [{**source, "split": "test"}])
    if test == train and test:
        draft.note("decided", "dataset_test_split", text="rows that are trained on are not held out")


def _write_rest(draft: Draft) -> None:
    if draft.values["method"] == "reward":
        draft.follow({"learning_rate": table_of(read_tool("transformers"))["learning_rate"]})
        draft.fill("train.learning_rate", REWARD_RATE)
    for key in [key for key in draft.given if key.startswith("vllm_") and draft.has(key)]:
        draft.note("missing", key, text="completions are sampled by prefold's own engine")


TRL = Tool(KEYS, _write_losses, _write_model, _write_data, _write_rest)
