"""The plan of a run in words: for the terminal, the run's first lines and the page of `prefold check --html`."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from prefold.reports.numbers import about_count, about_duration, counted, size
from prefold.reports.run_files import Values
from prefold.reports.terminal_tables import grid, indented

PARTS = {
    "process": "Python and its libraries",
    "weights": "of the model, as they are loaded",
    "mapped": "weights that stay in their files, whose pages can be given back",
    "gathered": "of one layer, put together from all processes",
    "adapter": "LoRA's own weights",
    "reference": "the adapter that training began with",
    "gradients": "of what is trained",
    "optimizer": "its running means of the gradients",
    "activations": "what the layers keep for the backward pass",
    "head": "scores of the vocabulary",
    "cache": "keys and values of the tokens that are generated",
    "allocator": "memory that is not given back at once",
}
"""Explanations of the parts of a plan's memory."""
LINES = {
    "steps": "updates of the weights",
    "fits": "peak against what is at hand",
    "budget": "tokens that are computed at once (`train.max_tokens`)",
    "tokens": "that training reads, each prompt once",
    "work": "floating-point operations",
    "time": "on this machine",
    "disk": "what the run leaves",
}
DEVICES = {"cpu": "this machine", "cuda": "the GPU", "mps": "this Mac"}


def print_plan(console: Console, plan: Values) -> None:
    table = grid("memory", *plan["memory"])
    for label, *sizes in memory_rows(plan):
        table.add_row(label, *sizes, style="bold" if label == "peak" else None)
    console.print(table)
    for label, text in plan_lines(plan):
        console.print(Text(f"{label:9}", style="dim").append(text, style="default"))
    if plan["change"]:
        console.print(Text(change_title(plan), style="yellow"))
        console.print(indented(Text(plan["change"]["yaml"].rstrip()), 9))
    console.print("")


def in_two_lines(plan: Values) -> list[str]:
    """The plan as a run prints it before it begins."""
    seconds = f", about {about_duration(sum(plan['seconds'].values()))}{_untimed(plan)}" if plan["seconds"] else ""
    tokens, flops, disk = about_count(plan["tokens"]), about_count(plan["flops"]), plan["disk"]
    return [
        f"{counted(plan['optimizer_steps'], 'step')}, {tokens} tokens, {flops} FLOPs{seconds}",
        f"memory {size(plan['peak'])} of {size(plan['at_hand'])} at hand, disk {size(disk['needed'])} of "
        f"{size(disk['free'])} free",
    ]


def memory_rows(plan: Values) -> Iterator[list[str]]:
    """A row for each part that some phase has, and the peaks."""
    phases = list(plan["memory"].values())
    names = dict.fromkeys(name for parts in phases for name in parts)
    for name in names:
        sizes = [parts.get(name, 0) for parts in phases]
        if any(sizes):
            yield [name, *(size(memory) if memory else "" for memory in sizes)]
    yield ["peak", *map(size, plan["peaks"].values())]


def plan_lines(plan: Values) -> list[tuple[str, str]]:
    """Label and text of each line; each fits a line of a terminal."""
    disk, largest = plan["disk"], plan["largest_budget"]
    shared = "" if plan["packed"] else ", plain path"
    if plan["packed"] and plan["plain_tokens"] > plan["tokens"]:
        shared = f"; {plan['plain_tokens'] / plan['tokens']:.2f} times as many without shared prompts"
    more = "not even the largest row fits" if largest is None else f"up to {largest:,} fit"
    seconds = ", ".join(f"{phase} {about_duration(value)}" for phase, value in (plan["seconds"] or {}).items())
    kept = ", ".join(f"{name} {size(disk[name])}" for name in ("checkpoints", "adapter", "merged") if disk[name])
    fits = "fits" if plan["fits"] else "does not fit"
    return [
        ("steps", f"{plan['optimizer_steps']:,} optimizer steps of {plan['batch_size']} rows, in {plan['dtype']}"),
        ("fits", f"{fits} into {size(plan['at_hand'])} of {DEVICES[plan['device']]}"),
        ("budget", f"{plan['budget']:,} tokens at a time; {more}"),
        ("tokens", f"{about_count(plan['tokens'])} in all{shared}"),
        ("work", f"{about_count(plan['flops'])} FLOPs of training"),
        *([("time", seconds + _untimed(plan))] if seconds else []),
        ("disk", f"{kept}; {size(disk['free'])} free"),
    ]


def _untimed(plan: Values) -> str:
    return f" without {', '.join(plan['untimed'])}" if plan["untimed"] else ""


def change_title(plan: Values) -> str:
    fits = "To make it fit" if plan["change"]["fits"] else "Nearest, though it still does not fit"
    return f"{fits} (peak {size(plan['change']['peak'])}), write in the recipe:"
