"""The data sets of alignment-handbook files: `dataset_mixture`, and `dataset_mixer` of its older ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefold.importing.draft import Draft
from prefold.importing.sources import write_sources
from prefold.importing.tables import is_number, listed
from prefold.importing.write import write_fraction

FIRST = "they are drawn by `train.seed`, where the handbook takes the first"


def write_mixture(draft: Draft) -> None:
    """`weight` is there the share of a data set's own rows."""
    draft.section("dataset_mixture")
    write_sources(draft, "dataset_mixture.datasets", "data.train", shares=True)
    write_fraction(draft, "dataset_mixture.test_split_size")
    if draft.has("dataset_mixture.seed"):
        draft.note("missing", "dataset_mixture.seed", text="`train.seed` is the seed of everything")


def write_mixer(draft: Draft) -> None:
    """Data sets -> the share of each one's training rows; all of them have the same splits."""
    if not draft.has("dataset_mixer"):
        for key in filter(draft.has, ("dataset_splits", "dataset_configs")):
            text = "it belongs to `dataset_mixer`; see `name` and `split` of the sources in `data.train`"
            draft.note("missing", key, text=text)
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
    comment = f"`count` is a share of the rows: {FIRST}" if any("count" in source for source in train) else ""
    draft.carry("data.train", train, "dataset_mixer", comment=comment)
    if held_out:
        draft.values["data.eval"] = held_out
    texts = {"dataset_splits": "`split`: in `data.eval` what has test in its name", "dataset_configs": "`name`"}
    for key in filter(draft.has, texts):
        draft.note("renamed", key, text=f"{texts[key]} of each source")
    if draft.values["method"] == "dpo" and not draft.has("optim"):
        draft.fill("train.optim", "rmsprop", "where the handbook's own DPO settings say nothing")
