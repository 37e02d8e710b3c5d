"""Which losses a file asks for, and the settings of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import zip_longest
from typing import Any, TypeVar

from prefold.algorithms import ALGORITHMS
from prefold.errors import UserError
from prefold.importing.draft import Draft
from prefold.importing.tables import is_number, listed, read_tool

T = TypeVar("T")


@dataclass(frozen=True)
class Loss:
    """One of prefold's methods, with settings that the other tool's loss of that name implies."""

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0

    def has(self, setting: str) -> bool:
        return setting in {known.name for known in fields(ALGORITHMS[self.method])}


def losses_of(table: Mapping[str, Any]) -> dict[str, Loss]:
    return {name: Loss(**entry) for name, entry in table.items()}


TRL = read_tool("trl")
LOSSES = {command: losses_of(table) for command, table in TRL["losses"].items()}
"""The losses of TRL's commands, by their names; the first is the default."""
OWN_REWARDS = "a function takes `completions` as texts, and the rows' columns by their names"


def supervised(what: str, where: str, choices: str = "") -> UserError:
    return UserError(
        what,
        where=where,
        expected=f"one that aligns with preferences, which is what prefold does{choices}",
        advice="with pairs, `method: orpo` does both at once; `method: sft` trains on their chosen answers",
    )


def known(name: Any, table: Mapping[str, T], key: str, where: str) -> T:
    """The table's entry for the value of a key. Raises UserError: there is none."""
    if isinstance(name, str) and name in table:
        return table[name]
    advice = "choose one of them in a copy of the file, or start from a built-in recipe (`prefold recipes`)"
    if name == "ppo":
        advice = "GRPO does PPO's job without a value model: `prefold recipes smolgrpo`"
    expected = "one of " + ", ".join(table)
    raise UserError(f"`{key}: {name}` has no counterpart in prefold", where=where, expected=expected, advice=advice)


def require_method(method: str | None, given: Any, key: str, where: str) -> None:
    """Raises UserError: `--method` is not what the file says."""
    if method not in (None, given):
        raise UserError(f"`--method {method}`, and the file says `{key}: {given}`", where=where, advice="leave it out")


def write_losses(
    draft: Draft,
    losses: Sequence[Loss],
    settings: Mapping[str, str],
    keys: Sequence[str] = (),
    defaults: Mapping[str, Any] = TRL["loss_defaults"]["any"],
) -> None:
    """Set method and settings.

    Args:
        losses: those to sum; several, or one with a weight, make `method: mixed`.
        settings: prefold's setting -> its key in the file.
        keys: those that chose the losses.
        defaults: the settings where neither the file nor the loss has them.
    """
    single = len(losses) == 1 and losses[0].weight == 1
    method = losses[0].method if single else "mixed"
    draft.values["method"] = method
    if keys:
        draft.note("renamed", *keys, text=f"method: {method}")
    given = _settings_in(draft, losses, settings, "" if single else "mixed.losses")
    values = [
        {name: value for name, value in {**defaults, **loss.settings, **given}.items() if loss.has(name)}
        for loss in losses
    ]
    if not single:
        draft.values["mixed.losses"] = [
            {"name": loss.method, "weight": loss.weight, **own} for loss, own in zip(losses, values, strict=True)
        ]
        return
    for name, value in values[0].items():
        if name in given:
            draft.carry(f"{method}.{name}", value, settings[name])
        elif name in losses[0].settings:
            draft.carry(f"{method}.{name}", value, comment=f"as {draft.tool} has it")
        else:
            draft.fill(f"{method}.{name}", value)


def _settings_in(draft: Draft, losses: Sequence[Loss], settings: Mapping[str, str], mixed: str) -> dict[str, Any]:
    """The settings that the file gives and a loss has. Others are noted as off or missing."""
    given: dict[str, Any] = {}
    for name, key in settings.items():
        if not draft.has(key):
            continue
        value = draft.take(key)
        owners = [loss.method for loss in losses if loss.has(name)]
        idle = name == "f_alpha_divergence_coef" and draft.look("f_divergence_type") != "alpha_divergence"
        # EXO needs some smoothing; without it TRL takes that of the paper, as prefold does.
        idle = idle or (name == "label_smoothing" and losses[0].method == "exo" and not value)
        if idle or not owners:
            no_use = value is False or value in (0, "reverse_kl")
            used = f"`{losses[0].method}` has no such setting" if not owners else "it would change nothing here"
            draft.note("off" if no_use else "missing", key, text="" if no_use else used)
            continue
        given[name] = value
        if mixed:
            draft.note("renamed", key, text=f"`{name}` of {', '.join(owners)} in {mixed}")
    return given


def add_supervised(draft: Draft, losses: list[Loss], key: str) -> list[str]:
    """Append the supervised loss with the weight that a key gives; returns the key if it did."""
    weight = draft.look(key)
    if not draft.has(key) or not is_number(weight) or weight <= 0:
        draft.off(key)
        return []
    losses.append(Loss("sft", weight=weight))
    return [key]


# ---- the losses of TRL's trainers, which other tools train with -------------------------------------------------


def write_command(
    draft: Draft,
    where: str,
    command: str,
    keys: Mapping[str, Any],
    chosen_by: Sequence[str] = (),
    default: str | None = None,
) -> None:
    """Losses and settings of one of TRL's commands.

    Args:
        keys: the tool's file of tables. `settings`: those of each command; `prefixes`: what their keys begin with;
            `loss_defaults`: where the tool's are not TRL's; `beta`: keys of `beta`, if not that of the command.
        chosen_by: keys that chose the command.
        default: the loss if the file names none, unless it is TRL's default.
    """
    prefix, names = keys.get("prefixes", {}).get(command, ""), LOSSES.get(command, {})
    loss_key, weights_key = f"{prefix}loss_type", f"{prefix}loss_weights"
    defaults = TRL["loss_defaults"]["any"] | TRL["loss_defaults"].get(command, {})
    defaults |= keys.get("loss_defaults", {}).get(command, {})
    losses, chosen = [Loss(command)], [*chosen_by]
    if names:
        wanted = draft.look(loss_key, default or next(iter(names)))
        wanted = listed(wanted) if command == "dpo" else [wanted]
        losses = [known(name, names, loss_key, where) for name in wanted]
        chosen.append(loss_key)
    if command == "dpo":
        if isinstance(weights := draft.look(weights_key), list):
            losses = [replace(loss, weight=weight) for loss, weight in zip(losses, weights, strict=False)]
        chosen += [weights_key, *add_supervised(draft, losses, "rpo_alpha")]
    if losses[0].method == "simpo":
        # TRL's trainer adds the supervised loss to SimPO's as well, with weight 1 where nothing is said.
        command, alpha = "simpo", draft.look("cpo_alpha", 1.0)
        losses += [Loss("sft", weight=alpha)] if alpha else []
        chosen += ["loss_type", "cpo_alpha"]
        if "cpo_alpha" not in draft.given:
            draft.comments["mixed.losses"] = "TRL adds the supervised loss with `cpo_alpha: 1.0` unless told otherwise"
    settings = {}
    if (betas := keys.get("beta")) and command != "grpo":
        settings["beta"] = next(filter(draft.has, betas), betas[0])
    for entry in (table := keys["settings"][command]):
        settings[entry] = prefix + (table[entry] if isinstance(table, Mapping) else entry)
    if command == "grpo" and draft.look(loss_key) == "cispo":
        _write_cispo(draft, f"{prefix}epsilon")
    chosen = [key for key in dict.fromkeys(chosen) if draft.has(key) and key not in settings.values()]
    write_losses(draft, losses, settings, chosen, defaults)
    if command == "grpo":
        _write_rewards(draft, keys, prefix)


def _write_cispo(draft: Draft, key: str) -> None:
    """CISPO clips only at `epsilon_high`, which TRL takes from `epsilon` if it is not given."""
    given = [*filter(draft.has, [key])]
    epsilon = draft.take(key, 0.2)
    if not draft.has(f"{key}_high"):
        comment = "TRL's `epsilon`: the largest ratio that `cispo` keeps"
        draft.carry("grpo.epsilon_high", epsilon, *given, comment=comment)
    elif given:
        draft.note("off", *given)


def _write_rewards(draft: Draft, keys: Mapping[str, Any], prefix: str) -> None:
    """The section `rewards`, and how rewards are scaled and weighted."""
    scale_key, weights_key = f"{prefix}scale_rewards", f"{prefix}reward_weights"
    if draft.has(scale_key):
        value = draft.take(scale_key)
        # It was a boolean in older versions.
        draft.carry("grpo.scale_rewards", {"True": "group", "False": "none"}.get(str(value), value), scale_key)
    own, given = TRL["rewards"] | keys.get("rewards", {}), [*filter(draft.has, keys["reward_keys"])]
    names = [(key, name) for key in given for name in listed(draft.take(key))]
    rewards = [_reward_of(name, own, "reward_model" in key) for key, name in names]
    lost = [(key, str(name)) for (key, name), reward in zip(names, rewards, strict=True) if reward is None]
    if numbers := listed(draft.take(weights_key, [])):
        pairs = zip_longest(rewards, numbers[: len(rewards)])
        rewards = [reward and reward | ({} if weight is None else {"weight": weight}) for reward, weight in pairs]
        draft.note("renamed", weights_key, text="`weight` of each of `rewards`")
    if usable := [reward for reward in rewards if reward]:
        comment = OWN_REWARDS if any("file" in reward for reward in usable) else ""
        draft.carry("rewards", usable, *given, comment=comment)
    else:
        text = f"to write: the file names none that prefold knows. {OWN_REWARDS}"
        draft.carry("rewards", [{"file": "rewards.py", "name": "my_reward"}], comment=text)
    if lost:
        text = f"{', '.join(name for _, name in lost)}: write it as a function of your own"
        draft.note("missing", *dict.fromkeys(key for key, _ in lost), text=text)


def _reward_of(name: Any, own: Mapping[str, Any], is_model: bool) -> dict[str, Any] | None:
    """A reward by the tool's name, by that of a model, or by its dotted name in Python; None if it is none of them."""
    if is_model or "/" in str(name):
        return {"name": "reward_model", "model": name}
    if str(name) in own:
        return dict(own[str(name)])
    module, dot, function = str(name).rpartition(".")
    return {"file": module.replace(".", "/") + ".py", "name": function} if dot else None
