"""Infers from its keys which of TRL's commands a file is for, since the file itself does not say."""

from __future__ import annotations

import re
from pathlib import Path

from prefold.errors import UserError
from prefold.importing.draft import Draft, Note
from prefold.importing.losses import supervised
from prefold.importing.tables import listed, read_tool

COMMANDS = ("dpo", "orpo", "cpo", "kto", "grpo", "reward")


def command_of(draft: Draft, where: str, method: str | None) -> str:
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
    preferred = read_tool("trl")["rather"]
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
    table = {key: names for names, keys in read_tool("trl")["told_by_keys"].items() for key in keys}
    by_key = {key: table[key] for key in draft.given if key in table and draft.look(key) not in (None, False)}
    if draft.look("lora_task_type") != "SEQ_CLS":
        by_key.pop("lora_task_type", None)
    return by_key


def _commands_by_loss(draft: Draft, where: str) -> dict[str, str]:
    """The file's losses -> the commands that have them. Raises UserError: no command has any of them."""
    table = {loss: names for names, losses in read_tool("trl")["told_by_losses"].items() for loss in losses}
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
