"""What `prefold check` shows in a terminal: sources, tokens, plan, findings, and the first pair as it is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from prefold.stages import CheckReport
    from prefold.trees.packing import TokenTree

SEVERITY_STYLE = {"error": "bold red", "warning": "yellow", "note": "cyan"}
ROWS_NAMED = 5


def print_check(found: CheckReport) -> None:
    console = Console(highlight=False)
    facts = found.as_json()
    console.print(_sources(facts["sources"]), "")
    console.print(_tokens(facts["tokens"]), "")
    console.print(Text(_plan(facts["plan"])), "")
    for finding in facts["findings"]:
        _print_finding(console, finding)
    console.print(Text("The first pair; what is trained on is underlined.", style="bold"))
    _print_tree(console, found.tokenizer, found.prepared.train[0].tree)
    console.print(
        Text("ok" if found.ok else "not ok: training cannot go on", style="green" if found.ok else "bold red")
    )


def _sources(sources: Sequence[dict[str, Any]]) -> Table:
    table = _table("source", "recognised as", "rows", "used")
    for source in sources:
        table.add_row(Text(source["path"]), Text(source["shape"]), f"{source['rows_in']:,}", f"{source['rows_used']:,}")
    return table


def _tokens(tokens: dict[str, dict[str, Any]]) -> Table:
    table = _table("tokens", "pairs", "prompts", "completions", "longest", "saved by sharing")
    for split, counts in tokens.items():
        numbers = [f"{counts[name]:,}" for name in ("trees", "prompt", "completions", "longest")]
        table.add_row(split.replace("_", "-"), *numbers, f"{counts['shared_share']:.0%}")
    return table


def _plan(plan: dict[str, Any]) -> str:
    budget = plan["max_tokens"]
    at_once = "as many tokens at a time as suit the device" if budget == "auto" else f"{budget:,} tokens at a time"
    return f"{plan['optimizer_steps']:,} optimizer steps of {plan['batch_size']} pairs, computed {at_once}"


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="left" if name == "recognised as" else "right", overflow="fold")
    return table


def _print_finding(console: Console, finding: dict[str, Any]) -> None:
    style = SEVERITY_STYLE[finding["severity"]]
    console.print(Text(finding["severity"], style=style).append(f"  {finding['message']}", style="default"))
    rows = [f"{row['source']} row {row['row']}" for row in finding["rows"][:ROWS_NAMED]]
    more = finding["count"] - len(rows)
    if rows:
        console.print(
            Padding(Text(", ".join(rows) + (f" and {more:,} more" if more > 0 else ""), style="dim"), (0, 0, 0, 9))
        )
    console.print(Padding(Text(finding["advice"], style="dim"), (0, 0, 1, 9)))


def _print_tree(console: Console, tokenizer: PreTrainedTokenizerBase, tree: TokenTree) -> None:
    console.print(Padding(Text(_decoded(tokenizer, tree.prompt), style="dim"), (0, 0, 0, 2)))
    for label, ids, style in zip(("chosen", "rejected"), tree.completions, ("green", "red"), strict=True):
        console.print(Text(f"{label}, {len(ids)} tokens", style=f"bold {style}"))
        # A visible mark for white space at the end, which is trained on as well.
        shown = _decoded(tokenizer, ids).replace("\n", "\u23ce\n").rstrip("\n")
        console.print(Padding(Text(shown, style="underline"), (0, 0, 1, 2)))


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False)).translate(CONTROL)


CONTROL = {code: f"\\x{code:02x}" for code in (*range(9), 11, 12, *range(14, 32), 127)}
"""Control characters in the data must not reach the terminal."""
