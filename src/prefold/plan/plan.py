"""What a run will take, before it starts: memory by part, tokens, FLOPs, disk; what fits; what to change."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import yaml

from prefold.data.findings import Finding
from prefold.memory import anyway, gigabytes

Parts = dict[str, int]
"""Bytes by what they are used for."""
STEP_OF_BUDGETS = 64
SPREAD = (
    "`train.fsdp` divides the weights by the processes that were started, `model.device_map` by devices that are not "
    "counted here"
)


@dataclass(frozen=True)
class Disk:
    """Bytes that a run leaves in its folder and in the cache, and the bytes `free` where the folder is."""

    checkpoints: int
    adapter: int
    merged: int
    reference: int
    free: int

    @property
    def needed(self) -> int:
        return self.checkpoints + self.adapter + self.merged + self.reference


@dataclass(frozen=True)
class Growth:
    """Bytes that training takes for rows of `tokens` tokens: `fixed + per_token * tokens`. `longest`: tokens of the
    largest tree, which every budget must hold."""

    fixed: float
    per_token: float
    longest: int

    def largest(self, at_hand: int) -> int | None:
        """Tokens of the largest rows that fit; None if none do."""
        fitting = int((at_hand - self.fixed) / self.per_token)
        return None if fitting < self.longest else max(fitting // STEP_OF_BUDGETS * STEP_OF_BUDGETS, self.longest)


@dataclass(frozen=True)
class Change:
    """Fields, by dotted path, that make a run fit the memory at hand, or bring it as near as possible; `peak`: bytes
    that it then takes."""

    fields: dict[str, Any]
    peak: int
    fits: bool

    @property
    def yaml(self) -> str:
        """The lines to write in the recipe."""
        sections: dict[str, dict[str, Any]] = {}
        for dotted, value in self.fields.items():
            section, field = dotted.split(".")
            sections.setdefault(section, {})[field] = value
        return yaml.safe_dump(sections, sort_keys=False)

    @property
    def overrides(self) -> list[str]:
        """The same for the command line."""
        return overrides_of(self.fields)


def overrides_of(fields: dict[str, Any]) -> list[str]:
    return [f"{dotted}={yaml.safe_dump(value).splitlines()[0]}" for dotted, value in fields.items()]


@dataclass(frozen=True)
class Plan:
    """`memory` is the peak of each phase by part, in bytes. `max_tokens` is the recipe's, `budget` what it means on the
    device. `spread`: the weights are spread over several devices, of which the plan knows only the number of started
    processes. `seconds` are measured, by phase, or None; `untimed` names what they leave out. `host`: bytes of RAM that
    loading and merging take where the device has memory of its own. `in_16_bits`: models are evaluated with weights in
    16 bits, each module widened for its call, since float32 would not fit."""

    optimizer_steps: int
    batch_size: int
    max_tokens: int | str
    budget: int
    growth: Growth
    device: str
    dtype: str
    at_hand: int
    packed: bool
    spread: bool
    parameters: int
    trained: int
    weights: int
    memory: dict[str, Parts]
    tokens: int
    plain_tokens: int
    flops: float
    disk: Disk
    untimed: list[str]
    in_16_bits: bool = False
    host: int = 0
    change: Change | None = None
    seconds: dict[str, float] | None = None

    @property
    def peaks(self) -> dict[str, int]:
        return {phase: sum(parts.values()) for phase, parts in self.memory.items()}

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.at_hand

    @property
    def largest_budget(self) -> int | None:
        """The largest token budget that fits; None if none does."""
        return self.growth.largest(self.at_hand)

    def as_json(self) -> dict[str, Any]:
        change = self.change and {**asdict(self.change), "yaml": self.change.yaml, "overrides": self.change.overrides}
        more = {name: getattr(self, name) for name in ("largest_budget", "peaks", "peak", "fits")}
        disk = {**asdict(self.disk), "needed": self.disk.needed}
        plan = {**asdict(self), **more, "disk": disk, "change": change}
        del plan["growth"]
        return plan

    def findings(self) -> list[Finding]:
        """Findings where memory or disk does not suffice."""
        findings = []
        if not self.fits:
            phase = max(self.peaks, key=self.peaks.__getitem__)
            message = f"`{phase}` takes {gigabytes(self.peak)} of memory, {gigabytes(self.at_hand)} are at hand"
            hopeless = self.weights > self.at_hand and not self.spread and not anyway()
            if hopeless:
                message = f"the weights alone take {gigabytes(self.weights)}, {gigabytes(self.at_hand)} are at hand"
            findings.append(Finding("memory", "error" if hopeless else "warning", 1, (), message, self.advice()))
        if self.disk.needed > self.disk.free:
            message = f"the run leaves {gigabytes(self.disk.needed)} on disk, {gigabytes(self.disk.free)} are free"
            advice = "make room, take another `output_dir`, or lower `train.save_total_limit`"
            findings.append(Finding("disk", "warning", 1, (), message, advice))
        return findings

    def advice(self) -> str:
        spread = f"{SPREAD}; " if self.spread else ""
        if self.change is None:
            return f"{spread}no field of the recipe changes that: take a smaller model, or a machine with more memory"
        what = "this fits" if self.change.fits else "this comes nearest"
        return f"{spread}{what}: {' '.join(self.change.overrides)}"
