"""LLaMA-Factory's second layout, of `USE_V1=1 llamafactory-cli dpo FILE`: fewer keys, sections for LoRA and quantised
weights, and data sets by a file of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefold.errors import UserError
from prefold.importing.draft import Draft
from prefold.importing.llamafactory import write_stage
from prefold.importing.losses import supervised
from prefold.importing.rest import share, write_rest
from prefold.importing.tables import is_number, listed, read_tool, table_of
from prefold.importing.write import Tool, write_all_weights, write_quantised
from prefold.recipe import parse_yaml

KEYS = read_tool("llamafactory_v1")


def _write_losses(draft: Draft, where: str, method: str | None) -> None:
    for section in ("peft_config", "quant_config"):
        draft.section(section)
    sets = {key: _read_sets(draft.take(key), where) for key in _data_keys(draft)}
    chosen, keys = _command(draft, where, method, sets)
    for key, entries in sets.items():
        _write_sources(draft, key, entries)
    write_stage(draft, where, chosen, keys, KEYS["settings"])


def _data_keys(draft: Draft) -> list[str]:
    train = "train_dataset" if draft.has("train_dataset") else "dataset"
    return [key for key in (train, "eval_dataset") if draft.has(key)]


def _command(
    draft: Draft, where: str, method: str | None, sets: Mapping[str, Mapping[str, Any]]
) -> tuple[str, list[str]]:
    """Which command the file is for, by the class of its model, a setting of pairs or the data; and the keys that
    say so."""
    commands = KEYS["commands"]
    if method is not None and method not in commands:
        raise UserError(f"`--method {method}` is none of {draft.tool}'s", where=where, expected=" | ".join(commands))
    is_classifier = str(draft.look("model_class")) == "cls"
    told = "rm" if is_classifier else "dpo" if any(map(draft.has, KEYS["settings"]["dpo"].values())) else None
    converters = {entry.get("converter") for entries in sets.values() for entry in entries.values()}
    if told is None and converters & {"alpaca", "sharegpt"} and method is None:
        raise supervised("a file for supervised fine-tuning", where, ": data with `converter: pair`")
    told = told or ("dpo" if "pair" in converters or draft.has("pref_loss") else None)
    if told and method not in (None, told):
        raise UserError(f"`--method {method}`, and the file is for `{told}`", where=where, advice="leave it out")
    chosen = method or told
    if chosen is None:
        raise UserError(
            "the command is not in the file, and its keys fit several",
            where=where,
            expected="--method " + " | ".join(commands),
            advice="add the command that the file is run with, e.g. `--method dpo` for `llamafactory-cli dpo FILE`",
        )
    keys = ["model_class"] if draft.has("model_class") else []
    return commands[chosen], keys


def _read_sets(value: Any, where: str) -> dict[str, Any]:
    """The data sets by their names: those of a YAML file if it is at hand, else the value itself as a path."""
    name = str(value)
    if Path(name).suffix in (".yaml", ".yml"):
        beside = Path(where).expanduser().parent
        file = next((path for path in (beside / name, Path(name), beside.parent / name) if path.is_file()), None)
        entries = parse_yaml(file.read_text(encoding="utf-8"), str(file)) if file else None
        if isinstance(entries, Mapping):
            return {str(key): entry for key, entry in entries.items() if isinstance(entry, Mapping)}
    return {name: {"path": name}}


def _write_sources(draft: Draft, key: str, entries: Mapping[str, Any]) -> None:
    field = "data.eval" if key == "eval_dataset" else "data.train"
    sources, lost = [], []
    for name, entry in entries.items():
        source = {ours: entry[theirs] for theirs, ours in KEYS["info"].items() if entry.get(theirs) is not None}
        weight = entry.get("weight")
        if is_number(weight) and 0 < weight < 1 and "count" not in source:
            source["count"] = weight
        elif weight not in (None, 1):
            lost.append(f"{name}: `weight: {weight}` repeats rows, or goes with `size`; `count` is a share below 1")
        if entry.get("source") in ("ms_hub", "om_hub"):
            lost.append(f"{name}: on no Hub that prefold reads; download it as files")
        unknown = [word for word in entry if word not in {*KEYS["info"], *KEYS["info_decided"]}]
        lost += [f"{name}: `{word}` of the file of data sets" for word in unknown]
        sources.append(source)
    unread = [str(source.get("path")) for source in sources if str(source.get("path")).endswith((".yaml", ".yml"))]
    comment = f"{', '.join(unread)} is not at hand: write the files or Hub data sets that it names" if unread else ""
    draft.carry(field, sources, key, comment=comment)
    for text in lost:
        draft.note("missing", key, text=text)


def _write_model(draft: Draft) -> None:
    bits = draft.take("quant_config.quantization_bit")
    if bits in (4, 8):
        keys = [key for key in ("quant_config.quantization_bit", "quant_config.name") if key in draft.given]
        draft.carry(f"model.load_in_{bits}bit", True, *keys)
    elif bits is not None:
        draft.note("missing", "quant_config.quantization_bit", text=f"{bits}: weights are held in 4 or 8 bits")
    write_quantised(draft, "quant_config.quantization_type", "quant_config.double_quantization", double=True)
    table, kind = table_of(KEYS["adapter"]), draft.take("peft_config.name")
    if kind is None:
        write_all_weights(draft, table, "no `peft_config` in the file: all weights are trained")
        return
    if kind == "lora":
        draft.note("renamed", "peft_config.name", text="a section `lora`")
    else:
        draft.note("missing", "peft_config.name", text=f"{kind}: LoRA is trained instead")
    if draft.has("peft_config.adapter_name_or_path"):
        first = listed(draft.take("peft_config.adapter_name_or_path"))[0]
        comment = "it brings its own LoRA settings"
        draft.carry("model.adapter", first, "peft_config.adapter_name_or_path", comment=comment)
        for key in filter(draft.has, table):
            draft.note("decided", key, text="the adapter brings its own")
        return
    draft.follow(table)
    for field, value in {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": "all-linear"}.items():
        draft.fill(f"lora.{field}", value)


def _write_batch(draft: Draft) -> None:
    """The batch of a step, which the file may give whole."""
    if is_number(whole := draft.look("global_batch_size")) and draft.has("global_batch_size"):
        micro = [*filter(draft.has, ["micro_batch_size"])]
        draft.carry("train.batch_size", whole, "global_batch_size", *micro, comment="over all devices")


def _write_steps(draft: Draft) -> None:
    """Checkpoints by epochs, which are a share of all steps unless a number of steps ends training."""
    part = share(draft.look("save_epochs"), draft.values.get("train.num_train_epochs", 3))
    counted = "train.max_steps" in draft.values or draft.has("save_steps")
    if draft.has("save_epochs") and part and not counted:
        draft.carry("train.save_steps", part, "save_epochs", comment="as a share of all steps")
    elif draft.has("save_epochs"):
        why = ("missing", "set `train.save_steps`, which counts steps") if counted else ("decided", "the end is saved")
        draft.note(why[0], "save_epochs", text=why[1])  # type: ignore[arg-type]
    write_rest(draft, KEYS)


LLAMAFACTORY_V1 = Tool(KEYS, _write_losses, _write_model, _write_batch, _write_steps)
