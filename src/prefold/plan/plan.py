"""What a run will take, before it starts: memory by part, tokens, FLOPs, disk; what fits; what to change.

Memory is found by performing the engine's own passes on a model without contents (`passes.py`), so it follows the code.
Nothing is downloaded but the configuration and the tokenizer.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from prefold.data.findings import Finding
from prefold.launch import launched
from prefold.models.device import choose_device, choose_dtype
from prefold.models.load import tokenizer_of
from prefold.models.merge import merge_dtype
from prefold.plan import timing
from prefold.plan.flops import Order, Steps, Tokens, plain_size, scoring_flops, training_flops, with_completions
from prefold.plan.memory import CONTEXT, Machine, Memory, Parts, Rows, peak, this_machine
from prefold.plan.meta_model import Blueprint, config_of
from prefold.plan.passes import Lengths, training_pass
from prefold.recipe import RecipeBase, as_dict, make_recipe
from prefold.trees.memory import CPU_TOKENS, budget_for
from prefold.trees.self_check import obstacle, stretched_positions

STEP_OF_BUDGETS = 64
WORTH_TIMING = 1e12
"""FLOPs that take a few seconds on a CPU."""
SPREAD = (
    "`train.fsdp` divides the weights by the processes that were started, `model.device_map` by devices that are not "
    "counted here"
)
UNTIMED = ("tasks", "compare_with", "win_rate")
"""Of the section `evaluate`: what they take depends on what is asked of whom."""
CHECKED = 3
"""Trees of the self-check; merging compares logits on as many."""


@dataclass(frozen=True)
class Disk:
    """Bytes that a run leaves in its folder and in the cache, and those that are `free` where the folder is."""

    checkpoints: int
    adapter: int
    merged: int
    reference: int
    free: int

    @property
    def needed(self) -> int:
        return self.checkpoints + self.adapter + self.merged + self.reference


@dataclass(frozen=True)
class Change:
    """Fields by dotted path that bring a run into the memory at hand, or as near as they can."""

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
        return [f"{dotted}={yaml.safe_dump(value).splitlines()[0]}" for dotted, value in self.fields.items()]


@dataclass(frozen=True)
class Plan:
    """`memory` is the peak of each phase by part, in bytes. `max_tokens` is the recipe's, `budget` what it means on the
    device, `largest_budget` the largest that fits, None if no budget does. `spread`: the weights go to several devices,
    of which the plan knows no more than the processes that were started. `seconds` were measured, or None; `untimed` is
    not in them."""

    optimizer_steps: int
    batch_size: int
    max_tokens: int | str
    budget: int
    largest_budget: int | None
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
    change: Change | None = None
    seconds: dict[str, float] | None = None

    @property
    def peaks(self) -> dict[str, int]:
        return {phase: peak(parts) for phase, parts in self.memory.items()}

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.at_hand

    def as_json(self) -> dict[str, Any]:
        change = self.change and {**asdict(self.change), "yaml": self.change.yaml, "overrides": self.change.overrides}
        more = {"peaks": self.peaks, "peak": self.peak, "fits": self.fits}
        disk = {**asdict(self.disk), "needed": self.disk.needed}
        return {**asdict(self), **more, "disk": disk, "change": change}

    def findings(self) -> list[Finding]:
        """What of the plan cannot be."""
        found = []
        if not self.fits:
            found.append(self._does_not_fit())
        if self.disk.needed > self.disk.free:
            message = f"the run leaves {gigabytes(self.disk.needed)} on disk, {gigabytes(self.disk.free)} are free"
            advice = "make room, take another `output_dir`, or lower `train.save_total_limit`"
            found.append(Finding("disk", "warning", 1, (), message, advice))
        return found

    def _does_not_fit(self) -> Finding:
        phase = max(self.peaks, key=self.peaks.__getitem__)
        message = f"`{phase}` takes {gigabytes(self.peak)} of memory, {gigabytes(self.at_hand)} are at hand"
        if self.memory["train"]["weights"] > self.at_hand and not self.spread:
            message = f"the weights alone take {gigabytes(self.memory['train']['weights'])}, " + message.split(", ")[-1]
            return Finding("memory", "error", 1, (), message, self._advice())
        return Finding("memory", "warning", 1, (), message, self._advice())

    def _advice(self) -> str:
        spread = f"{SPREAD}; " if self.spread else ""
        if self.change is None:
            return f"{spread}no field of the recipe changes that: take a smaller model, or a machine with more memory"
        what = "this fits" if self.change.fits else "this comes nearest"
        return f"{spread}{what}: {' '.join(self.change.overrides)}"


def make_plan(
    recipe: RecipeBase,
    train: Sequence[Lengths],
    held_out: Sequence[Lengths],
    order: Order,
    device_memory: int | None = None,
    measure: bool | None = False,
) -> Plan:
    """Plan a run.

    Args:
        train: lengths of the trees to train on; of prompts alone where completions are sampled.
        held_out: of the held-out ones.
        order: which of the trees each optimizer step covers.
        device_memory: bytes of a GPU to plan for; unset: this machine.
        measure: time the engine on this machine; None: unless the run itself is shorter.

    Raises:
        UserError: the model's configuration cannot be had.
    """
    device = "cuda" if device_memory else choose_device().type
    machine = Machine(device, device_memory, CONTEXT) if device_memory else this_machine(device)
    steps = Steps(with_completions(recipe, train), order, sampled=recipe.algorithm.kind.samples)
    planner = Planner(recipe, config_of(recipe.model), machine, steps, held_out)
    plan = planner.plan()
    if measure or (measure is None and plan.flops > WORTH_TIMING):
        plan = replace(plan, seconds=planner.seconds())
    return plan if plan.fits else planner.with_change(plan)


class Planner:
    """Plans of one run on one machine, with the recipe as it is and changed."""

    def __init__(self, recipe: RecipeBase, config: Any, machine: Machine, steps: Steps, held_out: Sequence[Lengths]):
        self.recipe, self.config, self.machine, self.steps, self.held_out = recipe, config, machine, steps, held_out
        on_gpu = machine.device == "cuda" and not torch.cuda.is_available()
        dtype = torch.bfloat16 if on_gpu and recipe.model.dtype == "auto" else None
        self.blueprint = Blueprint(recipe, config, dtype or choose_dtype(recipe.model.dtype, choose_device()))
        self.packed = recipe.model.attn_implementation in ("auto", "trees") and self._why_plain() is None

    def _why_plain(self) -> str | None:
        base = self.blueprint.base(torch.float32, 1)
        longest = max(tree[0] + max(tree[1:], default=0) for tree in self.steps.trees)
        return stretched_positions(base, longest) or obstacle(base)

    @property
    def budget(self) -> int:
        setting, train = self.recipe.train.max_tokens, self.recipe.train
        if setting != "auto":
            return int(setting)
        if self.machine.device != "cuda":
            return CPU_TOKENS
        sizes, shards = self.blueprint.sizes, self.blueprint.shards
        trained = sizes.trained_bytes // (shards if self.recipe.lora == "none" else 1)
        weights = sizes.weights // shards + trained
        return budget_for(self.config, weights, self.machine.memory, train.gradient_checkpointing)

    def memory(self) -> Memory:
        row = self.steps.fullest_row(self.budget, self.packed)
        scored = [tree for tree in self.held_out if len(tree) > 1]
        evaluation = Steps(scored, [range(len(scored))]).fullest_row(self.budget, self.packed) if scored else []
        by_size = sorted(self.steps.trees, key=sum)
        checked = [*by_size[: CHECKED - 1], by_size[len(by_size) // 2]]
        prompt = max(tree[0] for tree in (*self.steps.trees, *self.held_out))
        return Memory(self.blueprint, self.machine, Rows(row, evaluation, checked, prompt), self.budget, self.packed)

    def plan(self) -> Plan:
        recipe, sizes, memory = self.recipe, self.blueprint.sizes, self.memory()
        phases = memory.phases()
        tokens = self.steps.tokens(recipe.algorithm.scores_prompt)
        return Plan(
            optimizer_steps=len(self.steps.order),
            batch_size=recipe.train.batch_size,
            max_tokens=recipe.train.max_tokens,
            budget=self.budget,
            largest_budget=self.largest_budget(memory, phases),
            device=self.machine.device,
            dtype=str(self.blueprint.dtype).removeprefix("torch."),
            at_hand=self.machine.memory,
            packed=self.packed,
            spread=recipe.train.fsdp or recipe.model.device_map is not None,
            parameters=sizes.parameters,
            trained=sizes.trained,
            weights=phases["train"]["weights"],
            memory=phases,
            tokens=self._computed(tokens),
            plain_tokens=tokens.plain,
            flops=self.flops(tokens),
            disk=self.disk(memory),
            untimed=[name for name in UNTIMED if getattr(recipe.evaluate, name)],
        )

    def flops(self, tokens: Tokens) -> float:
        """Of training, the reference included; sampling not."""
        total = training_flops(self.blueprint, tokens, self._computed(tokens))
        if self.recipe.algorithm.needs_reference:
            once = self._referenced()
            total += scoring_flops(self.blueprint, once, self._computed(once))
        return total

    def seconds(self) -> dict[str, float]:
        """Of each phase, as measured on this machine; sampled completions at their full length. Loading and merging,
        which are copying, are not in it, nor is what `untimed` names."""
        recipe, layers, processes = self.recipe, self.blueprint.layers, launched()
        algorithm, settings = recipe.algorithm, recipe.evaluate
        asked = settings.prompts if isinstance(settings.prompts, int) else len(settings.prompts)
        answers = 0 if algorithm.kind.scores else asked * settings.num_answers
        draws = algorithm.draws
        groups = draws.num_generations * recipe.train.batch_size if draws else 0
        dtype = torch.float32 if self.machine.device == "cpu" else self.blueprint.dtype
        rows = max((groups or answers) // processes, 1)
        trees, held_out = self.steps.trees, Tokens.of([tree for tree in self.held_out if len(tree) > 1])
        rates = timing.measure(self.blueprint, trees, self.packed, dtype, rows, tokenizer_of(recipe.model))

        def scored(rate: timing.Rate, tokens: Tokens) -> float:
            return rate.seconds(self._computed(tokens), tokens.scored, layers)

        def written(completions: int, tokens: int) -> float:
            return (max(completions / rates.rows, 1.0) if completions else 0.0) * tokens * rates.decoding

        found = {"train": scored(rates.training, self.steps.tokens(algorithm.scores_prompt))}
        found["train"] += self._measurements() * scored(rates.reference, held_out)
        if algorithm.needs_reference:
            found["reference"] = scored(rates.reference, self._referenced())
        once = scored(rates.evaluation, held_out) + written(answers, settings.max_new_tokens)
        if draws:
            rollouts = -(-len(self.steps.order) // algorithm.iterations)
            found["rollouts"] = written(rollouts * groups, draws.max_completion_length)
            once += written(len(self.held_out), draws.max_completion_length)
        # A model that scores answers is measured after training alone.
        found["evaluate"] = once if algorithm.kind.scores else 2 * once
        alone = ("evaluate",) if recipe.train.fsdp else ()
        return {phase: round(found[phase] / (1 if phase in alone else processes), 1) for phase in found}

    def _referenced(self) -> Tokens:
        """What the reference scores: stored completions once, sampled ones once for each rollout."""
        recipe = self.recipe
        if recipe.algorithm.kind.data != "prompts":
            return Tokens.of([*self.steps.trees, *(self.held_out if recipe.train.eval_steps else ())])
        return Tokens(*(number // recipe.algorithm.iterations for number in astuple(self.steps.tokens(False))))

    def _measurements(self) -> int:
        """Of the held-out data while training."""
        every, steps = self.recipe.train.eval_steps, len(self.steps.order)
        return steps // math.ceil(every if every >= 1 else every * steps) if every else 0

    def _computed(self, tokens: Tokens) -> int:
        return tokens.unique if self.packed else tokens.plain

    def largest_budget(self, memory: Memory, phases: dict[str, Parts]) -> int | None:
        """Activations grow with the tokens of a row; a row of half the lengths says by how much."""
        row = memory.rows.training
        half = [tuple(max(1, length // 2) for length in tree) for tree in row]
        whole, less = memory.row_bytes, sum(training_pass(self.blueprint, half, self.budget, memory.attention))
        size = sum if self.packed else plain_size
        tokens, fewer = (sum(map(size, trees)) for trees in (row, half))
        slope = max((whole - less) / max(tokens - fewer, 1), 1.0)
        parts, with_slack = phases["train"], 1 + memory.slack
        room = self.machine.memory - (peak(parts) - with_slack * (parts["activations"] + parts["head"]))
        fitting = int(tokens + (room / with_slack - whole) / slope)
        largest = max(map(size, self.steps.trees))
        rounded = fitting // STEP_OF_BUDGETS * STEP_OF_BUDGETS
        return None if fitting < largest else max(rounded, largest)

    def disk(self, memory: Memory) -> Disk:
        sizes, settings = self.blueprint.sizes, self.recipe.train
        states, _ = memory.optimizer()
        # One more than are kept while the newest is written, and the best one beside the last.
        kept = min(settings.save_total_limit, -(-len(self.steps.order) // settings.save_steps))
        kept += 1 + int(settings.load_best_model_at_end)
        algorithm, scored = self.recipe.algorithm, 0
        if algorithm.needs_reference and algorithm.kind.data != "prompts":
            sets = [self.steps.trees, *([self.held_out] if settings.eval_steps else [])]
            scored = sum(Tokens.of(trees).scored for trees in sets)
        return Disk(
            checkpoints=kept * (sizes.trained_bytes + states),
            adapter=sizes.trained_bytes,
            merged=sizes.parameters * merge_dtype(self.recipe, self.blueprint.dtype).itemsize,
            reference=4 * scored,
            free=free_disk(self.recipe.run_folder),
        )

    # ---- what to change ----

    def with_change(self, plan: Plan) -> Plan:
        """The plan with the fewest of the changes, in this order, that make it fit. What leaves the peak as it is,
        because another phase is higher, may be what is needed once that one is lower."""
        values, fields = as_dict(self.recipe), dict[str, Any]()
        best: Change | None = None
        for change in 2 * self._candidates(plan):
            if change.keys() <= fields.keys():
                continue
            changed = self._changed(values, fields | change)
            found = changed.plan()
            if found.peak >= (best.peak if best else plan.peak) and not found.fits:
                continue
            fields |= change
            best = Change(dict(fields), found.peak, found.fits)
            if not found.fits and found.largest_budget and found.largest_budget < found.budget:
                smaller = {**fields, "train.max_tokens": found.largest_budget}
                found = self._changed(values, smaller).plan()
                best = Change(smaller, found.peak, True) if found.fits else best
            if best.fits:
                break
        return replace(plan, change=best)

    def _candidates(self, plan: Plan) -> list[dict[str, Any]]:
        recipe, model = self.recipe, self.recipe.model
        longest = max(tree[0] + max(tree[1:], default=0) for tree in self.steps.trees)
        whole = recipe.lora == "none"
        four_bits = {"model.load_in_4bit": True, **({"model.load_in_8bit": False} if model.load_in_8bit else {})}
        smaller = plan.largest_budget is not None and plan.largest_budget < plan.budget
        offered: list[tuple[bool, dict[str, Any]]] = [
            (smaller, {"train.max_tokens": plan.largest_budget}),
            (self.blueprint.dtype == torch.float32 and not whole, {"model.dtype": "bfloat16"}),
            (not recipe.train.gradient_checkpointing, {"train.gradient_checkpointing": True}),
            (whole and "8bit" not in recipe.train.optim, {"train.optim": "adamw_8bit"}),
            (not whole and not model.load_in_4bit and not recipe.train.fsdp, four_bits),
            (merge_dtype(self.recipe, self.blueprint.dtype) == torch.float32, {"merge.dtype": "bfloat16"}),
            (longest > STEP_OF_BUDGETS and recipe.algorithm.kind.data != "prompts", {"data.max_length": longest // 2}),
        ]
        return [change for useful, change in offered if useful]

    def _changed(self, values: dict[str, Any], fields: dict[str, Any]) -> Planner:
        changed = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
        for dotted, value in fields.items():
            section, field = dotted.split(".")
            changed[section][field] = value
        recipe = make_recipe(changed)
        steps, held_out = self.steps, self.held_out
        if "data.max_length" in fields:
            steps, held_out = self._without_overlong(fields["data.max_length"])
        return Planner(recipe, self.config, self.machine, steps, held_out)

    def _without_overlong(self, longest: int) -> tuple[Steps, list[Lengths]]:
        """As if no tree were longer: those that are take the lengths that remain."""

        def cut(tree: Lengths) -> Lengths:
            return tuple(min(length, longest // 2) for length in tree)

        trees = [cut(tree) for tree in self.steps.trees]
        return Steps(trees, self.steps.order), [cut(tree) for tree in self.held_out]


def free_disk(folder: Path) -> int:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"
