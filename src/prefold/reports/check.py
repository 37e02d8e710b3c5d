"""What `prefold check` shows in a terminal: sources, tokens, plan, findings, and the first pair as it is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefold.reports.data_tables import example, has_context, histogram, is_counted, rows_of, unused
from prefold.reports.plan import print_plan
from prefold.reports.run_files import Values
from prefold.reports.terminal_tables import grid, indented

SEVERITY_STYLE = {"error": "bold red", "warning": "yellow", "note": "cyan"}
ROWS_NAMED = 5
BAR_WIDTH = 40


def print_check(facts: Values, console: Console | None = None) -> None:
    """Args: facts: the content of `CheckReport.as_json`. console: unset: stdout."""
    console = console or Console(highlight=False)
    console.print(_sources(facts["sources"]))
    for paths, columns in unused(facts["sources"]).items():
        of = f" ({paths})" if len(facts["sources"]) > 1 else ""
        console.print(Text(f"columns that are not used{of}: {columns}".translate(CONTROL), style="dim"))
    console.print()
    console.print(_tokens(facts["tokens"]), "")
    print_plan(console, facts["plan"])
    if "separation" in facts:
        _print_separation(console, facts["separation"])
    print_findings(console, facts["findings"])
    first = facts["examples"][0]
    title = Text("The first row; what is trained on is underlined", style="bold")
    title.append(", and what is between ~ and ~ is read only" if has_context(first) else "").append(".")
    console.print(title)
    _print_example(console, first)
    ok = facts["ok"]
    console.print(Text("ok" if ok else "not ok: training cannot go on", style="green" if ok else "bold red"))


def print_findings(console: Console, findings: Sequence[Values]) -> None:
    for finding in findings:
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_row(Text(finding["severity"], SEVERITY_STYLE[finding["severity"]]), Text(finding["message"]))
        for text in filter(None, (rows_of(finding, ROWS_NAMED), finding["advice"])):
            table.add_row("", Text(text, "dim"))
        table.columns[0].min_width = 7
        console.print(table, "")


def _sources(sources: Sequence[Values]) -> Table:
    optional = [name for name in ("rows_filtered", "rows_not_drawn") if any(source[name] for source in sources)]
    behind = ["examples"] if is_counted("examples", list(sources)) else []
    headings = ["rows", *(name.removeprefix("rows_").replace("_", " ") for name in optional), "used", *behind]
    table = grid("source", "recognised as", *headings)
    table.columns[1].justify = "left"
    for source in sources:
        counts = [f"{source[name]:,}" for name in ("rows_in", *optional, "rows_used", *behind)]
        table.add_row(Text(source["path"]), Text(source["shape"]), *counts)
    return table


def _tokens(tokens: dict[str, Values]) -> Table:
    table = grid("tokens", "rows", "prompts", "completions", "longest", "saved by sharing")
    for split, counts in tokens.items():
        numbers = [f"{counts[name]:,}" for name in ("trees", "prompt", "completions", "longest")]
        table.add_row(split.replace("_", "-"), *numbers, f"{counts['shared_share']:.0%}")
    return table


def _print_separation(console: Console, separation: Values) -> None:
    """A histogram of the margins; the bars of pairs that the model ranks the wrong way round are dimmed."""
    share, pairs = separation["accuracy"], separation["pairs"]
    title = f"The model before training prefers the chosen one in {share:.0%} of {pairs} pairs."
    console.print(Text(title, style="bold"))
    bins = histogram(separation)
    most = max(number for _, _, number in bins)
    for low, high, number in bins:
        bar = "\u2588" * round(BAR_WIDTH * number / most)
        style = "green" if low >= 0 else "dim"
        console.print(Text(f"  {low:+7.2f} to {high:+6.2f}  ").append(bar, style=style).append(f" {number}"))
    console.print(Text("  nats per token, chosen minus rejected", style="dim"), "")


def _print_example(console: Console, shown: Values) -> None:
    _, parts = example(shown)
    for name, (count, tokens) in parts.items():
        if name == "prompt":
            console.print(indented(Text("".join(token.text for token in tokens).translate(CONTROL), style="dim")))
            continue
        console.print(Text(f"{name}, {count} tokens", style=f"bold {'red' if name == 'rejected' else 'green'}"))
        shown_text = Text()
        for part, run in groupby(tokens, lambda token: token.part):
            # A visible mark for white space at the end, which is trained on as well.
            marked = "".join(token.text for token in run).translate(CONTROL).replace("\n", "\u23ce\n")
            marked = f"~{marked}~" if part == "context" else marked
            shown_text.append(marked, "underline" if part == "scored" else "dim")
        shown_text.rstrip()
        console.print(indented(shown_text, 2, 1))


CONTROL = {code: f"\\x{code:02x}" for code in (*range(9), 11, 12, *range(14, 32), 127)}
"""Control characters in the data must not reach the terminal."""
