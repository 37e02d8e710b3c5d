"""How long a run will take: the engine's own passes, timed on this machine.

They are performed on models with random weights, of the planned model's shape but of one layer and of three: the
difference is what two layers take, the rest is the head's. No weights are downloaded, and a second or two is enough. A
model of many large layers is timed on shorter rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefold.generation.engine import ROWS, LocalEngine
from prefold.generation.sampling import Sampling
from prefold.models.device import choose_device
from prefold.models.quantised import prepare_quantised, quantisation
from prefold.plan.flops import Tokens
from prefold.plan.meta_model import Blueprint, StandIn
from prefold.plan.passes import Lengths, shaped
from prefold.trees.attention import candidates
from prefold.trees.scorer import Scorer, reference_model

FEW, MORE = 1, 3
"""Layers of the two models."""
TOKENS = 768
"""Of the row that is timed."""
MOST_FLOPS = 5e11
"""Of all timed passes on a CPU."""
REPEATS = 3
NEW_TOKENS = 6
"""Decoding steps that are timed."""
SPREAD = 0.02
"""Of the random weights."""


@dataclass(frozen=True)
class Rate:
    """Seconds of a token in a layer, and of a scored token in the head."""

    layer: float
    head: float

    def seconds(self, computed: int, scored: int, layers: int) -> float:
        return computed * layers * self.layer + scored * self.head


@dataclass(frozen=True)
class Rates:
    """Forward and backward passes; forward passes of the reference; those of the evaluation, in its dtype; seconds of
    a decoding step of `rows` rows."""

    training: Rate
    reference: Rate
    evaluation: Rate
    decoding: float
    rows: int


def measure(
    blueprint: Blueprint,
    trees: Sequence[Lengths],
    packed: bool,
    evaluated_in: torch.dtype,
    rows: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Rates:
    """Args:
    trees: of the training set; a few of the middling ones are timed.
    evaluated_in: dtype of the evaluation.
    rows: that are written side by side.
    """
    device = choose_device()
    row = middling(trees, _affordable(blueprint, device.type))
    layers = [FEW, MORE] if blueprint.layers >= MORE else [blueprint.layers]
    rows = min(rows, ROWS.get(device.type, 64))
    training: list[float] = []
    reference: list[float] = []
    evaluation: list[float] = []
    decoding: list[float] = []
    with torch.random.fork_rng(range(torch.cuda.device_count()), device_type="cuda"):
        for count in layers:
            policy = materialised(blueprint, blueprint.policy(count), device)
            scorer = _scorer(policy, packed, device, blueprint.dtype)
            training.append(_best(partial(_train, scorer, row, blueprint.dtype)))
            reference.append(_best(partial(_score, scorer, row, blueprint.dtype)))
            del policy, scorer
            base: Any = materialised(blueprint, blueprint.base(evaluated_in, count), device)
            scorer = _scorer(base, packed, device, evaluated_in)
            evaluation.append(_best(partial(_score, scorer, row, torch.float32)))
            decoding.append(_decoding(base, tokenizer, row, rows) if packed else 0.0)
            del base, scorer
    tokens = Tokens.of(row, blueprint.recipe.algorithm.scores_prompt)
    computed = tokens.unique if packed else tokens.plain

    def rate(seconds: Sequence[float]) -> Rate:
        layer = _per_layer(seconds, layers)
        return Rate(layer / computed, max(seconds[0] - layers[0] * layer, 0.0) / max(tokens.scored, 1))

    step = _per_layer(decoding, layers)
    whole_step = max(decoding[0] - layers[0] * step, 0.0) + blueprint.layers * step
    return Rates(rate(training), rate(reference), rate(evaluation), whole_step, rows)


def _per_layer(seconds: Sequence[float], layers: Sequence[int]) -> float:
    if len(layers) == 1:
        return seconds[0] / layers[0]
    return max((seconds[1] - seconds[0]) / (layers[1] - layers[0]), 0.0)


def middling(trees: Sequence[Lengths], tokens: int) -> list[Lengths]:
    """Trees of middling size, about so many tokens of them; shortened if a single one is more."""
    by_size = sorted(trees, key=sum)
    row: list[Lengths] = []
    for tree in by_size[len(by_size) // 2 :]:
        if row and sum(map(sum, row)) + sum(tree) > tokens:
            break
        row.append(tree)
    share = min(1.0, tokens / sum(map(sum, row)))
    return [tuple(max(1, int(share * length)) for length in tree) for tree in row]


def _affordable(blueprint: Blueprint, device: str) -> int:
    if device != "cpu":
        return 8 * TOKENS
    layer = blueprint.sizes.linear / blueprint.layers
    passes = 2.0 * (3 + 1 + 1) * (FEW + MORE) * (REPEATS + 1)
    return int(min(TOKENS, max(64, MOST_FLOPS / (passes * layer))))


# ---- what is timed ----------------------------------------------------------------------------------------------


def materialised(blueprint: Blueprint, model: nn.Module, device: torch.device) -> nn.Module:
    """A model of the meta device, on a real one and with random weights; quantised if it is to be."""
    model.to_empty(device=device)
    for buffer in model.buffers():
        buffer.zero_()
    with torch.no_grad():
        for weight in model.parameters():
            weight.uniform_(-SPREAD, SPREAD)
    _quantise(blueprint, model, device)
    return model


def _quantise(blueprint: Blueprint, model: nn.Module, device: torch.device) -> None:
    """Put bitsandbytes' layers in place of those that stand for them."""
    stand_ins = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, StandIn)
    ]
    for parent, name, child in stand_ins:
        setattr(parent, name, _quantised(child, blueprint).to(device))
    if stand_ins:
        prepare_quantised(cast(PreTrainedModel, model))


def _quantised(layer: StandIn, blueprint: Blueprint) -> nn.Module:
    from bitsandbytes.nn import modules

    settings = quantisation(blueprint.recipe.model, blueprint.dtype)
    assert settings is not None
    shape, weight = (layer.in_features, layer.out_features), layer.weight.data
    made: Any
    if settings.load_in_8bit:
        made = modules.Linear8bitLt(*shape, bias=False, has_fp16_weights=False, threshold=6.0)
        made.weight = modules.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        double, kind = settings.bnb_4bit_use_double_quant, settings.bnb_4bit_quant_type
        made = modules.Linear4bit(*shape, False, settings.bnb_4bit_compute_dtype, quant_type=kind)
        made.weight = modules.Params4bit(weight, requires_grad=False, compress_statistics=double, quant_type=kind)
    return cast(nn.Module, made)


def _scorer(model: nn.Module, packed: bool, device: torch.device, dtype: torch.dtype) -> Scorer:
    return Scorer(model, 2**31, candidates(device, dtype)[-1] if packed else None)


def _autocast(device: str, dtype: torch.dtype) -> AbstractContextManager[Any]:
    return torch.autocast(device, dtype) if dtype != torch.float32 else nullcontext()


def _train(scorer: Scorer, row: Sequence[Lengths], dtype: torch.dtype) -> None:
    scorer.model.train()
    device = choose_device().type
    with scorer.in_place():
        with _autocast(device, dtype):
            tokens = scorer.score(shaped(row)).tokens
        tokens.sum().backward()
    scorer.model.zero_grad()


@torch.no_grad()
def _score(scorer: Scorer, row: Sequence[Lengths], dtype: torch.dtype) -> None:
    with reference_model(scorer.model), _autocast(choose_device().type, dtype):
        scorer.score(shaped(row))


def _decoding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, row: Sequence[Lengths], rows: int) -> float:
    """Seconds of a step of `rows` rows under one prompt."""
    engine, prompt = LocalEngine(model, tokenizer), [[0] * row[0][0]]

    def write(tokens: int) -> None:
        list(engine.stream(prompt, Sampling(tokens, rows, temperature=1.0, end_tokens=()), [0]))

    # The first token comes with the prompt.
    return max(_best(lambda: write(1 + NEW_TOKENS)) - _best(lambda: write(1)), 0.0) / NEW_TOKENS


def _best(perform: Callable[[], None]) -> float:
    """Seconds of the fastest of several times, after one to warm up."""
    perform()
    return min(_seconds(perform) for _ in range(REPEATS))


def _seconds(perform: Callable[[], None]) -> float:
    started = time.perf_counter()
    perform()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
