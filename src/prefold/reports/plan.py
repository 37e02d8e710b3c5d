"""The plan of a run in words: for the terminal, the run's first lines and the page of `prefold check --html`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

Values = dict[str, Any]

DEVICES = {"cpu": "this machine", "cuda": "the GPU", "mps": "this Mac"}


def print_plan(console: Console, plan: Values) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    heading, *phases = memory_headings(plan)
    table.add_column(heading, overflow="fold")
    for phase in phases:
        table.add_column(phase, justify="right")
    for label, *sizes in memory_rows(plan):
        table.add_row(label, *sizes, style="bold" if label == "peak" else None)
    console.print(table)
    for label, text in plan_lines(plan):
        console.print(Text(f"{label:9}", style="dim").append(text, style="default"))
    if plan["change"]:
        console.print(Text(change_title(plan), style="yellow"))
        console.print(Padding(Text(plan["change"]["yaml"].rstrip()), (0, 0, 0, 9)))
    console.print("")


def in_two_lines(plan: Values) -> list[str]:
    """What a run says before it begins."""
    seconds = f", about {duration(sum(plan['seconds'].values()))}{_untimed(plan)}" if plan["seconds"] else ""
    return [
        f"{plan['optimizer_steps']:,} steps, {count(plan['tokens'])} tokens, {count(plan['flops'])} FLOPs{seconds}",
        f"memory {size(plan['peak'])} of {size(plan['at_hand'])} at hand, disk {size(plan['disk']['needed'])} of "
        f"{size(plan['disk']['free'])} free",
    ]


def memory_headings(plan: Values) -> list[str]:
    return ["memory", *plan["memory"]]


def memory_rows(plan: Values) -> Iterator[list[str]]:
    """A row for each part that some phase has, and the peaks."""
    phases = list(plan["memory"].values())
    names = dict.fromkeys(name for parts in phases for name in parts)
    for name in names:
        sizes = [parts.get(name, 0) for parts in phases]
        if any(sizes):
            yield [name, *(size(one) if one else "" for one in sizes)]
    yield ["peak", *map(size, plan["peaks"].values())]


def plan_lines(plan: Values) -> list[tuple[str, str]]:
    """Label and text; each fits a line of a terminal."""
    steps = f"{plan['optimizer_steps']:,} optimizer steps of {plan['batch_size']} rows, in {plan['dtype']}"
    where = DEVICES[plan["device"]]
    verdict = "fits" if plan["fits"] else "does not fit"
    lines = [
        ("steps", steps),
        ("fits", f"{verdict} into {size(plan['at_hand'])} of {where}"),
        ("budget", _budget(plan)),
    ]
    saved = "" if plan["packed"] else ", plain path"
    if plan["packed"] and plan["plain_tokens"] > plan["tokens"]:
        saved = f"; {plan['plain_tokens'] / plan['tokens']:.2f} times as many without shared prompts"
    lines.append(("tokens", f"{count(plan['tokens'])} in all{saved}"))
    lines.append(("work", f"{count(plan['flops'])} FLOPs of training"))
    if plan["seconds"]:
        parts = ", ".join(f"{phase} {duration(value)}" for phase, value in plan["seconds"].items())
        lines.append(("time", parts + _untimed(plan)))
    disk = plan["disk"]
    parts = ", ".join(f"{name} {size(disk[name])}" for name in ("checkpoints", "adapter", "merged") if disk[name])
    lines.append(("disk", f"{parts}; {size(disk['free'])} free"))
    return lines


def _untimed(plan: Values) -> str:
    return f" without {', '.join(plan['untimed'])}" if plan["untimed"] else ""


def _budget(plan: Values) -> str:
    at_once, largest = f"{plan['budget']:,} tokens at a time", plan["largest_budget"]
    return at_once + ("; not even the largest row fits" if largest is None else f"; up to {largest:,} fit")


def change_title(plan: Values) -> str:
    fits = "To make it fit" if plan["change"]["fits"] else "Nearest, though it still does not fit"
    return f"{fits} (peak {size(plan['change']['peak'])}), write in the recipe:"


def size(value: float) -> str:
    return _scaled(value, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), "B")


def count(value: float) -> str:
    """`12,345`, or `1.2e15` where nobody counts digits."""
    return f"{value:,.0f}" if value < 1e7 else f"{value:.1e}".replace("e+", "e").replace("e0", "e")


def duration(seconds: float) -> str:
    """In the unit that reads best."""
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}" if seconds < 10 * length else f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _scaled(value: float, units: Sequence[tuple[str, float]], smallest: str) -> str:
    for unit, length in units:
        if value >= length:
            return f"{value / length:.1f} {unit}" if value < 100 * length else f"{value / length:.0f} {unit}"
    return f"{value:.0f} {smallest}"
