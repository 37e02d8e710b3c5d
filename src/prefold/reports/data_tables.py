"""What `prefold check` found in the data, as its page, the report and the terminal show it."""

from __future__ import annotations

from itertools import chain, pairwise
from typing import Any

from prefold.reports.numbers import finite
from prefold.reports.run_files import Values, as_list, objects, section

SEVERITIES = {"error": 0, "warning": 1, "note": 2}
"""With the order in which they are shown."""
ROW_COUNTS = {
    "rows_in": "Rows",
    "rows_filtered": "Filtered by where",
    "rows_not_drawn": "Not drawn",
    "rows_used": "Used",
    "examples": "Examples",
}
TOKEN_COUNTS = {
    "trees": "rows",
    "prompt": "tokens of prompts, each written once",
    "completions": "tokens of completions",
    "plain": "tokens if every completion brought its own prompt",
    "packed": "tokens computed",
    "longest": "tokens of the longest conversation",
    "shared_share": "saved by encoding each prompt once",
}
OF_COMPLETIONS = ("completions", "plain", "packed", "shared_share")
"""Counts that say nothing where completions are yet to be sampled."""


def data_tables(data: Values) -> Values:
    """`counted` and `tokens` are labels by what is counted, of `sources` and of `splits`."""
    sources, tokens = objects(data.get("sources")), section(data, "tokens")
    splits = {name: section(tokens, name) for name in tokens if section(tokens, name)}
    empty = dict.fromkeys(("severity", "kind", "count", "message", "advice"), "")
    findings = [{**empty, **finding, "rows": rows_of(finding)} for finding in objects(data.get("findings"))]
    sampled = all(counts.get("completions") == 0 for counts in splits.values())
    return {
        "sources": sources,
        "unused": unused(sources),
        "counted": {name: label for name, label in ROW_COUNTS.items() if is_counted(name, sources)},
        "splits": splits,
        "tokens": {
            name: label
            for name, label in TOKEN_COUNTS.items()
            if any(name in counts for counts in splits.values()) and not (sampled and name in OF_COMPLETIONS)
        },
        "separation": section(data, "separation"),
        "histogram": histogram(section(data, "separation")),
        "findings": sorted(findings, key=lambda finding: SEVERITIES.get(str(finding["severity"]), 3)),
        "examples": [example(shown) for shown in objects(data.get("examples"))],
        "has_context": any(map(has_context, objects(data.get("examples")))),
        "fingerprints": section(data, "fingerprint"),
    }


def is_counted(name: str, sources: list[Values]) -> bool:
    """Whether a count of rows says something; that of examples does where they are not as many as the rows used."""
    if name == "examples":
        return any(source.get(name) not in (None, 0, source.get("rows_used")) for source in sources)
    return any(finite(source.get(name)) for source in sources)


def list_of(value: Any) -> list[Any]:
    """A list, also of a tuple, which it is where it was not read from a file."""
    return list(value) if isinstance(value, tuple) else as_list(value)


def unused(sources: list[Values]) -> dict[str, str]:
    """By sources the columns that nothing is made of; those that have the same ones are named together."""
    by_columns: dict[str, list[str]] = {}
    for source in sources:
        if columns := ", ".join(map(str, list_of(source.get("unused")))):
            by_columns.setdefault(columns, []).append(str(source.get("path", "")))
    return {", ".join(dict.fromkeys(paths)): columns for columns, paths in by_columns.items()}


def histogram(separation: Values) -> list[tuple[Any, Any, Any]]:
    """Ends and number of pairs of each bin."""
    bins = section(separation, "histogram")
    counts, edges = as_list(bins.get("counts")), as_list(bins.get("edges"))
    return list(zip(edges, edges[1:], counts, strict=False))


Pieces = list[tuple[str, bool]]
"""A completion's text in pieces, each with whether it is context: read, and not trained on."""


def example(shown: Values) -> tuple[str, str, list[tuple[str, Pieces, Any]]]:
    """A row as it is trained on: where it is from, its prompt, and label, text and tokens of each completion."""
    row, texts = section(shown, "row"), as_list(shown.get("completions"))
    labels = ("chosen", "rejected") if len(texts) == 2 else ("completion",)
    spans = [*as_list(shown.get("context")), *([[]] * len(texts))]
    pieces = [pieces_of(str(text), as_list(of_text)) for text, of_text in zip(texts, spans, strict=False)]
    completions = zip(labels, pieces, as_list(shown.get("tokens"))[1:], strict=False)
    return f"{row.get('source', '')}, row {row.get('row', '')}", str(shown.get("prompt", "")), list(completions)


def pieces_of(text: str, context: list[Any]) -> Pieces:
    """A text cut at its spans of context, which are given as offsets of characters."""
    spans = [(int(span[0]), int(span[1])) for span in map(as_list, context) if len([*filter(is_offset, span)]) == 2]
    bounds = [0, *chain.from_iterable(spans), len(text)]
    return [(text[start:stop], (start, stop) in spans) for start, stop in pairwise(bounds) if start < stop]


def is_offset(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def has_context(shown: Values) -> bool:
    return any(is_context for _, pieces, _ in example(shown)[2] for _, is_context in pieces)


def rows_of(finding: Values, most: int = 8) -> str:
    """The first rows by source, each source named once."""
    rows = objects(finding.get("rows"))
    by_source: dict[str, list[str]] = {}
    for row in rows[:most]:
        by_source.setdefault(str(row.get("source", "")), []).append(str(row.get("row", "")))
    named = [
        f"{source}, {'row' if len(numbers) == 1 else 'rows'} {', '.join(numbers)}"
        for source, numbers in by_source.items()
    ]
    total = finite(finding.get("count"))
    left = int(len(rows) if total is None else total) - min(len(rows), most)
    return "; ".join([*named, *([f"and {left:,} more"] if named and left > 0 else [])])
