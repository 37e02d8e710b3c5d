"""What `prefold check` found in the data, as its page, the report and the terminal show it."""

from __future__ import annotations

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
        "counted": {name: label for name, label in ROW_COUNTS.items() if any(finite(row.get(name)) for row in sources)},
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
        "fingerprints": section(data, "fingerprint"),
    }


def histogram(separation: Values) -> list[tuple[Any, Any, Any]]:
    """Ends and number of pairs of each bin."""
    bins = section(separation, "histogram")
    counts, edges = as_list(bins.get("counts")), as_list(bins.get("edges"))
    return list(zip(edges, edges[1:], counts, strict=False))


def example(shown: Values) -> tuple[str, str, list[tuple[str, str, Any]]]:
    """A row as it is trained on: where it is from, its prompt, and label, text and tokens of each completion."""
    row, texts = section(shown, "row"), as_list(shown.get("completions"))
    labels = ("chosen", "rejected") if len(texts) == 2 else ("completion",)
    completions = zip(labels, map(str, texts), as_list(shown.get("tokens"))[1:], strict=False)
    return f"{row.get('source', '')}, row {row.get('row', '')}", str(shown.get("prompt", "")), list(completions)


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
