"""Tables for a terminal of 80 columns. Every text of a run is plain text in them, never rich's markup."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import JustifyMethod
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from prefold.reports.held_out import Row
from prefold.reports.numbers import NARROW_SPACE, change, ends, p_value, score
from prefold.reports.tasks import (
    Outcome,
    TaskTable,
    are_shares,
    decimals_of,
    in_training_data,
    in_words,
    note,
    outcome_of,
)

STYLES: dict[Outcome, str] = {
    "better": "bold green",
    "worse": "bold red",
    "mixed": "bold yellow",
    "unclear": "bold yellow",
    "missing": "bold",
}


def plain(text: Any, style: str = "") -> Text:
    # Many terminal fonts lack the narrow space.
    return Text(str(text).replace(NARROW_SPACE, "\u00a0"), style=style)


def coloured(text: str, outcome: Outcome) -> Text:
    return plain(text, STYLES[outcome].removeprefix("bold").strip())


def indented(text: Text, left: int = 2, below: int = 0) -> Padding:
    return Padding(text, (0, 0, below, left))


def grid(first: str, *others: str, header: bool = True, whole: bool = False, justify: JustifyMethod = "right") -> Table:
    """A table without lines. `justify`: the columns after the first; `whole`: they are never wrapped."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim", show_header=header)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify=justify, overflow="fold", no_wrap=whole)
    return table


def held_out_table(rows: Sequence[Row], heading: str, columns: Sequence[str]) -> Table:
    table = grid(heading, *columns)
    for row in rows:
        values = [(row.text(when), ends(row.intervals.get(when), row.writer(when))) for when in columns]
        table.add_row(plain(row.name.lower()), *(_above(value, interval) for value, interval in values))
    return table


def tasks_table(tasks: TaskTable, first: str = "before", second: str = "after", heading: str = "tasks") -> Table:
    """Groups, single tasks and averages, with intervals below the changes."""
    table = grid(heading, first, second, "change", whole=True)
    table.add_column("", overflow="fold")
    for name, facts in (*tasks.rows.items(), *tasks.averages.items()):
        shares, digits = are_shares(facts), decimals_of(facts)
        table.add_row(
            _above(name, note(facts), in_training_data(facts)),
            *(plain(score(facts.get(when), shares, digits)) for when in ("before", "after")),
            _above(
                change(facts.get("difference"), shares, digits),
                ends(facts.get("ci"), change, shares, digits),
                p_value(facts.get("p_value")),
            ),
            coloured(in_words(facts), outcome_of(facts)),
        )
    return table


def _above(text: str, *below: str) -> Text:
    """`below` in lines of their own, dimmed."""
    return plain(text).append(plain("".join(f"\n{line}" for line in below if line), "dim"))
