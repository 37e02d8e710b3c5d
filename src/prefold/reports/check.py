"""What `prefold check` shows in a terminal: sources, tokens, plan, findings, and the first pair as it is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from prefold.reports.plan import print_plan

SEVERITY_STYLE = {"error": "bold red", "warning": "yellow", "note": "cyan"}
ROWS_NAMED = 5
BAR_WIDTH = 40


def print_check(facts: dict[str, Any], console: Console | None = None) -> None:
    """Args: facts: the content of `CheckReport.as_json`. console: unset: stdout."""
    console = console or Console(highlight=False)
    console.print(_sources(facts["sources"]), "")
    console.print(_tokens(facts["tokens"]), "")
    print_plan(console, facts["plan"])
    if "separation" in facts:
        _print_separation(console, facts["separation"])
    for finding in facts["findings"]:
        _print_finding(console, finding)
    console.print(Text("The first row; what is trained on is underlined.", style="bold"))
    _print_example(console, facts["examples"][0])
    ok = facts["ok"]
    console.print(Text("ok" if ok else "not ok: training cannot go on", style="green" if ok else "bold red"))


def _sources(sources: Sequence[dict[str, Any]]) -> Table:
    optional = [name for name in ("rows_filtered", "rows_not_drawn") if any(source[name] for source in sources)]
    headings = ["rows", *(name.removeprefix("rows_").replace("_", " ") for name in optional), "used"]
    table = _table("source", "recognised as", *headings)
    for source in sources:
        counts = [f"{source[name]:,}" for name in ("rows_in", *optional, "rows_used")]
        table.add_row(Text(source["path"]), Text(source["shape"]), *counts)
    return table


def _tokens(tokens: dict[str, dict[str, Any]]) -> Table:
    table = _table("tokens", "rows", "prompts", "completions", "longest", "saved by sharing")
    for split, counts in tokens.items():
        numbers = [f"{counts[name]:,}" for name in ("trees", "prompt", "completions", "longest")]
        table.add_row(split.replace("_", "-"), *numbers, f"{counts['shared_share']:.0%}")
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="left" if name == "recognised as" else "right", overflow="fold")
    return table


def _print_finding(console: Console, finding: dict[str, Any]) -> None:
    style = SEVERITY_STYLE[finding["severity"]]
    console.print(Text(finding["severity"], style=style).append(f"  {finding['message']}", style="default"))
    if finding["rows"]:
        console.print(Padding(Text(_rows(finding), style="dim"), (0, 0, 0, 9)))
    console.print(Padding(Text(finding["advice"], style="dim"), (0, 0, 1, 9)))


def _rows(finding: dict[str, Any]) -> str:
    """The first rows by source, each source named once."""
    by_source: dict[str, list[int]] = {}
    for row in finding["rows"][:ROWS_NAMED]:
        by_source.setdefault(row["source"], []).append(row["row"])
    named = [
        f"{source}, row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows))}" for source, rows in by_source.items()
    ]
    more = finding["count"] - min(len(finding["rows"]), ROWS_NAMED)
    return "; ".join(named) + (f" and {more:,} more" if more > 0 else "")


def _print_separation(console: Console, found: dict[str, Any]) -> None:
    """A histogram of the margins; the bars of pairs that the model has the wrong way round are dimmed."""
    title = f"The model before training prefers the chosen one in {found['accuracy']:.0%} of {found['pairs']} pairs."
    console.print(Text(title, style="bold"))
    counts, edges = found["histogram"]["counts"], found["histogram"]["edges"]
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        bar = "\u2588" * round(BAR_WIDTH * count / max(counts))
        style = "green" if low >= 0 else "dim"
        console.print(Text(f"  {low:+7.2f} to {high:+6.2f}  ").append(bar, style=style).append(f" {count}"))
    console.print(Text("  nats per token, chosen minus rejected", style="dim"), "")


def _print_example(console: Console, shown: dict[str, Any]) -> None:
    console.print(Padding(Text(shown["prompt"].translate(CONTROL), style="dim"), (0, 0, 0, 2)))
    labels = (
        (("chosen", "green"), ("rejected", "red")) if len(shown["completions"]) == 2 else (("completion", "green"),)
    )
    for (label, style), text, tokens in zip(labels, shown["completions"], shown["tokens"][1:], strict=False):
        console.print(Text(f"{label}, {tokens} tokens", style=f"bold {style}"))
        # A visible mark for white space at the end, which is trained on as well.
        marked = text.translate(CONTROL).replace("\n", "\u23ce\n").rstrip("\n")
        console.print(Padding(Text(marked, style="underline"), (0, 0, 1, 2)))


CONTROL = {code: f"\\x{code:02x}" for code in (*range(9), 11, 12, *range(14, 32), 127)}
"""Control characters in the data must not reach the terminal."""
