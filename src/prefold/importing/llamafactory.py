"""LLaMA-Factory's configurations. It trains with transformers' trainer, whose defaults hold for the shared keys."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prefold.errors import UserError
from prefold.importing.draft import Draft
from prefold.importing.losses import (
    Loss,
    add_supervised,
    known,
    losses_of,
    require_method,
    supervised,
    write_losses,
)
from prefold.importing.sources import TO_RENAME, WORDS, carry_sources, take_weights, weigh
from prefold.importing.tables import is_number, listed, read_tool
from prefold.importing.write import Tool

KEYS = read_tool("llamafactory")
LOSSES = losses_of(KEYS["losses"])
INFO = "dataset_info.json"
TO_WRITE = f"of {INFO}, which is not at hand: write the file or Hub data set that it stands for"


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
    _write_sets(draft, where)
    rank = draft.values.get("lora.r")
    if rank is not None and is_number(rank):
        draft.fill("lora.lora_alpha", 2 * rank, "twice the rank")


def _write_sets(draft: Draft, where: str) -> None:
    """Sources of `dataset` and `eval_dataset`; names refer to entries of dataset_info.json, a file that lies
    beside the data, in `dataset_dir`; `where`: the file, beside which that may be."""
    info, folder = _read_info(draft, where)
    count, weights = draft.take("max_samples"), take_weights(draft, "interleave_probs")
    for key, field in {"dataset": "data.train", "eval_dataset": "data.eval"}.items():
        if not draft.has(key):
            continue
        names = [str(name) for name in listed(draft.take(key))]
        described = [_source(name, info, folder) for name in names]
        sources = [source | _count(source, count) for source, _ in described]
        weigh(sources, weights)
        lost = [f"{name}: {text}" for name, (_, texts) in zip(names, described, strict=True) for text in texts]
        bare = [name for name in names if name not in info and "/" not in name and not Path(name).suffix]
        carry_sources(draft, key, field, sources, lost, f"{', '.join(bare)} {TO_WRITE}" if bare else "")
    if count is not None and weights:
        draft.note("missing", "max_samples", text="a source has a `weight` or a `count`, not both")
    elif count is not None:
        draft.note("renamed", "max_samples", text="`count` of each source, which must have that many rows")


def _count(source: Mapping[str, Any], count: Any) -> dict[str, Any]:
    """The smaller of the file's count and the data set's own."""
    limits = [number for number in (count, source.get("count")) if number is not None]
    if not limits:
        return {}
    return {"count": min(limits) if all(map(is_number, limits)) else limits[0]}


def _read_info(draft: Draft, where: str) -> tuple[dict[str, Any], Path]:
    """The content and the folder of dataset_info.json; no content if the file does not exist."""
    given = draft.take("dataset_dir")
    name = given if isinstance(given, str) else "data"
    folders = [Path(where).expanduser().parent / name, Path(name)]
    file = next((folder / INFO for folder in folders if (folder / INFO).is_file()), None)
    if given is not None and file:
        draft.note("renamed", "dataset_dir", text=f"the names of its {INFO} are replaced")
    elif given is not None:
        draft.note("missing", "dataset_dir", text=f"{INFO} is not in it")
    if file is None:
        return {}, folders[0]
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read: {error}", where=str(file), expected="data sets by name, as JSON") from None
    return (info if isinstance(info, dict) else {}), file.parent


def _source(name: str, info: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The source of a data set by its name, and what in its entry has no counterpart."""
    entry = info.get(name)
    if not isinstance(entry, Mapping):
        return {"path": name}, []
    if "hf_hub_url" in entry:
        source = {"path": entry["hf_hub_url"]}
    elif "file_name" in entry:
        source = {"path": str(folder / str(entry["file_name"]))}
    else:
        where = next((entry[key] for key in KEYS["elsewhere_kept"] if key in entry), name)
        return {"path": str(where)}, [f"{where} is on no Hub that prefold reads, or made by code; download it as files"]
    source |= {field: entry[key] for key, field in KEYS["info"].items() if entry.get(key) is not None}
    columns = dict(_columns(entry))
    known = {*KEYS["info"], *KEYS["elsewhere_kept"], *KEYS["info_decided"]}
    lost = [f"`{key}` of {INFO}" for key in entry if key not in known]
    if unread := [key for key in entry.get("columns") or {} if key not in KEYS["columns"]]:
        lost.append(f"columns {', '.join(unread)}: images, videos and sound cannot be trained on")
    if odd := [f"{tag}: {word}" for tag, word in (entry.get("tags") or {}).items() if word not in WORDS]:
        lost.append(f"tags {', '.join(odd)}: {TO_RENAME}")
    return source | ({"columns": columns} if columns else {}), lost


def _columns(entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(role, column) for columns with other names than prefold's. `response` counts only if there are no pairs."""
    for key, column in (entry.get("columns") or {}).items():
        role = KEYS["columns"].get(key)
        if role and column and column != role and not (role == "completion" and entry.get("ranking")):
            yield role, str(column)


LLAMAFACTORY = Tool(KEYS, _write_losses, _write_data)
