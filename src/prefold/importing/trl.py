"""TRL's configurations: `trl dpo --config FILE`, and the same for its other trainers."""

from __future__ import annotations

from collections.abc import Sequence

from prefold.importing.commands import command_of
from prefold.importing.draft import Draft
from prefold.importing.handbook import write_mixer
from prefold.importing.losses import TRL as KEYS
from prefold.importing.losses import Loss, known, write_command
from prefold.importing.sources import write_sources
from prefold.importing.write import Tool, samples, write_fraction, write_template

REWARD_RATE = 1e-4
"""TRL's default learning rate of reward models; that of other methods is in trl.yaml."""


def _write_losses(draft: Draft, where: str, method: str | None) -> None:
    command = command_of(draft, where, method)
    if command == "cpo" and (alpha := draft.look("alpha")):
        known(alpha, {"0": Loss("cpo")}, "alpha", where)
    write_command(draft, where, command, KEYS)


def _write_data(draft: Draft, where: str) -> None:
    for key in filter(draft.has, ("chat_template", "chat_template_path")):
        write_template(draft, key)
    write_sources(draft, "datasets", "data.train")
    draft.section("dataset_mixture")
    # In a mixture, a weight is the share of a data set's own rows.
    write_sources(draft, "dataset_mixture.datasets", "data.train", shares=True)
    write_fraction(draft, "dataset_mixture.test_split_size")
    write_mixer(draft)
    _write_named(draft)
    if samples(draft) and draft.has("max_prompt_length"):
        # Where completions are sampled, `data.max_length` bounds the prompt alone.
        draft.carry("data.max_length", draft.take("max_prompt_length"), "max_prompt_length")
        draft.values["data.overlong"] = "truncate_prompt"
    elif not samples(draft) and not draft.has("max_length"):
        if "max_length" in draft.given:
            draft.carry("data.max_length", 1024, comment="no limit in the file, and prefold needs one")
        draft.fill("data.max_length", 1024)


def _write_named(draft: Draft) -> None:
    """`dataset_name` and its splits; `datasets` takes precedence."""
    keys: Sequence[str] = ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split")
    name, config, train, test = (draft.take(key) for key in keys)
    given, prompt = [key for key in keys if draft.look(key)], draft.take("dataset_prompt_column")
    if "data.train" in draft.values or name is None:
        if given or prompt:
            draft.note("off", *given, *(["dataset_prompt_column"] if prompt else []))
        return
    source = {"path": name, **({"name": config} if config else {})}
    if prompt is not None:
        draft.note("renamed", "dataset_prompt_column", text="`columns.prompt`")
        source |= {"columns": {"prompt": prompt}} if prompt != "prompt" else {}
    used = [key for key in given if key != "dataset_test_split"]
    draft.carry("data.train", [{**source, **({"split": train} if train else {})}], *used)
    measured = any(draft.look(key) not in (None, False, "no") for key in ("eval_strategy", "evaluation_strategy"))
    if test and test == train:
        draft.note("decided", "dataset_test_split", text="rows that are trained on are not held out")
    elif test:
        draft.carry("data.eval", [{**source, "split": test}], "dataset_test_split")
    if measured and (not test or test == train):
        draft.fill("data.eval", [{**source, "split": "test"}])


def _write_rate(draft: Draft) -> None:
    if draft.values["method"] == "reward" and not draft.has("learning_rate"):
        draft.fill("train.learning_rate", REWARD_RATE)


TRL = Tool(KEYS, _write_losses, _write_data, _write_rate)
