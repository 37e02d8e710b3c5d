"""From a recipe and the lengths of its trees to its plan.

Memory is counted by running the engine's own passes on fake tensors (`passes.py`), so it follows the code. Only the
configuration and the tokenizer are downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from prefold.device import choose_device, choose_dtype
from prefold.launch import launched
from prefold.models.merge import merge_dtype
from prefold.models.tokenizer import tokenizer_of
from prefold.plan import timing
from prefold.plan.flops import Steps, Tokens, plain_size, scoring_flops, training_flops, with_completions
from prefold.plan.machine import Machine, free_disk
from prefold.plan.memory import Memory, Rows, number_of_prompts
from prefold.plan.meta_model import MetaModel, config_of
from prefold.plan.passes import Lengths, training_pass
from prefold.plan.plan import STEP_OF_BUDGETS, Change, Disk, Growth, Parts, Plan, overrides_of
from prefold.recipe import RecipeBase, as_dict, make_recipe
from prefold.recipe.sections import in_steps
from prefold.recipe.text import apply_override
from prefold.trees.memory import CPU_TOKENS, budget_for
from prefold.trees.self_check import obstacle, stretched_positions

if TYPE_CHECKING:
    from prefold.training.loop import StepOrder

UNTIMED = ("tasks", "compare_with", "win_rate", "rounds")
"""Fields of `evaluate` whose time depends on the tasks, models or judge; and `rounds`, as the plan is of one round."""
CHECKED = 3
"""Trees of the self-check; merging compares logits on as many."""


def make_plan(
    recipe: RecipeBase,
    train: Sequence[Lengths],
    held_out: Sequence[Lengths],
    order: StepOrder,
    device_memory: int | None = None,
    measure: bool = False,
) -> Plan:
    """Plan a run.

    Args:
        train: lengths of the trees to train on; of prompts alone where completions are sampled.
        held_out: lengths of the held-out trees.
        order: which of the trees each optimizer step covers.
        device_memory: bytes of a GPU to plan for; unset: this machine.
        measure: time the engine on this machine.

    Raises:
        UserError: the model's configuration cannot be read.
    """
    machine = Machine.planned(device_memory)
    steps = Steps(with_completions(recipe, train), order, sampled=recipe.data_kind == "prompts")
    if recipe.rounds:
        held_out = with_completions(recipe, held_out)
    planner = Planner(recipe, config_of(recipe.model), machine, steps, held_out)
    plan = planner.plan()
    if measure:
        plan = replace(plan, seconds=planner.seconds())
    return plan if plan.fits else planner.with_change(plan)


class Planner:
    """Plans of one run on one machine, with the recipe as it is and changed."""

    def __init__(self, recipe: RecipeBase, config: Any, machine: Machine, steps: Steps, held_out: Sequence[Lengths]):
        self.recipe, self.config, self.machine, self.steps, self.held_out = recipe, config, machine, steps, held_out
        absent = machine.device == "cuda" and not torch.cuda.is_available()
        setting = "bfloat16" if absent and recipe.model.dtype == "auto" else recipe.model.dtype
        self.meta = MetaModel(recipe, config, choose_dtype(setting, choose_device()))
        self.longest = max(tree[0] + max(tree[1:], default=0) for tree in steps.trees)
        base = self.meta.base(torch.float32, 1)
        self.packed = recipe.model.attn_implementation in ("auto", "trees") and not (
            stretched_positions(base, self.longest) or obstacle(base)
        )

    def plan(self) -> Plan:
        recipe, meta, memory = self.recipe, self.meta, self.memory()
        phases = memory.phases()
        tokens = self.steps.tokens(recipe.algorithm.scores_prompt)
        # Of training and the reference, without sampling.
        flops = training_flops(meta, tokens, self._computed(tokens))
        if recipe.algorithm.needs_reference:
            referenced = self._referenced()
            flops += scoring_flops(meta, referenced, self._computed(referenced))
        return Plan(
            optimizer_steps=len(self.steps.order),
            batch_size=recipe.train.batch_size,
            max_tokens=recipe.train.max_tokens,
            budget=self.budget,
            growth=self._growth(memory, phases["train"]),
            device=self.machine.device,
            dtype=str(meta.dtype).removeprefix("torch."),
            at_hand=self.machine.memory,
            packed=self.packed,
            spread=bool(recipe.train.fsdp) or recipe.model.device_map is not None,
            parameters=meta.sizes.parameters,
            trained=meta.sizes.trained,
            weights=phases["train"]["weights"] + phases["train"]["mapped"],
            memory=phases,
            tokens=self._computed(tokens),
            plain_tokens=tokens.plain,
            flops=flops,
            disk=self._disk(memory),
            untimed=[
                *(name for name in UNTIMED if getattr(recipe.evaluate, name, name == "rounds" and recipe.rounds)),
                *(["completions by servers"] if recipe.generation.by_servers else []),
            ],
            in_16_bits=memory.in_16_bits,
            host=memory.host,
        )

    @cached_property
    def budget(self) -> int:
        setting, meta = self.recipe.train.max_tokens, self.meta
        if setting != "auto":
            return int(setting)
        if self.machine.device != "cuda":
            return CPU_TOKENS
        weights = meta.sizes.weights // meta.shards + meta.own(meta.sizes.trained_bytes)
        return budget_for(self.config, weights, self.machine.memory, self.recipe.train.gradient_checkpointing)

    def memory(self) -> Memory:
        scored = [tree for tree in self.held_out if len(tree) > 1]
        by_size = sorted(self.steps.trees, key=sum)
        rows = Rows(
            training=self.steps.fullest_row(self.budget, self.packed),
            evaluation=Steps(scored, [range(len(scored))]).fullest_row(self.budget, self.packed) if scored else (),
            compared=(*by_size[: CHECKED - 1], by_size[len(by_size) // 2]),
            longest=max(by_size, key=lambda tree: tree[0] + max(tree[1:], default=0)),
            prompt=max(tree[0] for tree in (*self.steps.trees, *self.held_out)),
        )
        return Memory(self.meta, self.machine, rows, self.budget, self.packed)

    def _growth(self, memory: Memory, parts: Parts) -> Growth:
        """How activations grow with the tokens of a row, by comparison with a row of half the lengths."""
        row, slack = memory.rows.training, 1 + memory.slack
        half = tuple(tuple(max(1, length // 2) for length in tree) for tree in row)
        more, less = (sum(training_pass(self.meta, trees, self.budget, memory.attention)) for trees in (row, half))
        size = sum if self.packed else plain_size
        tokens, fewer = (sum(map(size, trees)) for trees in (row, half))
        slope = max((more - less) / max(tokens - fewer, 1), 1.0)
        rest = sum(parts.values()) - slack * (parts["activations"] + parts["head"])
        return Growth(rest + slack * (more - slope * tokens), slack * slope, max(map(size, self.steps.trees)))

    def _disk(self, memory: Memory) -> Disk:
        sizes, settings, algorithm = self.meta.sizes, self.recipe.train, self.recipe.algorithm
        # While the newest is written there is one more than are kept; the best one may be kept besides the last.
        steps = len(self.steps.order)
        kept = min(settings.save_total_limit, -(-steps // in_steps(settings.save_steps, steps)))
        kept += 1 + int(settings.load_best_model_at_end)
        stored = algorithm.needs_reference and not algorithm.kind.samples
        return Disk(
            checkpoints=kept * (sizes.trained_bytes + memory.optimizer),
            adapter=sizes.trained_bytes,
            merged=sizes.parameters * merge_dtype(self.recipe, self.meta.dtype).itemsize,
            reference=4 * self._referenced().scored if stored else 0,
            free=free_disk(self.recipe.run_folder),
        )

    def _computed(self, tokens: Tokens) -> int:
        return tokens.unique if self.packed else tokens.plain

    def _referenced(self) -> Tokens:
        """Tokens that the reference scores: stored trees that are drawn, once each; completions each time they are
        sampled."""
        algorithm = self.recipe.algorithm
        if algorithm.kind.samples:
            return Tokens(*(number // algorithm.iterations for number in self.steps.tokens(False)))
        order, trees = self.steps.order, self.steps.trees
        drawn = dict.fromkeys(chain.from_iterable(order[step] for step in range(len(order))))
        measured = self.held_out if self.recipe.train.eval_steps else ()
        return Tokens.of([*(trees[index] for index in drawn), *measured])

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, as measured on this machine, with sampled completions at their full length. Loading
        and merging, which only copy, are left out, as is what `untimed` names."""
        recipe, processes = self.recipe, launched()
        algorithm, settings, draws = recipe.algorithm, recipe.evaluate, recipe.algorithm.draws
        answers = 0 if algorithm.kind.scores else number_of_prompts(recipe) * settings.num_answers
        samples_here = draws and not recipe.generation.by_servers
        sampled = draws.num_generations * recipe.train.batch_size if draws and samples_here else 0
        rates = timing.measure(
            self.meta,
            self.steps.trees,
            self.packed,
            self.machine.evaluation_dtype(self.meta.dtype),
            max((sampled or answers) // processes, 1),
            tokenizer_of(recipe.model),
        )

        def scored(rate: timing.Rate, tokens: Tokens) -> float:
            return rate.seconds(self._computed(tokens), tokens.scored, self.meta.layers)

        def written(completions: int, tokens: int) -> float:
            return (max(completions / rates.rows, 1.0) if completions else 0.0) * tokens * rates.decoding

        held_out = Tokens.of([tree for tree in self.held_out if len(tree) > 1])
        every, steps = recipe.train.eval_steps, len(self.steps.order)
        measurements = steps // in_steps(every, steps) if every else 0
        seconds = {"train": scored(rates.training, self.steps.tokens(algorithm.scores_prompt))}
        seconds["train"] += measurements * scored(rates.reference, held_out)
        if algorithm.needs_reference:
            seconds["reference"] = scored(rates.reference, self._referenced())
        measured = scored(rates.evaluation, held_out) + written(answers, settings.max_new_tokens)
        if draws:
            times = -(-steps // algorithm.iterations)
            seconds |= {"rollouts": written(times * sampled, draws.max_completion_length)} if samples_here else {}
            measured += written(len(self.held_out), draws.max_completion_length)
        # A reward model is measured only after training.
        seconds["evaluate"] = measured if algorithm.kind.scores else 2 * measured
        alone = ("evaluate",) if recipe.train.fsdp else ()
        return {phase: round(value / (1 if phase in alone else processes), 1) for phase, value in seconds.items()}

    def with_change(self, plan: Plan) -> Plan:
        """The plan with a change of the recipe: candidates that lower the peak are added in order until it fits. They
        are tried twice, since one may lower the peak only after another has lowered the phase that was higher."""
        fields: dict[str, Any] = {}
        best: Change | None = None
        for change in 2 * list(self._candidates(plan)):
            if change.keys() <= fields.keys():
                continue
            changed = self._changed(fields | change)
            if changed.peak >= (best.peak if best else plan.peak) and not changed.fits:
                continue
            fields |= change
            best = Change(dict(fields), changed.peak, changed.fits)
            if not changed.fits and changed.largest_budget and changed.largest_budget < changed.budget:
                smaller = {**fields, "train.max_tokens": changed.largest_budget}
                changed = self._changed(smaller)
                best = Change(smaller, changed.peak, True) if changed.fits else best
            if best.fits:
                break
        return replace(plan, change=best)

    def _candidates(self, plan: Plan) -> Iterator[dict[str, Any]]:
        recipe, model, trains_all = self.recipe, self.recipe.model, self.meta.trains_all
        if plan.largest_budget is not None and plan.largest_budget < plan.budget:
            yield {"train.max_tokens": plan.largest_budget}
        if self.meta.dtype == torch.float32 and not trains_all:
            yield {"model.dtype": "bfloat16"}
        if not recipe.train.gradient_checkpointing:
            yield {"train.gradient_checkpointing": True}
        if trains_all and "8bit" not in recipe.train.optim:
            yield {"train.optim": "adamw_8bit"}
        if not trains_all and not model.load_in_4bit:
            yield {"model.load_in_4bit": True, **({"model.load_in_8bit": False} if model.load_in_8bit else {})}
        if merge_dtype(recipe, self.meta.dtype) == torch.float32:
            yield {"merge.dtype": "bfloat16"}
        if self.longest > STEP_OF_BUDGETS and not recipe.algorithm.kind.samples:
            yield {"data.max_length": self.longest // 2}

    def _changed(self, fields: dict[str, Any]) -> Plan:
        """The plan of the recipe with other values in some fields."""
        values = as_dict(self.recipe)
        for override in overrides_of(fields):
            apply_override(values, override)
        trees, held_out = self.steps.trees, self.held_out
        if longest := fields.get("data.max_length"):
            trees, held_out = _shortened(trees, longest), _shortened(held_out, longest)
        steps = replace(self.steps, trees=trees)
        return Planner(make_recipe(values), self.config, self.machine, steps, held_out).plan()


def _shortened(trees: Sequence[Lengths], longest: int) -> list[Lengths]:
    """The trees with every length cut to half of `longest`, about what `data.max_length: longest` leaves of them."""
    return [tuple(min(length, longest // 2) for length in tree) for tree in trees]
