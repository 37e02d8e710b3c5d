"""What `prefold data` shows in a terminal: columns, uses, votes, findings, the first rows as messages, a section."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from prefold.reports.check import print_findings
from prefold.reports.numbers import counted
from prefold.reports.row import print_heading, print_messages, shown_cell
from prefold.reports.run_files import Values
from prefold.reports.terminal_tables import grid, plain

LONGEST_EXAMPLE = 60
LONGEST_TEXT = 240
WHAT_FOR = {"pairs": "pairs", "unpaired": "answers with a label", "prompts": "prompts alone"}


def print_survey(facts: Values, console: Console | None = None) -> None:
    """Args: facts: the content of `Survey.as_json`. console: unset: stdout."""
    console = console or Console(highlight=False)
    if facts["refused"]:
        _print_columns(console, facts["columns"], "")
        return
    console.print(Text(f"{facts['source']}: recognised as {facts['recognised_as']}", style="bold"))
    filtered = f", {facts['rows_filtered']:,} filtered" if facts["rows_filtered"] else ""
    made = f", {counted(facts['examples'], 'example')}" if facts["examples"] != facts["rows_usable"] else ""
    console.print(f"{counted(facts['rows'], 'row')}{filtered}, {facts['rows_usable']:,} usable{made}")
    console.print()
    _print_columns(console, facts["columns"])
    table = grid("can be used as", "recognised as", "by methods such as", justify="left")
    for kind, use in facts["uses"].items():
        read_as, methods = (plain(use["recognised_as"]), ", ".join(use["methods"])) if use else ("no", "")
        table.add_row(WHAT_FOR[kind], read_as, methods)
    console.print(table)
    console.print()
    for column, votes in facts["votes"].items():
        shown = ", ".join(f"{value} in {counted(number, 'row')}" for value, number in votes.items())
        console.print(Text(shown_cell(f"{column}: {shown}")))
    print_findings(console, facts["findings"])
    for record in facts["first"]:
        messages, row = {part: value for part, value in record.items() if part != "row"}, record["row"]
        print_heading(console, f"{row['source']}, row {row['row']}, as messages")
        print_messages(console, messages, LONGEST_TEXT)
    print_heading(console, "In a recipe")
    console.print(Text(facts["section"].rstrip()), soft_wrap=True)


def _print_columns(console: Console, columns: dict[str, Values], without_role: str = "not used") -> None:
    table = grid("column", "holds", "read as", "example", justify="left")
    for name, facts in columns.items():
        kinds, total = facts["holds"].items(), sum(facts["holds"].values())
        holds = ", ".join(kind if number == total else f"{kind} {number / total:.0%}" for kind, number in kinds)
        role = plain(facts["role"]) if facts["role"] else plain(without_role, "dim")
        example = plain(shown_cell(facts["example"], LONGEST_EXAMPLE), "dim")
        table.add_row(plain(shown_cell(name)), plain(holds), role, example)
    console.print(table)
    console.print()
