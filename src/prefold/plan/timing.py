"""How long a run will take: the engine's own passes, timed on this machine.

They run on models with random weights that have the planned model's shape but one layer and three layers: the
difference is the time of two layers, the rest that of the head. No weights are downloaded, and it takes a second or
two. A model with large layers is timed on shorter rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefold.device import choose_device
from prefold.generation.engine import ROWS, LocalEngine
from prefold.generation.sampling import Sampling
from prefold.models.quantised import prepare_quantised, quantisation
from prefold.plan.flops import Tokens
from prefold.plan.meta_model import MetaModel, QuantisedLinear
from prefold.plan.passes import Lengths, trees_of
from prefold.trees.attention import candidates
from prefold.trees.packing import pack
from prefold.trees.scorer import Scorer, reference_model
from prefold.trees.self_check import choose_attention

FEW, MORE = 1, 3
"""Layers of the two models."""
TOKENS = 768
"""Most tokens of the timed row on a CPU; on a GPU eight times as many."""
MOST_FLOPS = 5e11
"""FLOPs of all timed passes on a CPU, about."""
REPEATS = 3
NEW_TOKENS = 6
"""Decoding steps that are timed."""
SPREAD = 0.02
"""Random weights are uniform between minus and plus this."""


class Rate(NamedTuple):
    """Seconds for a token in a `layer`, and for a scored token in the `head`."""

    layer: float
    head: float

    def seconds(self, computed: int, scored: int, layers: int) -> float:
        return computed * layers * self.layer + scored * self.head


class Rates(NamedTuple):
    """`training`: forward and backward passes; `reference`, `evaluation`: forward passes, each in its dtype;
    `decoding`: seconds of a decoding step of `rows` rows."""

    training: Rate
    reference: Rate
    evaluation: Rate
    decoding: float
    rows: int


def measure(
    meta: MetaModel,
    trees: Sequence[Lengths],
    packed: bool,
    evaluated_in: torch.dtype,
    rows: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Rates:
    """Time the passes on a few of the training set's `trees`, of middling size, and decoding of `rows` completions at
    once (fewer if the engine decodes fewer)."""
    device = choose_device()
    affordable = 8 * TOKENS
    if device.type == "cpu":
        passes = 2.0 * (3 + 1 + 1) * (FEW + MORE) * (REPEATS + 1)
        affordable = int(min(TOKENS, max(64, MOST_FLOPS / (passes * meta.sizes.linear / meta.layers))))
    row = middling(trees, affordable)
    layers = [FEW, MORE] if meta.layers >= MORE else [meta.layers]
    rows = min(rows, ROWS.get(device.type, 64))
    training, reference, evaluation, decoding = list[float](), list[float](), list[float](), list[float]()

    def scorer_of(model: nn.Module, dtype: torch.dtype) -> Scorer:
        names, layout = candidates(device, dtype, meta.config.get_text_config()), pack(trees_of(row), device)
        return Scorer(model, 2**31, choose_attention(model, names, [layout], dtype) if packed else None)

    with torch.random.fork_rng(range(torch.cuda.device_count()), device_type="cuda"):
        for count in layers:
            scorer = scorer_of(with_random_weights(meta, meta.policy(count), device), meta.dtype)
            training.append(_best(partial(_train, scorer, row, meta.dtype)))
            reference.append(_best(partial(_score, scorer, row, meta.dtype)))
            del scorer
            base: Any = with_random_weights(meta, meta.base(evaluated_in, count), device)
            evaluation.append(_best(partial(_score, scorer_of(base, evaluated_in), row, torch.float32)))
            decoding.append(_decoding(base, tokenizer, row, rows) if packed else 0.0)
            del base
    tokens = Tokens.of(row, meta.recipe.algorithm.scores_prompt)

    def rate(seconds: Sequence[float]) -> Rate:
        layer, rest = _layer_and_rest(seconds, layers)
        return Rate(layer / (tokens.unique if packed else tokens.plain), rest / max(tokens.scored, 1))

    layer, rest = _layer_and_rest(decoding, layers)
    return Rates(rate(training), rate(reference), rate(evaluation), rest + meta.layers * layer, rows)


def _layer_and_rest(seconds: Sequence[float], layers: Sequence[int]) -> tuple[float, float]:
    """Seconds of one layer, and of everything but the layers."""
    layer = seconds[0] / layers[0]
    if len(layers) > 1:
        layer = max((seconds[1] - seconds[0]) / (layers[1] - layers[0]), 0.0)
    return layer, max(seconds[0] - layers[0] * layer, 0.0)


def middling(trees: Sequence[Lengths], tokens: int) -> list[Lengths]:
    """Trees of median size and above, with at most `tokens` tokens together; a single larger tree is shortened."""
    by_size = sorted(trees, key=sum)
    row: list[Lengths] = []
    for tree in by_size[len(by_size) // 2 :]:
        if row and sum(map(sum, row)) + sum(tree) > tokens:
            break
        row.append(tree)
    share = min(1.0, tokens / sum(map(sum, row)))
    return [tuple(max(1, int(share * length)) for length in tree) for tree in row]


def with_random_weights(meta: MetaModel, model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model from the meta device to a real one, in place, with random weights; quantised if it is to be."""
    model.to_empty(device=device)
    for buffer in model.buffers():
        buffer.zero_()
    with torch.no_grad():
        for weight in model.parameters():
            weight.uniform_(-SPREAD, SPREAD)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantisedLinear)}
    for name, layer in layers.items():
        model.set_submodule(name, _quantised(layer, meta).to(device))
    if layers:
        prepare_quantised(cast(PreTrainedModel, model))
    return model


def _quantised(layer: QuantisedLinear, meta: MetaModel) -> nn.Module:
    """The layer of bitsandbytes that a `QuantisedLinear` stands for."""
    from bitsandbytes.nn import modules  # not installed everywhere

    settings = quantisation(meta.recipe.model, meta.dtype)
    assert settings is not None
    shape, weight = (layer.in_features, layer.out_features), layer.weight.data
    quantised: Any
    if settings.load_in_8bit:
        quantised = modules.Linear8bitLt(*shape, bias=False, has_fp16_weights=False, threshold=6.0)
        quantised.weight = modules.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        double, kind = settings.bnb_4bit_use_double_quant, settings.bnb_4bit_quant_type
        quantised = modules.Linear4bit(*shape, False, settings.bnb_4bit_compute_dtype, quant_type=kind)
        quantised.weight = modules.Params4bit(weight, requires_grad=False, compress_statistics=double, quant_type=kind)
    return cast(nn.Module, quantised)


def _train(scorer: Scorer, row: Sequence[Lengths], dtype: torch.dtype) -> None:
    scorer.model.train()
    with scorer.in_place():
        with torch.autocast(choose_device().type, dtype, enabled=dtype != torch.float32):
            tokens = scorer.score(trees_of(row)).tokens
        tokens.sum().backward()
    scorer.model.zero_grad()


@torch.no_grad()
def _score(scorer: Scorer, row: Sequence[Lengths], dtype: torch.dtype) -> None:
    autocast = torch.autocast(choose_device().type, dtype, enabled=dtype != torch.float32)
    with reference_model(scorer.model), autocast:
        scorer.score(trees_of(row))


def _decoding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, row: Sequence[Lengths], rows: int) -> float:
    """Seconds of a decoding step of `rows` completions of one prompt."""
    engine, prompt = LocalEngine(model, tokenizer), [[0] * row[0][0]]

    def write(tokens: int) -> None:
        list(engine.stream(prompt, Sampling(tokens, rows, temperature=1.0, end_tokens=()), [0]))

    # The first token comes with the prompt.
    return max(_best(lambda: write(1 + NEW_TOKENS)) - _best(lambda: write(1)), 0.0) / NEW_TOKENS


def _best(perform: Callable[[], None]) -> float:
    """Seconds of the fastest of `REPEATS` calls, after one to warm up."""
    seconds = []
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        perform()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])
