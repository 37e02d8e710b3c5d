"""Data sets of LLaMA-Factory, whose names stand for entries of a file beside the data: dataset_info.json, or a YAML
file of that kind."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefold.errors import UserError
from prefold.importing.draft import Draft
from prefold.importing.tables import is_number, listed, read_tool
from prefold.recipe import parse_yaml

KEYS = read_tool("llamafactory")
INFO = "dataset_info.json"
TO_WRITE = f"of {INFO}, which is not at hand: write the file or Hub data set that it stands for"


def write_data(draft: Draft, where: str) -> None:
    """Sources of `dataset` and `eval_dataset`; `where`: the file, beside which its `dataset_dir` may be."""
    info, folder = _read_info(draft, where)
    counts, weights = draft.take("max_samples"), listed(draft.take("interleave_probs", []))
    fields = {"dataset": "data.train", "eval_dataset": "data.eval"}
    for key in filter(draft.has, fields):
        names = [str(name) for name in listed(draft.take(key))]
        sources: list[dict[str, Any]] = []
        lost: list[str] = []
        for name in names:
            source, notes = _source(name, info, folder)
            sources.append(source)
            lost += [f"{name}: {note}" for note in notes]
        _choose_rows(sources, counts, weights)
        bare = [name for name in names if name not in info and "/" not in name and not Path(name).suffix]
        draft.carry(fields[key], sources, key, comment=f"{', '.join(bare)} {TO_WRITE}" if bare else "")
        for text in lost:
            draft.note("missing", key, text=text)
    if counts is not None and weights:
        draft.note("missing", "max_samples", text="a source has a `weight` or a `count`, not both")
    elif counts is not None:
        draft.note("renamed", "max_samples", text="`count` of each source, which must have that many rows")
    if weights:
        draft.note("renamed", "interleave_probs", text="`weight` of each source")
    if draft.has("mix_strategy"):
        draft.note("decided", "mix_strategy", text="no row is repeated: the largest mixture that keeps the weights")


def _choose_rows(sources: Sequence[dict[str, Any]], counts: Any, weights: Sequence[Any]) -> None:
    """Weights where the file has them, else the smaller of the file's count and the data set's own."""
    for index, source in enumerate(sources):
        own = source.pop("count", None)
        limits = [number for number in (counts, own) if number is not None]
        if index < len(weights):
            text = weights[index]
            source["weight"] = parse_yaml(text, "interleave_probs") if isinstance(text, str) else text
        elif limits:
            source["count"] = min(limits) if all(map(is_number, limits)) else limits[0]


def _read_info(draft: Draft, where: str) -> tuple[dict[str, Any], Path]:
    """The file's dataset_info.json and its folder; nothing if it is not at hand."""
    given = draft.take("dataset_dir")
    name = given if isinstance(given, str) else "data"
    folders = [Path(where).expanduser().parent / name, Path(name)]
    file = next((folder / INFO for folder in folders if (folder / INFO).is_file()), None)
    if given is not None:
        note = ("renamed", f"the names of its {INFO} are replaced") if file else ("missing", f"{INFO} is not in it")
        draft.note(note[0], "dataset_dir", text=note[1])  # type: ignore[arg-type]
    if file is None:
        return {}, folders[0]
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read: {error}", where=str(file), expected="data sets by name, as JSON") from None
    return (info if isinstance(info, dict) else {}), file.parent


def _source(name: str, info: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The source that a name stands for, and what of its entry has no counterpart."""
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
    if odd := [f"{tag}: {word}" for tag, word in (entry.get("tags") or {}).items() if word not in KEYS["tags"]]:
        lost.append(f"tags {', '.join(odd)}: other names of roles and contents need renaming in the rows")
    return source | ({"columns": columns} if columns else {}), lost


def _columns(entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Columns that are not called as prefold calls them; an answer by itself is read where there are no pairs."""
    for key, column in (entry.get("columns") or {}).items():
        role = KEYS["columns"].get(key)
        if role and column and column not in (role, key) and not (role == "completion" and entry.get("ranking")):
            yield role, str(column)
