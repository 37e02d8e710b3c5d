"""Completions by prefold and by transformers' `generate`: the same model, prompts and settings, in alternation.

    python -m benchmarks.rollouts

Groups of completions as GRPO draws them, at temperature 1: once all of the same length (end tokens are ignored), once
as long as the model makes them. Tokens per second are of the tokens up to the end of each completion. Prints a table
and, as its last line, JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.results import Ratio, parser_for, quieten, save
from benchmarks.workloads import make_prompts, render_prompt
from prefold.generation.engine import LocalEngine
from prefold.generation.sampling import Sampling
from prefold.models.fetch import fetch
from prefold.models.load import load_model
from prefold.models.tokenizer import load_tokenizer
from prefold.recipe import Model

Side = Callable[[PreTrainedModel, PreTrainedTokenizerBase, list[list[int]], Sampling], int]
"""Writes completions of prompts, and says how many tokens they have."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    quieten()
    model = load_model(Model(name=options.model), dtype=options.dtype)
    tokenizer = load_tokenizer(fetch(options.model))
    texts = make_prompts(tokenizer, options.prompts, options.prompt_tokens)
    prompts = [render_prompt(text, tokenizer) for text in texts]
    settings = Sampling(options.new_tokens, options.group, temperature=1.0)
    measured = {
        "equal_lengths": alternate(model, tokenizer, prompts, replace(settings, end_tokens=()), options.repeats),
        "natural_stops": alternate(model, tokenizer, prompts, settings, options.repeats),
    }
    summary = {f"ratio_{kind}": sides["ratio"] for kind, sides in measured.items()}
    say(measured)
    save("rollouts" if options.dtype == "float32" else f"rollouts-{options.dtype}", options, {**summary, **measured})
    print(json.dumps(summary))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_for("rollouts", __doc__)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8, help="completions of each prompt (default 8)")
    parser.add_argument("--prompt-tokens", type=int, default=384)
    parser.add_argument("--new-tokens", type=int, default=64, help="at most")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args(arguments)


def alternate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    settings: Sampling,
    repeats: int,
) -> dict[str, Any]:
    """Tokens per second of both sides, and the median of the repeats' ratios.

    Where `cpu_seconds` are far from the time that passed, other work shared the machine.
    """
    sides: dict[str, Side] = {"transformers": with_transformers, "prefold": with_prefold}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    lengths: dict[str, list[float]] = {name: [] for name in sides}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in sides}
    for write in sides.values():
        write(model, tokenizer, prompts[:1], replace(settings, max_new_tokens=8))
    for seed in range(repeats):
        for name, write in sides.items():
            started, busy = time.perf_counter(), time.process_time()
            tokens = write(model, tokenizer, prompts, replace(settings, seed=seed))
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            rates[name].append(round(tokens / (time.perf_counter() - started), 2))
            cpu_seconds[name].append(round(time.process_time() - busy, 1))
            lengths[name].append(round(tokens / len(prompts) / settings.num_answers, 2))
    ratio = Ratio.of(rates["prefold"], rates["transformers"])
    return {
        "ratio": ratio.median,
        "spread": ratio.spread,
        "tokens_per_second": rates,
        "mean_length": lengths,
        "cpu_seconds": cpu_seconds,
    }


def with_prefold(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], settings: Sampling
) -> int:
    groups = LocalEngine(model, tokenizer).sample(prompts, settings)
    return sum(len(completion.token_ids) for group in groups for completion in group)


def with_transformers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], settings: Sampling
) -> int:
    """One batch of all completions, prompts padded on the left, as trainers call it."""
    torch.manual_seed(settings.seed)
    longest, pad = max(map(len, prompts)), int(tokenizer.pad_token_id or 0)
    rows = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts for _ in range(settings.num_answers)]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts for _ in range(settings.num_answers)]
    end = tokenizer.eos_token_id
    least = settings.max_new_tokens if settings.end_tokens == () else None
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=least,
        do_sample=True,
        temperature=settings.temperature,
        top_k=0,
        eos_token_id=end,
        pad_token_id=pad,
    )
    inputs = {"input_ids": rows, "attention_mask": mask}
    tensors = {name: torch.tensor(values, device=model.device) for name, values in inputs.items()}
    with torch.inference_mode():
        written = cast(Any, model).generate(**tensors, generation_config=config)[:, longest:].tolist()
    return sum(row.index(end) + 1 if end in row else len(row) for row in written)


def say(measured: dict[str, Any]) -> None:
    table = Table("tokens per second", "transformers", "prefold", "ratio", "mean tokens")
    for kind, sides in measured.items():
        rates, spread = sides["tokens_per_second"], sides["spread"]
        medians = (f"{statistics.median(rates[name]):.1f}" for name in ("transformers", "prefold"))
        ratio = f"{sides['ratio']:.2f} ({spread[0]:.2f}-{spread[-1]:.2f})"
        mean = statistics.mean(sides["mean_length"]["prefold"])
        table.add_row(kind.replace("_", " "), *medians, ratio, f"{mean:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
