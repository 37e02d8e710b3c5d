"""Peak memory of each phase of a run, by part, in bytes."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from prefold.algorithms import Draws
from prefold.errors import UserError
from prefold.generation.engine import CACHE_BYTES, ROWS
from prefold.models.merge import merge_dtype
from prefold.plan.flops import plain_size
from prefold.plan.meta_model import Blueprint
from prefold.plan.passes import Lengths, attention_on, scoring_pass, training_pass
from prefold.training.arguments import training_arguments
from prefold.trees.memory import free_memory

CONTEXT = 750 * 2**20
"""What CUDA and its libraries take of a GPU before the first tensor; not verified on this version."""
SLACK = {"cpu": 0.17, "cuda": 0.05}
"""What an allocator holds beyond what is in use, as a share of all that comes and goes. On a CPU freed blocks are kept,
and those of one micro-batch do not fit between what outlives another, such as optimizer states; with checkpointing they
are returned. Both CPU figures were set by the measurements in `docs/scaling.md`; that of a GPU is a guess."""
BUFFERS = 150 * 10**6
"""What libraries allocate for themselves once they compute, on a CPU."""
STAND_IN = 32
"""Tokens of what the self-check takes for completions that are yet to be sampled."""
PROBE = 512
"""Rows and columns of the matrix that an optimizer takes a step with, to see what it keeps."""

Parts = dict[str, int]


@dataclass(frozen=True)
class Machine:
    """What a run has: `device` is `cpu`, `cuda` or `mps`, `memory` the bytes at hand, `process` those that are taken
    before a model is loaded."""

    device: str
    memory: int
    process: int


@dataclass(frozen=True)
class Rows:
    """Micro-batches as lengths of their trees: the fullest of `training`, the fullest held-out one of `evaluation`, the
    few of the self-check, and those whose logits `merge` compares; None where there are none."""

    training: Sequence[Lengths]
    evaluation: Sequence[Lengths]
    checked: Sequence[Lengths]
    prompt: int
    """Tokens of the longest prompt."""


class Memory:
    """Peaks of a recipe's phases on a machine."""

    def __init__(self, blueprint: Blueprint, machine: Machine, rows: Rows, budget: int, packed: bool):
        self.blueprint, self.machine, self.rows, self.budget = blueprint, machine, rows, budget
        self.attention = attention_on(machine.device, blueprint.dtype) if packed else None
        self.row_bytes = 0
        """What the fullest micro-batch takes beside weights and gradients, once training has been planned."""

    def phases(self) -> dict[str, Parts]:
        found = (
            {"self-check": self.checking(), "train": self.training()} if self.attention else {"train": self.training()}
        )
        if draws := self.blueprint.recipe.algorithm.draws:
            found["rollouts"] = self.rollouts(draws)
        found |= {"merge": self.merging(), "evaluate": self.evaluation()}
        return {phase: {**parts, "allocator": self._allocator(parts)} for phase, parts in found.items()}

    def _allocator(self, parts: Parts) -> int:
        # Weights are mapped from their files on a CPU, and allocated first and for good on a GPU.
        comes_and_goes = sum(size for part, size in parts.items() if part not in ("process", "weights"))
        return int(self.slack * comes_and_goes) + (BUFFERS if self.machine.device == "cpu" else 0)

    @property
    def slack(self) -> float:
        if self.machine.device == "cpu" and self.blueprint.recipe.train.gradient_checkpointing:
            return 0.0
        return SLACK.get(self.machine.device, 0.0)

    # ---- training ----

    def training(self) -> Parts:
        """The fullest micro-batch, or the optimizer's step if that takes more."""
        sizes = self.blueprint.sizes
        activations, head = training_pass(self.blueprint, self.rows.training, self.budget, self.attention)
        self.row_bytes = activations + head
        states, transient = self.optimizer()
        return {
            **self.policy(),
            "gradients": self._own(sizes.trained_bytes),
            "optimizer": self._own(states),
            "activations": max(activations, self._own(transient) - head),
            "head": head,
        }

    def policy(self) -> Parts:
        """What is there as long as the policy is."""
        sizes, recipe = self.blueprint.sizes, self.blueprint.recipe
        whole = recipe.lora == "none"
        return {
            "process": self.machine.process,
            "weights": (sizes.trained_bytes if whole else sizes.weights) // self.blueprint.shards,
            "gathered": self._gathered(),
            "adapter": 0 if whole else sizes.trained_bytes,
            # Training that goes on with an adapter keeps a frozen copy of it.
            "reference": sizes.trained_bytes if recipe.model.adapter else 0,
        }

    def _own(self, trained: int) -> int:
        """Of something that is kept for each trained number, what this process has: LoRA weights are whole in all."""
        return trained // (self.blueprint.shards if self.blueprint.recipe.lora == "none" else 1)

    def _gathered(self) -> int:
        """Of weights that are sharded, those that are whole at a time: the layer at work, the next one and the
        vocabulary; with their gradients, where they are trained."""
        sizes, blueprint = self.blueprint.sizes, self.blueprint
        if blueprint.shards == 1:
            return 0
        numbers = sizes.parameters - sizes.linear + 2 * sizes.linear // blueprint.layers
        return numbers * blueprint.weights_dtype.itemsize * (2 if blueprint.recipe.lora == "none" else 1)

    def optimizer(self) -> tuple[int, int]:
        """Bytes that are kept between steps, and those that a step takes beside them."""
        sizes, name = self.blueprint.sizes, self.blueprint.recipe.train.optim
        states = int(sizes.trained * state_bytes(self.blueprint))
        # On a GPU torch's AdamW takes all square roots at once, on a CPU one tensor's at a time.
        at_once = self.machine.device == "cuda" and name == "adamw_torch"
        return states, sizes.trained_bytes if at_once else 0

    # ---- the other phases ----

    def checking(self) -> Parts:
        """A few trees on the plain path, all of whose logits are there at once, in float32: half-precision weights are
        widened for it module by module, the vocabulary matrix the largest."""
        blueprint, trees = self.blueprint, self.rows.checked
        if blueprint.recipe.algorithm.kind.samples:
            trees = [(prompt, STAND_IN, STAND_IN, STAND_IN) for prompt, *_ in trees]
        most = max(map(plain_size, trees))
        wide = 4 * blueprint.sizes.head if blueprint.weights_dtype != torch.float32 else 0
        activations = scoring_pass(blueprint, torch.float32, trees, most, None)
        return {**self.policy(), "activations": activations, "head": wide}

    def rollouts(self, draws: Draws) -> Parts:
        """While completions are sampled the adapter is folded into a copy of the weights; on a CPU they are copied once
        more, in the order that products with few rows like."""
        sizes = self.blueprint.sizes
        section = self.blueprint.recipe.model
        quantised = section.load_in_4bit or section.load_in_8bit
        plain = sizes.linear * self.blueprint.weights_dtype.itemsize
        folded = 0 if quantised or self.blueprint.recipe.lora == "none" else plain
        states, _ = self.optimizer()
        batch_size = self.blueprint.recipe.train.batch_size
        tokens = self._kept_tokens(batch_size, draws.num_generations, draws.max_completion_length)
        return {
            **self.policy(),
            "optimizer": states,
            "cache": folded + self._reordered(0 if quantised else plain) + tokens * self._state_bytes(),
        }

    def merging(self) -> Parts:
        """One model at a time: base with adapter, then what was saved, loaded back."""
        blueprint = self.blueprint
        dtype = merge_dtype(blueprint.recipe, blueprint.dtype)
        tokens = sum(prompt + completions[0] if completions else prompt for prompt, *completions in self.rows.checked)
        vocabulary = blueprint.config.get_text_config().vocab_size
        logits = 4 * tokens * vocabulary if self.machine.device == "cpu" else 0
        return {
            "process": self.machine.process,
            "weights": blueprint.sizes.parameters * dtype.itemsize,
            # Of the base, of base + adapter and of what was loaded back, and their differences.
            "head": 5 * logits,
        }

    def evaluation(self) -> Parts:
        """Held-out rows are scored and prompts answered, by one whole model at a time."""
        blueprint, settings = self.blueprint, self.blueprint.recipe.evaluate
        dtype = torch.float32 if self.machine.device == "cpu" else blueprint.dtype
        weights = blueprint.sizes.parameters * dtype.itemsize
        attention = self.attention and attention_on(self.machine.device, dtype)
        scoring = 0
        if self.rows.evaluation:
            scoring = scoring_pass(blueprint, dtype, self.rows.evaluation, self.budget, attention)
        prompts = settings.prompts if isinstance(settings.prompts, int) else len(settings.prompts)
        tokens = self._kept_tokens(prompts, settings.num_answers, settings.max_new_tokens)
        reordered = self._reordered(blueprint.sizes.linear * dtype.itemsize)
        cache = reordered + tokens * self._state_bytes() if prompts else 0
        return {
            "process": self.machine.process,
            "weights": weights,
            "activations": max(scoring - cache, 0),
            "cache": cache,
        }

    def _reordered(self, linear: int) -> int:
        return linear if self.machine.device == "cpu" and 2 * linear <= self.machine.memory else 0

    def _kept_tokens(self, prompts: int, answers: int, new_tokens: int) -> int:
        """Tokens whose keys and values are kept at a time."""
        at_once = max(1, min(prompts, ROWS.get(self.machine.device, 64) // answers))
        room = (CACHE_BYTES if self.machine.device == "cpu" else self.machine.memory // 2) // self._state_bytes()
        return min(at_once * (self.rows.prompt + answers * new_tokens), max(room, self.rows.prompt + new_tokens))

    def _state_bytes(self) -> int:
        """Keys and values of a token in all layers; a CPU keeps them in float32."""
        text = self.blueprint.config.get_text_config()
        queries = getattr(text, "num_attention_heads", None) or 1
        heads = getattr(text, "num_key_value_heads", None) or queries
        width = getattr(text, "head_dim", None) or text.hidden_size // queries
        size = 4 if self.machine.device == "cpu" else self.blueprint.dtype.itemsize
        return int(text.num_hidden_layers * 2 * heads * width * size)


def peak(parts: Parts) -> int:
    return sum(parts.values())


def state_bytes(blueprint: Blueprint) -> float:
    """Bytes that the recipe's optimizer keeps for a trained number, by what it keeps after a step with a matrix.

    Two float32 numbers where it cannot be had here.
    """
    layer: Any = nn.Linear(PROBE, PROBE, bias=False)
    try:
        arguments = training_arguments(blueprint.recipe, 1)
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, layer)
        optimizer = kind(layer.parameters(), **settings)
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
    except (UserError, ImportError, ValueError, TypeError, RuntimeError):
        return 8.0
    kept = (value for value in optimizer.state[layer.weight].values() if isinstance(value, torch.Tensor))
    return float(sum(value.nbytes for value in kept) / layer.weight.numel())


# ---- the machine ------------------------------------------------------------------------------------------------


def this_machine(device: str) -> Machine:
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return Machine(device, free + torch.cuda.memory_reserved(), 0)
    free_memory()
    process = resident_bytes()
    if device == "mps":
        return Machine(device, int(torch.mps.recommended_max_memory()), process)
    return Machine(device, available_bytes() + process, process)


def resident_bytes() -> int:
    """What this process holds: interpreter, libraries, tokenizer."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def available_bytes() -> int:
    """RAM that can be had without swapping, within the limit of the control group."""
    found = [size for size in (_free(), _left_by_the_control_group()) if size is not None]
    return min(found) if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free() -> int | None:
    try:
        known = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        return int(known["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None


def _left_by_the_control_group() -> int | None:
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        kinds = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        return max(limit - used + int(kinds["file"]), 0)  # cached files are given up when memory is asked for
    except (OSError, ValueError, KeyError):  # there is none, or it says "max"
        return None


_UNITS = {"GB": 10**9, "G": 10**9, "GIB": 2**30, "MB": 10**6, "M": 10**6, "MIB": 2**20}


def bytes_of(text: str) -> int:
    """`24GB`, `79.6GiB` in bytes.

    Raises:
        UserError: it is no amount of memory.
    """
    number = text.strip().upper().rstrip("GIMB")
    unit = text.strip().upper()[len(number) :].strip()
    try:
        found = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError):
        raise UserError(
            f"`{text}` is no amount of memory", where="`--device-memory`", expected="e.g. 24GB or 80GiB"
        ) from None
    if found <= 0:
        raise UserError(f"`{text}` is no memory at all", where="`--device-memory`", expected="e.g. 24GB or 80GiB")
    return found
