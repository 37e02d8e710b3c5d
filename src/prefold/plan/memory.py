"""Peak memory of each phase of a run, by part, in bytes."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Trainer

from prefold.algorithms import Draws
from prefold.device import is_half
from prefold.errors import UserError
from prefold.generation.engine import CACHE_BYTES, ROWS
from prefold.generation.weights import SHARE
from prefold.models.load import Loading, loading_peak, vocabulary_before
from prefold.models.merge import TOKENS as COMPARED
from prefold.models.merge import merge_dtype
from prefold.plan.machine import Machine
from prefold.plan.meta_model import MetaModel
from prefold.plan.passes import Lengths, Row, attention_on, scoring_pass, training_pass, trees_of
from prefold.plan.plan import Parts
from prefold.recipe import RecipeBase
from prefold.training.arguments import training_arguments
from prefold.trees.attention import heads_of
from prefold.trees.self_check import revealing, window_of

SLACK = {"cpu": 0.17, "cuda": 0.05}
"""What an allocator holds beyond what is in use, as a share of all that comes and goes. A CPU's keeps freed blocks, and
what outlives a micro-batch, such as optimizer states, fragments them; with checkpointing they are returned. Both CPU
figures were set by the measurements in `docs/scaling.md`; that of a GPU is a guess."""
BUFFERS = 150 * 10**6
"""Bytes that libraries allocate for themselves once they compute, on a CPU."""
UNSAMPLED = (32, 32, 32)
"""Lengths of the completions that the self-check makes up where they are yet to be sampled."""
LOGITS = 6
"""Sets of logits that merging keeps: of the base, as it is and rounded, of base + adapter, of the trained model and of
the model that is loaded back, and their differences."""
PROBE = 512
"""Rows and columns of the matrix with which an optimizer takes a step, to see what it keeps."""


class Rows(NamedTuple):
    """Lengths of trees: the fullest micro-batch of `training`, and the fullest held-out one of `evaluation`; the few
    trees that merging has `compared`, and the `longest` tree, of all of which the self-check takes parts. `prompt`:
    tokens of the longest prompt."""

    training: Row
    evaluation: Row
    compared: Row
    longest: Lengths
    prompt: int


class Memory:
    """Peaks of a recipe's phases on a machine."""

    def __init__(self, meta: MetaModel, machine: Machine, rows: Rows, budget: int, packed: bool):
        self.meta, self.machine, self.rows, self.budget = meta, machine, rows, budget
        self.sizes, self.on_cpu = meta.sizes, machine.device == "cpu"
        self.attention = attention_on(machine.device, meta.dtype) if packed else None

    def phases(self) -> dict[str, Parts]:
        phases = {"load": self._loading()}
        if self.attention:
            phases["self-check"] = self._checking()
        phases["train"] = self._training()
        if (draws := self.meta.recipe.algorithm.draws) and not self.meta.recipe.generation.by_servers:
            phases["rollouts"] = self._sampling(draws)
        phases |= {"merge": self._merging(), "evaluate": self._evaluating(self.in_16_bits)}
        return {phase: self._with_allocator(parts) for phase, parts in phases.items()}

    def _with_allocator(self, parts: Parts) -> Parts:
        # Weights are allocated first and for good, or mapped from their files.
        comes_and_goes = sum(size for part, size in parts.items() if part not in ("process", "weights", "mapped"))
        return {**parts, "allocator": int(self.slack * comes_and_goes) + (BUFFERS if self.on_cpu else 0)}

    @cached_property
    def in_16_bits(self) -> bool:
        """Whether models are evaluated with their weights in 16 bits, since float32 does not fit: each module is
        widened for its call."""
        wide, narrow = (sum(self._with_allocator(self._evaluating(halved)).values()) for halved in (False, True))
        return self.on_cpu and wide > self.machine.memory and narrow < wide

    @property
    def slack(self) -> float:
        if self.on_cpu and self.meta.recipe.train.gradient_checkpointing:
            return 0.0
        return SLACK.get(self.machine.device, 0.0)

    @cached_property
    def optimizer(self) -> int:
        """Bytes that the optimizer keeps between steps, for all trained parameters."""
        return int(self.sizes.trained * state_bytes(self.meta))

    def _training(self) -> Parts:
        """The fullest micro-batch, or the optimizer's step if that takes more."""
        activations, head = training_pass(self.meta, self.rows.training, self.budget, self.attention)
        # On a GPU torch's AdamW takes all square roots at once, on a CPU one tensor's at a time.
        at_once = self.machine.device == "cuda" and self.meta.recipe.train.optim == "adamw_torch"
        roots = self.meta.own(self.sizes.trained_bytes) if at_once else 0
        return {
            **self._policy(),
            "gradients": self.meta.own(self.sizes.trained_bytes),
            "optimizer": self.meta.own(self.optimizer),
            "activations": max(activations, roots - head),
            "head": head,
        }

    def _whole(self, dtype: torch.dtype, *stored: torch.dtype | None) -> Parts:
        """A whole model in a dtype: mapped from its files if they are `stored` in that dtype (the files of all models,
        if several take turns). Mapped pages can be given back, but then they are read again during work, slowly."""
        size = self.sizes.parameters * dtype.itemsize
        is_mapped = self.on_cpu and all(stored_dtype == dtype for stored_dtype in stored)
        mapped = size - self._grown(dtype) if is_mapped else 0
        return {"weights": size - mapped, "mapped": mapped}

    def _grown(self, dtype: torch.dtype) -> int:
        """Bytes of embeddings and head that are allocated anew, if the tokens of a chat format need more rows."""
        section = self.meta.recipe.model
        grows = section.chat_template and self.meta.text_config.vocab_size > vocabulary_before(section)[1]
        return self.sizes.vocabulary * dtype.itemsize if grows else 0

    def _loading(self) -> Parts:
        """Tensors are loaded from the files one at a time."""
        peak, mapped = self.loading, self._policy()["mapped"]
        if self.machine.counts_mapped:
            mapped = self.sizes.parameters * (self.meta.stored_dtype or self.meta.weights_dtype).itemsize
        # Quantised weights are sharded once they are loaded.
        parts = 1 if self.meta.is_quantised else self.meta.shards
        weights = (peak.host if self.on_cpu else peak.device) // parts
        return {"process": self.machine.process, "weights": weights, "mapped": mapped}

    @cached_property
    def loading(self) -> Loading:
        meta, dtype = self.meta, self.meta.weights_dtype
        quantised = not meta.trains_all and meta.is_quantised
        # An unknown dtype is assumed to be another one, so that every weight is cast.
        stored = meta.stored_dtype or (torch.bfloat16 if dtype == torch.float32 else torch.float32)
        return loading_peak(meta.base(dtype), meta.recipe.model, stored, self.machine.device, quantised)

    def _policy(self) -> Parts:
        """What the policy takes for as long as it is loaded."""
        sizes, meta = self.sizes, self.meta
        quantised = sizes.weights - sizes.whole
        scales = max(0, quantised - sizes.linear // 2)  # of 4 bits: every process holds them whole
        kept = ((sizes.trained_bytes if meta.trains_all else sizes.weights) - scales) // meta.shards + scales
        as_stored = self.on_cpu and not meta.trains_all and meta.shards == 1 and meta.stored_dtype == meta.dtype
        mapped = sizes.whole - self._grown(meta.dtype) if as_stored else 0
        # Of sharded weights, those that are gathered at a time: the current layer, the next one and the vocabulary;
        # with their gradients, if they are trained.
        itemsize = meta.weights_dtype.itemsize
        layers = 2 * (quantised or sizes.linear * itemsize) // meta.layers
        gathered = ((sizes.parameters - sizes.linear) * itemsize + layers) * (2 if meta.trains_all else 1)
        return {
            "process": self.machine.process,
            "weights": kept - mapped,
            "mapped": mapped,
            "gathered": 0 if meta.shards == 1 else gathered,
            "adapter": 0 if meta.trains_all else sizes.trained_bytes,
            # Training that continues an adapter keeps a frozen copy of it.
            "reference": sizes.trained_bytes if meta.recipe.model.adapter and not meta.recipe.model.reference else 0,
        }

    def _checking(self) -> Parts:
        """Parts of a few trees on the plain path, in float32: half-precision weights are widened for it module by
        module, the vocabulary matrix the largest."""
        meta, row = self.meta, (*self.rows.compared, self.rows.longest)
        if meta.recipe.algorithm.kind.samples:
            row = tuple((prompt, *UNSAMPLED) for prompt, *_ in row)
        wide = 4 * self.sizes.head if meta.weights_dtype != torch.float32 else 0
        parts = revealing(trees_of(row), window_of(meta.text_config))
        sizes = [tuple((len(tree.prompt), *map(len, tree.completions)) for tree in part) for part in parts]
        activations = max(scoring_pass(meta, torch.float32, size, sum(map(sum, size)), None) for size in sizes)
        return {**self._policy(), "activations": activations, "head": wide}

    def _sampling(self, draws: Draws) -> Parts:
        """While completions are sampled, the adapter is folded into a copy of the weights; weights of 4 bits are only
        copied, unpacked, if half of what is left can hold them. On a CPU, unquantised ones are copied once more, in a
        layout that is faster for products with few rows."""
        meta, policy = self.meta, self._policy()
        plain, taken = self.sizes.linear * meta.weights_dtype.itemsize, policy["process"] + policy["weights"]
        if meta.is_quantised:
            named = meta.recipe.model.bnb_4bit_compute_dtype
            dtype = meta.dtype if named in (None, "auto") else getattr(torch, named)
            unpacked = self.sizes.linear * dtype.itemsize if meta.recipe.model.load_in_4bit else 0
            copies = unpacked if unpacked <= SHARE * (self.machine.memory - taken) else 0
        else:
            folded = 0 if meta.trains_all else plain
            copies = folded + self._reordered(plain, taken + folded)
        cache = self._cache(meta.recipe.train.batch_size, draws.num_generations, draws.max_completion_length)
        return {**policy, "optimizer": self.optimizer, "cache": copies + cache}

    def _merging(self) -> Parts:
        """The files are written tensor by tensor. Then the logits of whole models, whose weights stay mapped, are
        computed in float32, one model after the other. Those that do not fit a GPU are compared on the CPU."""
        meta, sizes = self.meta, self.sizes
        whole = sizes.parameters * merge_dtype(meta.recipe, meta.dtype).itemsize
        head, widest = self._merging_on_host if self.on_cpu else (0, 0)
        return {
            "process": self.machine.process,
            "mapped": whole if self.machine.counts_mapped else 0,
            "adapter": 0 if meta.trains_all else sizes.trained_bytes,
            "head": head,
            "activations": widest,
        }

    @cached_property
    def _merging_on_host(self) -> tuple[int, int]:
        """Bytes of the logits, of which half are kept while a model is compared, and what else is needed at most: the
        widest module in float32, with its copy if the merge rounds it, or before that two of the widest with LoRA."""
        tokens = min(sum(sum(tree[:2]) for tree in self.rows.compared), COMPARED)
        logits = LOGITS * 4 * tokens * self.meta.text_config.vocab_size
        dtype = merge_dtype(self.meta.recipe, self.meta.dtype)
        rounds = dtype != torch.float32 and dtype != self.meta.stored_dtype
        compared = (4 + (dtype.itemsize if rounds else 0)) * self.sizes.widest - logits // 2
        return logits, max(compared, 2 * 4 * self.sizes.adapted - logits, 0)

    @property
    def host(self) -> int:
        """Bytes of RAM that loading and merging take where the device has memory of its own."""
        return 0 if self.on_cpu else max(self.loading.host, sum(self._merging_on_host))

    def _evaluating(self, in_16_bits: bool) -> Parts:
        """Held-out rows are scored and prompts answered, by one whole model at a time: the one before training, then
        the merged one."""
        meta, settings, device = self.meta, self.meta.recipe.evaluate, self.machine.device
        base, merged = meta.stored_dtype, merge_dtype(meta.recipe, meta.dtype)
        computed = self.machine.evaluation_dtype(meta.dtype)
        attention = self.attention and attention_on(device, computed)
        whole = self._whole(computed, base, merged)
        if in_16_bits:
            stored = (torch.bfloat16 if is_half(dtype) else dtype for dtype in (base, merged))
            whole = self._whole(torch.bfloat16, *stored)
        scoring = cache = 0
        if self.rows.evaluation:
            scoring = scoring_pass(meta, computed, self.rows.evaluation, self.budget, attention)
        if prompts := number_of_prompts(meta.recipe):
            linear = 0 if in_16_bits else self.sizes.linear * computed.itemsize
            cache = self._reordered(linear, self.machine.process + whole["weights"])
            cache += self._cache(prompts, settings.num_answers, settings.max_new_tokens)
        return {
            "process": self.machine.process,
            **whole,
            "activations": max(scoring - cache, 0) + (4 * self.sizes.widest if in_16_bits else 0),
            "cache": cache,
        }

    def _reordered(self, linear: int, taken: int) -> int:
        """Bytes of a second copy of the weights, if half of what is left can hold it."""
        return linear if self.on_cpu and linear <= SHARE * (self.machine.memory - taken) else 0

    def _cache(self, prompts: int, answers: int, new_tokens: int) -> int:
        """Bytes of the keys and values that are kept at a time, in all layers; on a CPU they are in float32."""
        _, heads, width = heads_of(self.meta.config)
        a_token = self.meta.layers * 2 * heads * width * (4 if self.on_cpu else self.meta.dtype.itemsize)
        at_once = max(1, min(prompts, ROWS.get(self.machine.device, 64) // answers))
        most = (CACHE_BYTES if self.on_cpu else self.machine.memory // 2) // a_token
        prompt = self.rows.prompt
        return a_token * min(at_once * (prompt + answers * new_tokens), max(most, prompt + new_tokens))


def number_of_prompts(recipe: RecipeBase) -> int:
    """Prompts that are answered before and after."""
    prompts = recipe.evaluate.prompts
    return prompts if isinstance(prompts, int) else len(prompts)


def state_bytes(meta: MetaModel) -> float:
    """Bytes that the recipe's optimizer keeps for each trained parameter, as found by a step with a matrix; those of
    two float32 numbers if it cannot be used here."""
    layer: Any = nn.Linear(PROBE, PROBE, bias=False)
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(training_arguments(meta.recipe, 1), layer)
        optimizer = kind(layer.parameters(), **settings)
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
    except (UserError, ImportError, ValueError, TypeError, RuntimeError):
        return 8.0
    kept = (value for value in optimizer.state[layer.weight].values() if isinstance(value, torch.Tensor))
    return float(sum(value.nbytes for value in kept) / layer.weight.numel())
