"""What the machine allows: the FLOPs that a benchmark needs, and how fast matrix products are."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from benchmarks.workloads import LORA_RANK, Workload
from prefold.algorithms import ALGORITHMS
from prefold.trees.packing import TokenTree


@dataclass(frozen=True)
class Shape:
    """Widths of a decoder's matrix products."""

    width: int
    layers: int
    mlp: int
    queries: int
    keys: int
    vocabulary: int

    @staticmethod
    def of(model: Path) -> Shape:
        config = AutoConfig.from_pretrained(model)
        head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return Shape(
            config.hidden_size,
            config.num_hidden_layers,
            config.intermediate_size,
            config.num_attention_heads * head_width,
            config.num_key_value_heads * head_width,
            config.vocab_size,
        )

    @property
    def products(self) -> list[tuple[int, int]]:
        """Of a layer: the width of what goes into each linear layer, and of what comes out."""
        attention = [(self.width, self.queries), (self.width, self.keys), (self.width, self.keys)]
        return [*attention, (self.queries, self.width), *[(self.width, self.mlp)] * 2, (self.mlp, self.width)]

    @property
    def weights(self) -> int:
        return self.layers * sum(into * out for into, out in self.products)


@dataclass(frozen=True)
class Work:
    """Tokens of a run, and the FLOPs of its matrix products when every token is computed once."""

    unique_tokens: int
    plain_tokens: int
    flops: float

    @staticmethod
    def of(workload: Workload) -> Work:
        """Passes over frozen weights: the sampling and the reference's forward if there are any, the policy's, and its
        backward by the activations. LoRA has a product by weights in place of the reference's forward, which is without
        it; while sampling it is part of the weights. The head meets the scored tokens only."""
        shape = Shape.of(workload.model)
        lora = shape.layers * sum(LORA_RANK * (into + out) for into, out in shape.products)
        unique = sum(tree.size for tree in workload.trees)
        algorithm = ALGORITHMS[workload.method](**workload.settings)
        without_gradient = int(algorithm.needs_reference) + int(algorithm.kind.samples)
        passes = 2 + without_gradient + int(workload.gradient_checkpointing)
        scored = sum(tree.scored_tokens for tree in workload.trees)
        if algorithm.scores_prompt:
            scored += sum(len(tree.prompt) - 1 for tree in workload.trees)
        attended = sum(_attended(tree) for tree in workload.trees) * shape.queries * shape.layers
        return Work(
            unique_tokens=unique,
            plain_tokens=sum(tree.plain_size for tree in workload.trees),
            flops=2.0 * unique * (passes * shape.weights + (3 + int(workload.gradient_checkpointing)) * lora)
            + 2.0 * scored * (2 + without_gradient) * shape.width * shape.vocabulary
            # Scores and mixing in every forward; the backward pass repeats the scores and has four products of its own.
            + 2.0 * attended * (2 * (passes - 1) + 5),
        )


def _attended(tree: TokenTree) -> int:
    """Pairs of positions that look at each other."""
    depth = len(tree.prompt)
    return depth * (depth + 1) // 2 + sum(len(ids) * depth + len(ids) * (len(ids) + 1) // 2 for ids in tree.completions)


def matrix_product_rate(dtype: str, repeats: int = 12) -> float:
    """FLOP/s of a 2048 x 576 x 1536 product (a row of tokens through a small model's MLP), the median of `repeats`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, inner, columns = (2048, 576, 1536) if device == "cpu" else (16384, 4096, 14336)
    left = torch.randn(rows, inner, device=device).to(getattr(torch, dtype))
    right = torch.randn(columns, inner, device=device).to(getattr(torch, dtype))
    times = []
    for _ in range(repeats + 3):
        started = time.perf_counter()
        torch.nn.functional.linear(left, right)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2.0 * rows * inner * columns / sorted(times[3:])[repeats // 2]
