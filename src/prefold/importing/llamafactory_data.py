"""Data sets of LLaMA-Factory, whose names refer to entries of dataset_info.json, a file beside the data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prefold.errors import UserError
from prefold.importing.draft import Draft
from prefold.importing.sources import TO_RENAME, WORDS, carry_sources, take_weights, weigh
from prefold.importing.tables import is_number, listed, read_tool

KEYS = read_tool("llamafactory")
INFO = "dataset_info.json"
TO_WRITE = f"of {INFO}, which is not at hand: write the file or Hub data set that it stands for"


def write_data(draft: Draft, where: str) -> None:
    """Sources of `dataset` and `eval_dataset`; `where`: the file, beside which `dataset_dir` may be."""
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
