"""What there is to do: the pairs of a benchmark, the FLOPs they need, and how fast the machine multiplies."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from prefold.algorithms import ALGORITHMS
from prefold.data.chat import render
from prefold.data.preference import Message
from prefold.models.load import load_tokenizer
from prefold.trees.packing import TokenTree

if TYPE_CHECKING:
    from benchmarks.sides import Workload


def random_pairs(model: Path, means: tuple[int, int, int], count: int) -> list[TokenTree]:
    """Pairs of random tokens; prompt, chosen and rejected lengths are uniform within 60 % of their means."""
    draw = random.Random(0)
    vocabulary = AutoConfig.from_pretrained(model).vocab_size

    def ids(mean: int) -> tuple[int, ...]:
        length = draw.randint(round(mean * 0.4), round(mean * 1.6))
        return tuple(draw.randrange(3, vocabulary) for _ in range(length))

    return [TokenTree(ids(means[0]), (ids(means[1]), ids(means[2]))) for _ in range(count)]


def text_pairs(file: Path, model: Path, max_length: int, count: int) -> tuple[list[TokenTree], int]:
    """The first `count` pairs of a jsonl file whose sides fit, by the model's chat template, and how many did not."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    found: list[TokenTree] = []
    skipped = 0
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = [{"role": "user", "content": row["prompt"]}]

        def ids(*answer: dict[str, str], prompt: list[dict[str, str]] = prompt) -> tuple[int, ...]:
            found = tokenizer.apply_chat_template([*prompt, *answer], add_generation_prompt=not answer)
            return tuple(found["input_ids"])

        start = ids()
        sides = [ids({"role": "assistant", "content": row[side]}) for side in ("chosen", "rejected")]
        if max(map(len, sides)) > max_length or any(side[: len(start)] != start for side in sides):
            skipped += 1
            continue
        found.append(TokenTree(start, tuple(side[len(start) :] for side in sides)))
        if len(found) == count:
            return found, skipped
    raise SystemExit(
        f"{file.name} holds {len(found)} pairs of up to {max_length} tokens a side, {count} were asked for"
    )


def make_prompts(tokenizer: PreTrainedTokenizerBase, count: int, tokens: int) -> list[list[int]]:
    """Chat prompts of nearly so many tokens, and never more: notes about a house, and a question on one of them."""
    draw = random.Random(0)
    colours, things = ("red", "blue", "green", "yellow"), ("lamp", "chair", "table", "clock", "vase", "carpet")

    def prompt(notes: list[str]) -> list[int]:
        question = f"Where is the {things[len(notes) % len(things)]}? Answer in one short sentence."
        return render([Message(role="user", content=" ".join([*notes, question]))], tokenizer)

    prompts = []
    for _ in range(count):
        notes: list[str] = []
        longest = prompt(notes)
        while len(longer := prompt(notes)) <= tokens:
            longest = longer
            notes.append(
                f"The {draw.choice(things)} in the {draw.choice(colours)} room cost {draw.randint(2, 99)} coins."
            )
        prompts.append(longest)
    return prompts


def prompt_groups(model: Path, count: int, prompt_tokens: int, group: int, new_tokens: int) -> list[TokenTree]:
    """Chat prompts, each with stand-ins for the completions that are to be sampled."""
    completions = ((0,) * new_tokens,) * group
    prompts = make_prompts(load_tokenizer(model), count, prompt_tokens)
    return [TokenTree(tuple(prompt), completions) for prompt in prompts]


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
        config = AutoConfig.from_pretrained(workload.model)
        width, layers, mlp = config.hidden_size, config.num_hidden_layers, config.intermediate_size
        head_width = getattr(config, "head_dim", None) or width // config.num_attention_heads
        queries, keys = config.num_attention_heads * head_width, config.num_key_value_heads * head_width
        shapes = [(width, queries), (width, keys), (width, keys), (queries, width), *[(width, mlp)] * 2, (mlp, width)]
        base = sum(i * o for i, o in shapes) * layers
        lora = sum(workload.lora_rank * (i + o) for i, o in shapes) * layers
        unique = sum(tree.size for tree in workload.trees)
        algorithm = ALGORITHMS[workload.method](**workload.settings)
        without_gradient = int(algorithm.needs_reference) + int(algorithm.kind.samples)
        passes = 2 + without_gradient + int(workload.gradient_checkpointing)
        scored = sum(len(ids) for tree in workload.trees for ids in tree.completions)
        if algorithm.scores_prompt:
            scored += sum(len(tree.prompt) - 1 for tree in workload.trees)
        attended = sum(_attended(tree) for tree in workload.trees) * queries * layers
        return Work(
            unique_tokens=unique,
            plain_tokens=sum(tree.plain_size for tree in workload.trees),
            flops=2.0 * unique * (passes * base + (3 + int(workload.gradient_checkpointing)) * lora)
            + 2.0 * scored * (2 + without_gradient) * width * config.vocab_size
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
