"""What `prefold check` found in the data, prepared for its page, the report and the terminal."""

from __future__ import annotations

from difflib import SequenceMatcher
from itertools import pairwise
from typing import Any, NamedTuple

from prefold.reports.numbers import finite
from prefold.reports.run_files import Values, as_list, objects, section

SEVERITIES = {"error": 0, "warning": 1, "note": 2}
"""Severities of findings, with the order in which they are shown."""
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
    """Values for `data.html.j2`; `counted` and `tokens` are the labels of the counts of `sources` and of `splits`."""
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
        "lengths": lengths(data),
        "opened": False,
        "findings": sorted(findings, key=lambda finding: SEVERITIES.get(str(finding["severity"]), 3)),
        "examples": [example(shown) for shown in objects(data.get("examples"))],
        "has_context": any(map(has_context, objects(data.get("examples")))),
        "fingerprints": section(data, "fingerprint"),
    }


def is_counted(name: str, sources: list[Values]) -> bool:
    """Whether a count is worth showing; the number of examples is, if it differs from the number of rows used."""
    if name == "examples":
        return any(source.get(name) not in (None, 0, source.get("rows_used")) for source in sources)
    return any(finite(source.get(name)) for source in sources)


def unused(sources: list[Values]) -> dict[str, str]:
    """The columns that are not used, by source; sources with the same ones are named together."""
    by_columns: dict[str, list[str]] = {}
    for source in sources:
        if columns := ", ".join(map(str, as_list(source.get("unused")))):
            by_columns.setdefault(columns, []).append(str(source.get("path", "")))
    return {", ".join(dict.fromkeys(paths)): columns for columns, paths in by_columns.items()}


def histogram(separation: Values) -> list[tuple[Any, Any, Any]]:
    """Both ends of each bin, and its number of pairs."""
    bins = section(separation, "histogram")
    counts, edges = as_list(bins.get("counts")), as_list(bins.get("edges"))
    return list(zip(edges, edges[1:], counts, strict=False))


class Token(NamedTuple):
    """`part`: prompt, context (read, but not trained on), scored, or left_out. `differs`: from the other completion."""

    text: str
    part: str
    differs: bool
    id: Any


def example(shown: Values) -> tuple[str, dict[str, tuple[Any, list[Token]]]]:
    """A row as it is trained on: its origin, and by part the number of tokens and the tokens that are shown."""
    row, counts, parts = section(shown, "row"), section(shown, "counts"), section(shown, "tokens")
    tokens = {name: objects(parts[name]) for name in parts}
    sides = [tokens.get("chosen", []), tokens.get("rejected", [])]
    differing = dict(zip(("chosen", "rejected"), _differing(*sides), strict=True))
    return f"{row.get('source', '')}, row {row.get('row', '')}", {
        name: (
            counts.get(name),
            [
                Token(
                    str(token.get("text", "")),
                    str(token.get("part", "")),
                    number in differing.get(name, ()),
                    token.get("id"),
                )
                for number, token in enumerate(of_part)
            ],
        )
        for name, of_part in tokens.items()
    }


def _differing(chosen: list[Values], rejected: list[Values]) -> tuple[set[int], set[int]]:
    """For each of two completions, the indices of the tokens that the other lacks, when both are aligned in order."""
    first, second = ([str(token.get("text", "")) for token in side] for side in (chosen, rejected))
    left = set(range(len(chosen))), set(range(len(rejected)))
    for block in SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks():
        left[0].difference_update(range(block.a, block.a + block.size))
        left[1].difference_update(range(block.b, block.b + block.size))
    return left


def has_context(shown: Values) -> bool:
    return any(token.part == "context" for _, tokens in example(shown)[1].values() for token in tokens)


def lengths(data: Values) -> list[tuple[dict[str, Any], list[tuple[str, list[Any]]]]]:
    """Histograms of lengths, one for all parts with the same bins: medians by part, and the label and counts of each
    bin."""
    parts = section(data, "lengths")
    by_edges: dict[tuple[Any, ...], dict[str, Values]] = {}
    for name in parts:
        of_part = section(parts, name)
        by_edges.setdefault(tuple(as_list(of_part.get("edges"))), {})[name] = of_part
    drawn = []
    for edges, same in by_edges.items():
        if not all(isinstance(edge, int) for edge in edges):
            continue
        names = [f"{low} to {high - 1}" if high - low > 1 else f"{low}" for low, high in pairwise(edges)]
        counts = zip(*(as_list(of_part.get("counts")) for of_part in same.values()), strict=False)
        medians = {name: of_part.get("median") for name, of_part in same.items()}
        drawn.append((medians, list(zip(names, map(list, counts), strict=False))))
    return drawn


def rows_of(finding: Values, most: int = 8) -> str:
    """The first `most` rows of a finding, each source named once."""
    rows, total = objects(finding.get("rows")), finite(finding.get("count"))
    by_source: dict[str, list[str]] = {}
    for row in rows[:most]:
        by_source.setdefault(str(row.get("source", "")), []).append(str(row.get("row", "")))
    named = [f"{source}, {'row' if len(own) == 1 else 'rows'} {', '.join(own)}" for source, own in by_source.items()]
    left = int(len(rows) if total is None else total) - min(len(rows), most)
    return "; ".join([*named, *([f"and {left:,} more"] if named and left > 0 else [])])
