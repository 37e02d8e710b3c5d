"""Which losses a file asks for, and the settings of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import zip_longest
from typing import Any

from prefold.algorithms import ALGORITHMS
from prefold.errors import UserError
from prefold.importing.draft import Draft
from prefold.importing.tables import is_number, listed, read_tool


@dataclass(frozen=True)
class Loss:
    """One of prefold's methods, with settings that the other tool's loss of that name implies."""

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0

    def has(self, setting: str) -> bool:
        return setting in {known.name for known in fields(ALGORITHMS[self.method])}


OF_PAIRS = {name: Loss(**entry) for name, entry in read_tool("trl")["losses"].items()}
GRPO_LOSSES = {name: Loss("grpo") for name in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")}
# What TRL takes where the file is silent, as do the tools that train with it.
_DEFAULTS = {"beta": 0.1, "cpo_alpha": 1.0, "simpo_gamma": 0.5}
_GRPO_DEFAULTS = {"num_generations": 8, "max_completion_length": 512, "beta": 0.0}
THINKING = r"(?s)\A<think>(?!.*<think>).*?</think>"
OWN_REWARDS = "a function takes `completions` as texts, and the rows' columns by their names"


def supervised(what: str, where: str, choices: str = "") -> UserError:
    return UserError(
        what,
        where=where,
        expected=f"one that aligns with preferences, which is what prefold does{choices}",
        advice="with pairs, `method: orpo` does both at once; `method: sft` trains on their chosen answers",
    )


def known_loss(name: Any, losses: Mapping[str, Loss], key: str, where: str) -> Loss:
    if isinstance(name, str) and name in losses:
        return losses[name]
    raise UserError(
        f"`{key}: {name}` has no counterpart in prefold",
        where=where,
        expected="one of " + ", ".join(losses),
        advice="choose one of them in a copy of the file, or start from a built-in recipe (`prefold recipes`)",
    )


def write_losses(
    draft: Draft,
    losses: Sequence[Loss],
    settings: Mapping[str, str],
    keys: Sequence[str] = (),
    defaults: Mapping[str, Any] = _DEFAULTS,
) -> None:
    """Set method and settings.

    Args:
        losses: what is summed; several, or one with a weight, make `method: mixed`.
        settings: our setting -> the key that the file has for it.
        keys: those that chose the losses.
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
    """The settings that the file gives and a loss has. The others are noted."""
    given: dict[str, Any] = {}
    for name, key in settings.items():
        if not draft.has(key):
            continue
        value = draft.take(key)
        owners = [loss.method for loss in losses if loss.has(name)]
        idle = name == "f_alpha_divergence_coef" and draft.look("f_divergence_type") != "alpha_divergence"
        # EXO needs some smoothing; where there is none TRL takes the paper's, as prefold does.
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


# ---- what TRL's trainers can be asked for -----------------------------------------------------------------------


def write_dpo(
    draft: Draft, where: str, settings: Mapping[str, str], prefix: str = "", default: str = "sigmoid"
) -> None:
    """TRL's trainer of pairs, whose losses can be summed; `prefix`: of its keys."""
    type_key, weights_key = f"{prefix}loss_type", f"{prefix}loss_weights"
    weights = draft.look(weights_key)
    losses = [known_loss(name, OF_PAIRS, type_key, where) for name in listed(draft.look(type_key, default))]
    if isinstance(weights, list):
        losses = [replace(loss, weight=weight) for loss, weight in zip(losses, weights, strict=False)]
    keys = [key for key in ("rl", type_key, weights_key) if draft.has(key)]
    keys += add_supervised(draft, losses, "rpo_alpha")
    write_losses(draft, losses, settings, keys)


def add_supervised(draft: Draft, losses: list[Loss], key: str) -> list[str]:
    """The supervised loss with the weight that a key has; gives the key where it does so."""
    weight = draft.look(key)
    if not draft.has(key) or not is_number(weight) or weight <= 0:
        draft.off(key)
        return []
    losses.append(Loss("sft", weight=weight))
    return [key]


def write_simpo(draft: Draft, settings: Mapping[str, str]) -> None:
    """TRL's CPO trainer adds the supervised loss to SimPO's as well, with weight 1 where nothing is said."""
    alpha = draft.look("cpo_alpha", 1.0)
    losses = [Loss("simpo"), *([Loss("sft", weight=alpha)] if alpha else [])]
    write_losses(draft, losses, settings, [key for key in ("rl", "loss_type", "cpo_alpha") if draft.has(key)])
    if "cpo_alpha" not in draft.given:
        draft.comments["mixed.losses"] = "TRL adds the supervised loss with `cpo_alpha: 1.0` unless told otherwise"


def write_grpo(draft: Draft, where: str, prefix: str = "") -> None:
    loss_key, rewards_key = f"{prefix}loss_type", f"{prefix}reward_funcs"
    known_loss(draft.look(loss_key, "dapo"), GRPO_LOSSES, loss_key, where)
    if draft.look(loss_key) == "cispo":
        _write_cispo(draft, f"{prefix}epsilon")
    settings = {name: prefix + name for name in read_tool("trl")["settings"]["grpo"]}
    write_losses(draft, [Loss("grpo")], settings, [*filter(draft.has, ["rl"])], _GRPO_DEFAULTS)
    if draft.has(f"{prefix}scale_rewards"):
        value = draft.take(f"{prefix}scale_rewards")
        # It was a yes or no once.
        value = {"True": "group", "False": "none"}.get(str(value), value)
        draft.carry("grpo.scale_rewards", value, f"{prefix}scale_rewards")
    keys = [key for key in ("reward_model_name_or_path", rewards_key) if draft.has(key)]
    model, names = draft.take("reward_model_name_or_path"), listed(draft.take(rewards_key, []))
    rewards = [_reward_of(name) for name in names]
    rewards = [{"name": "reward_model", "model": model}, *rewards] if model else rewards
    write_rewards(draft, rewards, keys, f"{prefix}reward_weights")
    if lost := [str(name) for name in names if _reward_of(name) is None]:
        draft.note("missing", rewards_key, text=f"{', '.join(lost)}: write it as a function of your own")


def _write_cispo(draft: Draft, key: str) -> None:
    """It clips at `epsilon_high` alone, which TRL takes from `epsilon` where it is not given."""
    given = [*filter(draft.has, [key])]
    epsilon = draft.take(key, 0.2)
    if not draft.has(f"{key}_high"):
        draft.carry(
            "grpo.epsilon_high", epsilon, *given, comment="TRL's `epsilon`: the largest ratio that `cispo` keeps"
        )
    elif given:
        draft.note("off", *given)


def _reward_of(name: Any) -> dict[str, Any] | None:
    """A reward by TRL's name, by that of a model, or by its dotted name in Python; None if it is none of them."""
    if name in ("accuracy_reward", "reasoning_accuracy_reward"):
        return {"name": "symbolic_equality"}
    if name == "think_format_reward":
        return {"name": "regex", "pattern": THINKING}
    if "/" in str(name):
        return {"name": "reward_model", "model": name}
    module, dot, function = str(name).rpartition(".")
    return {"file": module.replace(".", "/") + ".py", "name": function} if dot else None


def write_rewards(draft: Draft, rewards: Sequence[dict[str, Any] | None], keys: Sequence[str], weights: str) -> None:
    """`rewards`: None where one has no counterpart; `weights`: the key with one number for each of them."""
    if numbers := listed(draft.take(weights, [])):
        pairs = zip_longest(rewards, numbers[: len(rewards)])
        rewards = [reward and reward | ({} if weight is None else {"weight": weight}) for reward, weight in pairs]
        draft.note("renamed", weights, text="`weight` of each of `rewards`")
    known = [reward for reward in rewards if reward]
    if known:
        draft.carry("rewards", known, *keys, comment=OWN_REWARDS if any("file" in reward for reward in known) else "")
    else:
        text = f"to write: the file names none that prefold knows. {OWN_REWARDS}"
        draft.carry("rewards", [{"file": "rewards.py", "name": "my_reward"}], comment=text)
