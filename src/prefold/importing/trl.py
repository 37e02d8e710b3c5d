"""TRL's configurations: `trl dpo --config FILE`, and the same for its other trainers; and the alignment handbook's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefold.errors import UserError
from prefold.importing.draft import Draft, Note
from prefold.importing.losses import TRL as KEYS
from prefold.importing.losses import Loss, known, supervised, write_command
from prefold.importing.sources import write_sources
from prefold.importing.tables import is_number, listed
from prefold.importing.write import Tool, samples, write_fraction, write_template

COMMANDS: Sequence[str] = KEYS["commands"]


def _write_losses(draft: Draft, where: str, method: str | None) -> None:
    command = _command_of(draft, where, method)
    if command == "cpo" and (alpha := draft.look("alpha")):
        known(alpha, {"0": Loss("cpo")}, "alpha", where)
    write_command(draft, where, command, KEYS)


# ---- which command a file is for, since it does not say itself -----------------------------------------------------


def _command_of(draft: Draft, where: str, method: str | None) -> str:
    """The command given by `--method`, or the one that has all the file's losses and all its keys that only some
    commands have. If several do, the name of the file or of its folder chooses among them; it decides nothing alone.
    Raises UserError: there is none, or several are left."""
    if method is not None:
        if method in COMMANDS:
            return method
        raise UserError(f"`--method {method}` is none of TRL's", where=where, expected=", ".join(COMMANDS))
    by_key, by_loss = _commands_by_key(draft), _commands_by_loss(draft, where)
    owners = [set(names.split()) for names in (*by_key.values(), *by_loss.values())]
    fitting = set.intersection(*owners) if owners else set()
    if owners and not fitting:
        keys = "; ".join(f"{key}: {names.replace(' ', ', ')}" for key, names in (by_key | by_loss).items())
        what = "keys of several of TRL's commands, and no command has them all"
        raise UserError(what, where=where, expected=f"keys of one ({keys})", advice="say which it is by `--method`")
    preferred = KEYS["rather"]
    likely = {name for name in fitting if preferred.get(name) not in fitting}
    if (named := _command_in_name(fitting, where)) and likely != {named}:
        fit = ", ".join(sorted(fitting - {named}))
        text = f"they fit {fit} as well; read as `trl {named}` by the file's name"
        draft.comments["method"] = f"by the file's name: its keys fit {fit} as well"
        draft.notes.append(Note("decided", (*(by_key or {"loss_type": ""}),), text))
        likely = {named}
    if len(likely) == 1:
        return _supported(likely.pop(), where)
    raise UserError(
        "TRL's command is not in the file, and its keys fit several",
        where=where,
        expected="--method " + " | ".join(name for name in COMMANDS if name in likely or not likely),
        advice="add the command that the file is run with, e.g. `--method dpo` for `trl dpo --config FILE`",
    )


def _commands_by_key(draft: Draft) -> dict[str, str]:
    """Those keys of the file that only some commands have -> these commands. Keys that are off do not count."""
    table = {key: names for names, keys in KEYS["told_by_keys"].items() for key in keys}
    by_key = {key: table[key] for key in draft.given if key in table and draft.look(key) not in (None, False)}
    if draft.look("lora_task_type") != "SEQ_CLS":
        by_key.pop("lora_task_type", None)
    return by_key


def _commands_by_loss(draft: Draft, where: str) -> dict[str, str]:
    """The file's losses -> the commands that have them. Raises UserError: no command has any of them."""
    table = {loss: names for names, losses in KEYS["told_by_losses"].items() for loss in losses}
    names = [name for name in listed(draft.look("loss_type", [])) if isinstance(name, str)]
    known = {name: table[name] for name in names if name in table}
    if names and not known:
        what = f"`loss_type: {names[0]}` has no counterpart in prefold, and none of TRL 1.16's losses has that name"
        raise UserError(what, where=where, expected="one of " + ", ".join(table))
    return known


def _command_in_name(fitting: set[str], where: str) -> str | None:
    """The command that the file's name contains, else the one that its folder's name contains."""
    path = Path(where)
    for part in (path.stem, path.parent.name):
        if len(named := fitting & {*re.split(r"[^a-z]+", part.lower())}) == 1:
            return named.pop()
    return None


def _supported(command: str, where: str) -> str:
    if command in COMMANDS:
        return command
    if command == "sft":
        raise supervised("a file for supervised fine-tuning", where)
    raise UserError(
        f"a file for TRL's `{command}` trainer, which has no counterpart in prefold",
        where=where,
        expected="a file for " + ", ".join(COMMANDS),
        advice="if it is for one of these, say so, e.g. `--method grpo`",
    )


# ---- data sets -----------------------------------------------------------------------------------------------------


def _write_data(draft: Draft, where: str) -> None:
    for key in filter(draft.has, ("chat_template", "chat_template_path")):
        write_template(draft, key)
    write_sources(draft, "datasets", "data.train")
    draft.section("dataset_mixture")
    # In a mixture, a weight is the share of a data set's own rows.
    write_sources(draft, "dataset_mixture.datasets", "data.train", shares=True)
    write_fraction(draft, "dataset_mixture.test_split_size")
    _write_mixer(draft)
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


def _write_mixer(draft: Draft) -> None:
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


TRL = Tool(KEYS, _write_losses, _write_data)
