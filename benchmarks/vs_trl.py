"""prefold against TRL: the same model, pairs, losses and dtype, step by step in alternation.

    python -m benchmarks.vs_trl dpo --prompt 256 --chosen 128 --rejected 160 --pairs 24
    python -m benchmarks.vs_trl orpo --data pairs.jsonl --pairs 24 --dtype bfloat16
    python -m benchmarks.vs_trl grpo --prompts 5
    python -m benchmarks.vs_trl dpo --base ../before/src

Each side trains in a process of its own, as a user would start it, and waits while the other takes its step. The first
step of each is a warm-up and not counted. Ratios are of the same step on both sides, and the median of those. Prints a
table and, as its last line, JSON.

A step of GRPO samples a group of completions for each prompt, by default of equal lengths (end tokens are ignored);
what each side draws is its own, so losses are not compared. `training_ratio` is that of the steps without the sampling,
`rollout_ratio` that of the sampling. TRL repeats the prompt for each of its completions, in sampling and training.

`--base` names another source tree of prefold, which takes TRL's place: both sides are `prefold train` then, on text,
and the time to the end of the first step, with reading the data and computing the reference, is compared too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.limits import Work, matrix_product_rate
from benchmarks.results import Ratio, parser_for, save
from benchmarks.sides import Side, TakenStep, running
from benchmarks.workloads import (
    BATCH,
    HELD_OUT,
    Workload,
    make_prompts,
    random_pairs,
    random_rows,
    render_prompt,
    text_pairs,
)
from prefold.files import read_jsonl
from prefold.models.fetch import fetch
from prefold.models.tokenizer import load_tokenizer
from prefold.trees.packing import TokenTree

SIDES = {"dpo": ("dpo", "pairs"), "orpo": ("orpo", "pairs"), "grpo": ("grpo", "grpo")}
"""Of each method, the functions of `trl_sides` and `prefold_sides`."""


@dataclass
class Measured:
    """What a side took: the first step, which is not counted, and the others."""

    name: str
    first: TakenStep | None = None
    steps: list[TakenStep] = field(default_factory=list)
    logged: list[dict[str, Any]] = field(default_factory=list)

    def add(self, step: TakenStep) -> None:
        if self.first is None:
            self.first = step
        else:
            self.steps.append(step)

    @property
    def seconds(self) -> list[float]:
        return [step.seconds for step in self.steps]

    @property
    def rollout_seconds(self) -> list[float]:
        return [step.rollout_seconds for step in self.steps]

    @property
    def training_seconds(self) -> list[float]:
        """What is left of each step without its sampling."""
        return [step.seconds - step.rollout_seconds for step in self.steps]

    @property
    def peak_bytes(self) -> int:
        return self.steps[-1].peak_bytes

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.logged[1:]]

    @property
    def mean_lengths(self) -> list[float]:
        """Of the completions that were sampled, in tokens."""
        return [line["completions/mean_length"] for line in self.logged[1:]]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    workload, skipped = workload_of(options)
    theirs, ours, rate = alternate(options, workload)
    summary = summarise(options, workload, theirs, ours, rate)
    say(workload, theirs, ours, summary, skipped)
    if not options.base:
        save(result_name(options), options, {**summary, "trl": shown(theirs), "prefold": shown(ours)}, peer="trl")
    print(json.dumps(summary))


# ---- what there is to do ----------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_for("vs_trl", __doc__)
    parser.add_argument("method", choices=sorted(SIDES))
    parser.add_argument("--base", type=Path, help="another `src` folder of prefold, which is measured in TRL's place")
    parser.add_argument("--data", type=Path, help="jsonl of prompt, chosen, rejected; else random tokens or words")
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
    if options.base and not (options.base / "prefold").is_dir():
        parser.error(f"--base: {options.base} holds no folder `prefold`")
    return options


def workload_of(options: argparse.Namespace) -> tuple[Workload, int]:
    """What both sides are to do, and how many pairs were left out as too long."""
    model, skipped, batch = fetch(options.model), 0, BATCH
    means = (options.prompt, options.chosen, options.rejected)
    rows: list[dict[str, str]] = []
    if options.method == "grpo":
        batch, tokenizer = options.prompts_per_step, load_tokenizer(model)
        texts = make_prompts(tokenizer, options.prompts + batch + HELD_OUT, options.prompt_tokens)
        # Stand-ins for the completions that are to be sampled.
        group = ((0,) * options.new_tokens,) * options.group
        trees = [TokenTree(tuple(render_prompt(text, tokenizer)), group) for text in texts[: options.prompts]]
        rows = [{"prompt": text} for text in texts]
    elif options.data:
        trees, skipped = text_pairs(options.data, model, options.max_length, options.pairs)
    else:
        trees = random_pairs(model, means, options.pairs)
    if options.base and options.method != "grpo":
        count = options.pairs + batch + HELD_OUT
        rows = read_jsonl(options.data)[:count] if options.data else random_rows(means, count)
    settings = (options.method, model, options.dtype, options.gradient_checkpointing)
    return Workload(*settings, trees, rows, batch, options.natural_stops or bool(options.base)), skipped


# ---- the two sides ----------------------------------------------------------------------------------------------


@contextmanager
def sides_of(options: argparse.Namespace, workload: Workload) -> Iterator[tuple[Side, Side]]:
    if not options.base:
        theirs, ours = SIDES[options.method]
        yield (
            Side("TRL", f"benchmarks.trl_sides:{theirs}", workload, plain=True),
            Side("prefold", f"benchmarks.prefold_sides:{ours}", workload),
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        made = []
        for name, source in (("base", {"source": options.base}), ("prefold", {})):
            own = Path(folder) / name
            own.mkdir()
            # Each with its own cache: a reference that one has computed is not to be found by the other.
            cache = {"PREFOLD_CACHE": str(own / "cache")}
            recipe = workload.recipe(own)
            made.append(Side(name, "benchmarks.prefold_run:train", recipe, environment=cache, **source))
        yield made[0], made[1]


def alternate(options: argparse.Namespace, workload: Workload) -> tuple[Measured, Measured, float]:
    """Both sides' steps, one after the other in turn, and the matrix-product rate in FLOP/s, measured in between."""
    rates: list[float] = []
    with (
        sides_of(options, workload) as sides,
        running(*sides),
        Console(stderr=True).status("loading the model on both sides") as status,
    ):
        measured = [Measured(side.name) for side in sides]
        for side in sides:
            side.receive()
        for step in range(workload.steps + 1):
            for side, taken in zip(sides, measured, strict=True):
                status.update(f"step {step} of {workload.steps}, {side.name}")
                taken.add(side.ask())
            rates.append(matrix_product_rate(workload.dtype))
        for side, taken in zip(sides, measured, strict=True):
            taken.logged = side.ask()
    return measured[0], measured[1], statistics.median(rates)


# ---- what came of it --------------------------------------------------------------------------------------------


def summarise(
    options: argparse.Namespace, workload: Workload, theirs: Measured, ours: Measured, rate: float
) -> dict[str, Any]:
    work, ratio = Work.of(workload), Ratio.of(theirs.seconds, ours.seconds)
    compared = workload.method != "grpo" or options.base
    summary = {
        "ratio": ratio.median,
        "spread": ratio.spread,
        "limit_share": None if workload.natural_stops else round(work.flops / rate / sum(ours.seconds), 3),
        "memory_ratio": round(ours.peak_bytes / theirs.peak_bytes, 3),
        "token_ceiling": round(work.plain_tokens / work.unique_tokens, 3),
        "loss_difference": loss_difference(theirs, ours) if compared else None,
        "matrix_product_gflops": round(rate / 1e9),
    }
    if options.base:
        assert theirs.first and ours.first
        summary["first_step_ratio"] = round(theirs.first.seconds / ours.first.seconds, 3)
    elif workload.method == "grpo":
        summary["training_ratio"] = Ratio.of(theirs.training_seconds, ours.training_seconds).median
        summary["rollout_ratio"] = Ratio.of(theirs.rollout_seconds, ours.rollout_seconds).median
    return summary


def loss_difference(theirs: Measured, ours: Measured) -> float:
    """The largest of the steps, as a share."""
    return max(abs(t - o) / max(abs(t), 1e-12) for t, o in zip(theirs.losses, ours.losses, strict=True))


def say(workload: Workload, theirs: Measured, ours: Measured, summary: dict[str, Any], skipped: int) -> None:
    both = (theirs, ours)
    table = Table("step", *(f"{side.name} s" for side in both), "ratio", *(f"{side.name} loss" for side in both))
    for number, (t, o, *losses) in enumerate(
        zip(theirs.seconds, ours.seconds, theirs.losses, ours.losses, strict=True), start=1
    ):
        table.add_row(str(number), f"{t:.2f}", f"{o:.2f}", f"{t / o:.2f}", *(f"{loss:.5f}" for loss in losses))
    table.add_section()
    parts = ["seconds", *(["training_seconds", "rollout_seconds"] if "rollout_ratio" in summary else [])]
    for part in parts:
        values = [getattr(side, part) for side in both]
        medians = (f"{statistics.median(of_side):.2f}" for of_side in values)
        table.add_row(f"median {part.removesuffix('_seconds')}", *medians, str(Ratio.of(*values)))
    if "first_step_ratio" in summary:
        firsts = (f"{side.first.seconds:.2f}" for side in both if side.first)
        table.add_row("first step", *firsts, f"{summary['first_step_ratio']:.2f}")
    table.add_row("peak GB", *(f"{side.peak_bytes / 1e9:.2f}" for side in both), f"{summary['memory_ratio']:.2f}")
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


def result_name(options: argparse.Namespace) -> str:
    source = "text" if options.data else "random"
    if options.method == "grpo":
        source = "natural" if options.natural_stops else "equal"
    return f"{options.method}-{source}-{options.dtype}"


def shown(side: Measured) -> dict[str, Any]:
    """`rollout_seconds` and the completions' mean lengths are those of the steps of a method that samples."""
    sampled = any("completions/mean_length" in line for line in side.logged)
    return {
        "seconds": [round(seconds, 4) for seconds in side.seconds],
        "losses": side.losses,
        "peak_bytes": side.peak_bytes,
        **({"rollout_seconds": [round(s, 4) for s in side.rollout_seconds]} if sampled else {}),
        **({"mean_lengths": side.mean_lengths} if sampled else {}),
    }


if __name__ == "__main__":
    main()
