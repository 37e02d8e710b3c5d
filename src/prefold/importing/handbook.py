"""The data sets of older alignment-handbook files, `dataset_mixer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefold.importing.draft import Draft
from prefold.importing.tables import is_number, listed


def write_mixer(draft: Draft) -> None:
    """The sources of `dataset_mixer`: data sets with the share of their training rows, all with the same splits."""
    if not draft.has("dataset_mixer"):
        return
    mixer = draft.look("dataset_mixer")
    splits = [str(split) for split in listed(draft.look("dataset_splits", ["train", "test"]))]
    configs = listed(draft.look("dataset_configs", []))
    if not isinstance(mixer, Mapping) or not all(map(is_number, mixer.values())):
        keys = filter(draft.has, ["dataset_mixer", "dataset_splits", "dataset_configs"])
        draft.note("missing", *keys, text="no mapping of data sets to shares: write them into `data.train`")
        return
    train: list[dict[str, Any]] = []
    held_out: list[dict[str, Any]] = []
    for index, (path, share) in enumerate(mixer.items()):
        name = {"name": configs[index]} if index < len(configs) and configs[index] else {}
        count = {"count": share} if share != 1 else {}
        train += [{"path": path, **name, "split": split, **count} for split in splits if share and "train" in split]
        held_out += [{"path": path, **name, "split": split} for split in splits if "test" in split]
    comment = "`count` is a share of the rows: they are drawn by `train.seed`, where the handbook takes the first"
    shares = any("count" in source for source in train)
    draft.carry("data.train", train, "dataset_mixer", comment=comment if shares else "")
    if held_out:
        draft.values["data.eval"] = held_out
    texts = {"dataset_splits": "`split`: in `data.eval` what has test in its name", "dataset_configs": "`name`"}
    for key in filter(draft.has, texts):
        draft.note("renamed", key, text=f"{texts[key]} of each source")
    if draft.values["method"] == "dpo" and not draft.has("optim"):
        draft.fill("train.optim", "rmsprop", "where the handbook's own DPO settings say nothing")
