"""LLaMA-Factory's second layout, of `USE_V1=1 llamafactory-cli dpo FILE`: fewer keys, sections for LoRA and quantised
weights, and data sets in a file of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefold.errors import UserError
from prefold.importing.draft import Draft
from prefold.importing.llamafactory import write_stage
from prefold.importing.losses import supervised
from prefold.importing.sources import carry_sources
from prefold.importing.tables import is_number, read_tool
from prefold.importing.write import Tool, write_per_epoch
from prefold.recipe import parse_yaml

KEYS = read_tool("llamafactory_v1")


def _write_losses(draft: Draft, where: str, method: str | None) -> None:
    train = "train_dataset" if draft.has("train_dataset") else "dataset"
    fields = {train: "data.train", "eval_dataset": "data.eval"}
    sets = {key: _read_sets(draft.take(key), where) for key in fields if draft.has(key)}
    converters = {entry.get("converter") for entries in sets.values() for entry in entries.values()}
    command = _command(draft, where, method, converters)
    for key, entries in sets.items():
        _write_sources(draft, key, fields[key], entries)
    write_stage(draft, where, KEYS["commands"][command], [*filter(draft.has, ["model_class"])], KEYS["settings"])


def _command(draft: Draft, where: str, method: str | None, converters: set[Any]) -> str:
    """The command that the file is for, by the class of its model, a setting for pairs, or the format of its data."""
    commands = " | ".join(KEYS["commands"])
    if method is not None and method not in KEYS["commands"]:
        raise UserError(f"`--method {method}` is none of {draft.tool}'s", where=where, expected=commands)
    of_pairs = "pair" in converters or any(map(draft.has, ["pref_loss", *KEYS["settings"]["dpo"].values()]))
    by_file = "rm" if str(draft.look("model_class")) == "cls" else "dpo" if of_pairs else None
    if by_file is None and method is None and converters & {"alpaca", "sharegpt"}:
        raise supervised("a file for supervised fine-tuning", where, ": data with `converter: pair`")
    if by_file and method not in (None, by_file):
        raise UserError(f"`--method {method}`, and the file is for `{by_file}`", where=where, advice="leave it out")
    if chosen := method or by_file:
        return chosen
    raise UserError(
        "the command is not in the file, and its keys fit several",
        where=where,
        expected=f"--method {commands}",
        advice="add the command that the file is run with, e.g. `--method dpo` for `llamafactory-cli dpo FILE`",
    )


def _read_sets(value: Any, where: str) -> dict[str, Any]:
    """The data sets by their names: those of the YAML file if it exists, else the value itself as a path."""
    name = str(value)
    if Path(name).suffix in (".yaml", ".yml"):
        beside = Path(where).expanduser().parent
        file = next((path for path in (beside / name, Path(name), beside.parent / name) if path.is_file()), None)
        entries = parse_yaml(file.read_text(encoding="utf-8"), str(file)) if file else None
        if isinstance(entries, Mapping):
            return {str(key): entry for key, entry in entries.items() if isinstance(entry, Mapping)}
    return {name: {"path": name}}


def _write_sources(draft: Draft, key: str, field: str, entries: Mapping[str, Any]) -> None:
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
    carry_sources(draft, key, field, sources, lost, comment)


def _write_batch(draft: Draft, where: str) -> None:
    """The batch of a step, if the file gives it as a whole."""
    if draft.has("global_batch_size") and is_number(whole := draft.look("global_batch_size")):
        micro = filter(draft.has, ["micro_batch_size"])
        draft.carry("train.batch_size", whole, "global_batch_size", *micro, comment="over all devices")


def _write_steps(draft: Draft) -> None:
    """Checkpoints by epochs, unless a number of steps ends training."""
    counted = "train.max_steps" in draft.values or draft.has("save_steps")
    every = draft.look("save_epochs")
    times = 1 / every if is_number(every) and every else every
    why_not = "set `train.save_steps`, which counts steps" if counted else ""
    write_per_epoch(draft, "save_epochs", times, "train.save_steps", "the end is saved", why_not)


LLAMAFACTORY_V1 = Tool(KEYS, _write_losses, _write_batch, _write_steps)
