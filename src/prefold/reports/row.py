"""What `prefold check --row` shows in a terminal: a row as it is read, as messages, as text and as tokens."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.text import Text

from prefold.reports.check import CONTROL, print_findings
from prefold.reports.run_files import Values
from prefold.reports.terminal_tables import indented

LONGEST_CELL = 400
MARKS = {"prompt": "", "context": "~", "scored": "+"}
"""What tells the parts apart without colours."""
STYLES = {"prompt": "dim", "context": "yellow", "scored": "green"}
VISIBLE = CONTROL | {ord(" "): "\u00b7", ord("\n"): "\u23ce", ord("\t"): "\u21e5", ord("\r"): "\u240d"}


def print_row(facts: Values, console: Console | None = None) -> None:
    """Args: facts: the content of `SeenRow.as_json`. console: unset: stdout."""
    console = console or Console(highlight=False)
    origin = f"{facts['row']['source']}, row {facts['row']['row']}, of `data.{facts['split']}`"
    console.print(Text(f"{origin}; recognised as {facts['recognised_as']}", style="bold"))
    for problem in facts["left_out"]:
        console.print(Text("left out", style="yellow").append(f"  {problem['kind']}: {problem['message']}", "default"))
    print_findings(console, facts["findings"])
    print_heading(console, "As it is read")
    for name, cell in (facts["read"] or {}).items():
        _print_named(console, name, shown_cell(cell))
    entries = list(zip(facts["messages"], facts["rendered"], facts["tokens"], strict=True))
    for number, (messages, rendered, tokens) in enumerate(entries, start=1):
        which = f", {number} of {len(entries)}" if len(entries) > 1 else ""
        print_heading(console, f"As messages{which}")
        print_messages(console, messages)
        if rendered:
            print_heading(console, f"As text{which}")
            for part, text in rendered.items():  # of each conversation what follows the prompt
                goes_on = part != "prompt" and text.startswith(rendered["prompt"])
                _print_named(console, part, text[len(rendered["prompt"]) :] if goes_on else text)
        if tokens:
            print_heading(console, f"As it is trained{which}")
            _print_tokens(console, tokens)


def shown_cell(cell: Any, longest: int = LONGEST_CELL) -> str:
    """A cell as text that a terminal can show. A longer one is cut: at its end if `longest` is below `LONGEST_CELL`,
    else in its middle."""
    text = cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False, default=str)
    text = text.encode("utf-8", "backslashreplace").decode().translate(CONTROL)
    if len(text) <= longest:
        return text
    if longest < LONGEST_CELL:
        return f"{text[: longest - 3]}..."
    half = longest // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def print_messages(console: Console, messages: Values, longest: int = LONGEST_CELL) -> None:
    """The parts of a record, each message with its role and the fields that it has besides its text."""
    for part, value in messages.items():
        if part not in ("prompt", "chosen", "rejected", "completion"):
            _print_named(console, part, shown_cell(value, longest))
            continue
        for message in value:
            _print_named(console, f"{part}, {message['role']}", shown_cell(message.get("content") or "", longest))
            for name, field in message.items():
                if name not in ("role", "content"):
                    console.print(indented(Text(f"{shown_cell(name)}: {shown_cell(field, longest)}", "cyan"), 4))


def print_heading(console: Console, text: str) -> None:
    console.print()
    console.print(Text(text, style="bold underline"))


def _print_named(console: Console, name: str, text: str) -> None:
    console.print(Text(f"{shown_cell(name)}:", style="bold"))
    console.print(indented(Text(text.translate(CONTROL)), 4))


def _print_tokens(console: Console, tokens: dict[str, list[Values]]) -> None:
    console.print(
        Text("No mark: prompt. ", STYLES["prompt"])
        .append(f"{MARKS['scored']}: trained on. ", STYLES["scored"])
        .append(f"{MARKS['context']}: read, and not trained on. ", STYLES["context"])
        .append("Behind each token its id.")
    )
    for part, of_part in tokens.items():
        counts = [f"{sum(token['part'] == kind for token in of_part)} {kind}" for kind in ("scored", "context")]
        number = f"{len(of_part)} tokens" + ("" if part == "prompt" else f" ({', '.join(counts)})")
        console.print(Text(f"{part}, {number}", style="bold"))
        _print_wrapped(console, of_part)


def _print_wrapped(console: Console, tokens: list[Values]) -> None:
    """Lines are broken between tokens, never between a token and its id, and wherever the text has a line break."""
    line = Text()
    for token in tokens:
        text = token["text"].translate(VISIBLE) or "\u2205"
        cell = Text(f"{MARKS[token['part']]}{text}", STYLES[token["part"]]).append(f" {token['id']}", "dim")
        if line and line.cell_len + 2 + cell.cell_len > console.width - 2:
            console.print(indented(line))
            line = Text()
        line.append("  " if line else "").append(cell)
        if "\n" in token["text"]:
            console.print(indented(line))
            line = Text()
    if line:
        console.print(indented(line))
