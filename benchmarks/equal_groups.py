"""A step of GRPO where half of the groups have equal rewards, with and without passes for those, in alternation.

    python -m benchmarks.equal_groups

Both sides sample the same completions, score them and compute the gradients; loss and gradients are compared. Prints a
table and, as its last line, JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from benchmarks.results import Ratio, parser_for, quieten, save
from benchmarks.workloads import lora_settings, make_prompts, render_prompt
from prefold.data.examples import Example, Examples
from prefold.data.preference import Message, Prompt, RowId
from prefold.models.adapters import add_lora
from prefold.models.fetch import fetch
from prefold.models.load import load_model
from prefold.models.tokenizer import load_tokenizer
from prefold.recipe import Lora, Model, make_recipe
from prefold.rewards.scoring import LoadedReward
from prefold.training.arguments import training_arguments
from prefold.training.loop import StepOrder, TrainingLoop
from prefold.training.sampled_trees import SampledTrees
from prefold.trees.attention import unwrapped
from prefold.trees.memory import auto_max_tokens
from prefold.trees.packing import TokenTree
from prefold.trees.scorer import choose_scorer

SIDES = {"without": True, "with": False}
"""Whether groups of equal rewards are left out."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_for("equal_groups", __doc__)
    parser.add_argument("--prompts", type=int, default=4, help="of a step, half of them with equal rewards (default 4)")
    parser.add_argument("--group", type=int, default=8, help="completions of each prompt (default 8)")
    parser.add_argument("--prompt-tokens", type=int, default=384)
    parser.add_argument("--new-tokens", type=int, default=64, help="at most")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args(arguments)
    quieten()
    measured = alternate(loop_of(options), options.steps)
    table = Table("seconds of a step", "with", "without", "ratio")
    for part in ("step", "gradients", "cpu_seconds"):
        medians = (f"{statistics.median(measured['seconds'][side][part]):.2f}" for side in ("with", "without"))
        table.add_row(part, *medians, f"{measured[f'ratio_{part}']:.2f} {measured[f'spread_{part}']}")
    Console().print(table)
    save("equal-groups", options, measured)
    print(json.dumps({name: value for name, value in measured.items() if name.startswith(("ratio", "difference"))}))


def loop_of(options: argparse.Namespace) -> TrainingLoop:
    """Of `prefold train`, with prompts of which every second one has equal rewards; its source is a `SampledTrees`."""
    tokenizer = load_tokenizer(fetch(options.model))
    texts = make_prompts(tokenizer, options.prompts, options.prompt_tokens)
    trees = [TokenTree(tuple(render_prompt(text, tokenizer)), ()) for text in texts]
    examples = Examples.of(
        Example(Prompt((Message(role="user", content=text),), {"row": i}, RowId("p", i)), trees[i])
        for i, text in enumerate(texts)
    )
    recipe = make_recipe(
        {
            "method": "grpo",
            "grpo": {"num_generations": options.group, "max_completion_length": options.new_tokens},
            "model": {"name": options.model},
            "data": {"train": [{"path": "unused"}]},
            "rewards": [{"name": "length", "target": 0}],
            "output_dir": "unused",
        }
    )
    model = add_lora(load_model(Model(name=options.model), dtype="float32"), Lora(**lora_settings()), seed=0)
    checked = [replace(tree, completions=(tree.prompt[:8],) * 2) for tree in trees[:2]]
    scorer = choose_scorer(model, checked, auto_max_tokens(unwrapped(model), False))
    order = StepOrder(len(trees), len(trees), options.steps * len(trees), seed=0)
    rewards, columns = [LoadedReward("every_second", every_second)], ["row"]
    source = SampledTrees(recipe.algorithm, scorer, examples, rewards, columns, tokenizer, order, [], seed=0)
    unused: Any = None
    arguments = training_arguments(recipe, options.steps)
    loop = TrainingLoop(recipe.algorithm, scorer, source, order, unused, unused, arguments)
    loop.accelerator = Accelerator()
    return loop


def every_second(completions: Sequence[str], row: Sequence[int], **columns: Any) -> list[float]:
    """The length of the completion, or nothing."""
    return [float(len(text)) * (number % 2) for text, number in zip(completions, row, strict=True)]


def alternate(loop: TrainingLoop, steps: int) -> dict[str, Any]:
    """Seconds of both sides, the medians of their ratios, and by how much their numbers differ at most.

    Where `cpu_seconds` are far from the time that passed, other work shared the machine; their ratio is that of a CPU.
    """
    parts = ("step", "gradients", "cpu_seconds")
    seconds: dict[str, dict[str, list[float]]] = {side: {part: [] for part in parts} for side in SIDES}
    difference = 0.0
    for step in range(-1, steps):  # the first one warms up
        numbers = []
        for side in sorted(SIDES, reverse=step % 2 == 0):
            elapsed, values = timed(loop, max(step, 0), SIDES[side])
            numbers.append(values)
            if step >= 0:
                for part, value in zip(parts, elapsed, strict=True):
                    seconds[side][part].append(round(value, 3))
        difference = max(difference, float((numbers[0] - numbers[1]).abs().max()))
    ratios = {part: Ratio.of(seconds["with"][part], seconds["without"][part]) for part in parts}
    return {
        **{f"ratio_{part}": ratio.median for part, ratio in ratios.items()},
        **{f"spread_{part}": ratio.spread for part, ratio in ratios.items()},
        "difference": difference,
        "seconds": seconds,
    }


def timed(loop: TrainingLoop, step: int, leaves_out: bool) -> tuple[tuple[float, ...], torch.Tensor]:
    """Seconds of a step, of its gradients alone, and of the processor in the step; loss and gradients."""
    source: Any = loop.source
    source.leaves_out = leaves_out
    source.sampling = replace(source.sampling, with_entropies=leaves_out)
    started, busy = time.perf_counter(), time.process_time()
    batch = source(step)
    sampled = time.perf_counter()
    with loop.scorer.in_place():
        loss, _ = loop.compute_gradients(batch)
    ended, cpu_seconds = time.perf_counter(), time.process_time() - busy
    assert len(batch.left_out) == (len(batch.indices) // 2 if leaves_out else 0)
    gradients = [weight.grad.flatten() for weight in loop.model.parameters() if weight.grad is not None]
    values = torch.cat([loss[None], *gradients]).clone()
    loop.model.zero_grad()
    return (ended - started, ended - sampled, cpu_seconds), values


if __name__ == "__main__":
    main()
