"""Which losses a file asks for, and the settings of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from prefold.algorithms import ALGORITHMS
from prefold.errors import UserError
from prefold.importing.draft import Draft


@dataclass(frozen=True)
class Loss:
    """One of prefold's methods, with settings that the other tool's loss of that name implies."""

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0

    def has(self, setting: str) -> bool:
        return setting in {one.name for one in fields(ALGORITHMS[self.method])}


# The names that TRL gives to the losses of its DPO trainer. Until 1.0 it called `aot_unpaired` `aot_pair`.
OF_PAIRS = {
    "sigmoid": Loss("dpo"),
    "sigmoid_norm": Loss("sigmoid_norm"),
    "hinge": Loss("hinge"),
    "ipo": Loss("ipo"),
    "robust": Loss("robust", {"label_smoothing": 0.0}),
    "exo_pair": Loss("exo"),
    "nca_pair": Loss("nca"),
    "bco_pair": Loss("bco", {"reward_shift": False}),
    "sppo_hard": Loss("sppo"),
    "aot": Loss("aot"),
    "aot_unpaired": Loss("aot_unpaired"),
    "aot_pair": Loss("aot_unpaired"),
    "apo_zero": Loss("apo_zero"),
    "apo_down": Loss("apo_down"),
    "discopop": Loss("discopop"),
    "sft": Loss("sft"),
}


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
    defaults: Mapping[str, Any],
    keys: Sequence[str] = (),
) -> None:
    """Set method and settings.

    Args:
        losses: what is summed; several, or one with a weight, make `method: mixed`.
        settings: our setting -> the key that the file has for it.
        defaults: our setting -> what the other tool takes where the file is silent.
        keys: those that chose the losses.
    """
    single = len(losses) == 1 and losses[0].weight == 1
    method = losses[0].method if single else "mixed"
    draft.values["method"] = method
    if keys:
        draft.note("renamed", *keys, text=f"method: {method}")
    found = _settings_in(draft, losses, settings, "" if single else "mixed.losses")
    parts = [_part(draft, loss, found, defaults) for loss in losses]
    if not single:
        draft.values["mixed.losses"] = [
            {"name": loss.method, "weight": loss.weight, **part} for loss, part in zip(losses, parts, strict=True)
        ]
        return
    for name, value in parts[0].items():
        if name in found:
            draft.carry(f"{method}.{name}", value, settings[name])
        elif name in losses[0].settings:
            draft.carry(f"{method}.{name}", value, comment=f"as {draft.tool} has it")
        else:
            draft.fill(f"{method}.{name}", value)


def _part(draft: Draft, loss: Loss, found: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    values = {**defaults, **loss.settings, **found}
    return {name: value for name, value in values.items() if loss.has(name)}


def _settings_in(draft: Draft, losses: Sequence[Loss], settings: Mapping[str, str], mixed: str) -> dict[str, Any]:
    """The settings that the file gives and a loss has. The others are noted."""
    found: dict[str, Any] = {}
    for name, key in settings.items():
        if not draft.has(key):
            continue
        value = draft.take(key)
        owners = [loss.method for loss in losses if loss.has(name)]
        if not owners or _idle(draft, losses, name, value):
            no_use = value is False or value in (0, "reverse_kl")
            used = f"`{losses[0].method}` has no such setting" if not owners else "it would change nothing here"
            draft.note("off" if no_use else "missing", key, text="" if no_use else used)
            continue
        found[name] = value
        if mixed:
            draft.note("renamed", key, text=f"`{name}` of {', '.join(owners)} in {mixed}")
    return found


def _idle(draft: Draft, losses: Sequence[Loss], name: str, value: Any) -> bool:
    if name == "f_alpha_divergence_coef":
        return bool(draft.look("f_divergence_type") != "alpha_divergence")
    # EXO needs some smoothing; where there is none TRL takes the paper's, as prefold does.
    return name == "label_smoothing" and losses[0].method == "exo" and not value
