"""Texts in one row, in which prefixes that they share are written once.

A prompt tree has two levels, a forest as many as the shared prefixes make. Four texts, of which three start with `p`
and two of these continue with `q`:

    tokens      p0 p1 p2 p3 | q0 q1 q2 q3 | a0 a1 | b0 || c0 c1 c2

For scoring given texts: which answer is likelier, how likely a document is. Data in: `Text`; data out: `PackedTrees`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch

from prefold.trees.packing import Node, PackedTrees, Span, row_of

WORTH_SHARING = 4
"""Fewest further tokens in common that get a node of their own; with fewer, reading them twice costs less."""

Ids = tuple[int, ...]
Path = tuple[Span, ...]
"""The spans of a text's tokens in a row."""


@dataclass(frozen=True)
class Text:
    """Token ids, of which the last `scored` are scored: at least one, with at least one before them."""

    tokens: Ids
    scored: int

    @property
    def read(self) -> Ids:
        """What the model reads: the last token is only predicted."""
        return self.tokens[:-1]


def pack_forest(texts: Sequence[Text], device: torch.device | str = "cpu") -> PackedTrees:
    """Lay texts out in one row; in its log-probs, completion `i` is text `i`."""
    tokens, positions, nodes, paths = _laid_out([text.read for text in texts])
    predictors: list[int] = []
    targets: list[int] = []
    for text, path in zip(texts, paths, strict=True):
        predictors += [i for span in path for i in range(*span)][-text.scored :]
        targets += text.tokens[-text.scored :]
    return row_of(nodes, tokens, positions, predictors, targets, [text.scored for text in texts], device)


def split_texts(texts: Sequence[Text], max_tokens: int) -> list[list[int]]:
    """Distribute texts over rows of at most `max_tokens`, those with long common prefixes side by side.

    Texts with the same context are never separated: their row may be larger. Returns the indices of each row's texts.
    """
    order = sorted(range(len(texts)), key=lambda i: texts[i].tokens)
    rows: list[list[int]] = []
    size = 0
    last: Ids = ()
    for _, same in groupby(order, key=lambda i: texts[i].tokens[: -texts[i].scored]):
        unit = list(same)
        added, end = _added(unit, texts, last)
        if not rows or size + added > max_tokens:
            rows.append([])
            added, end = _added(unit, texts, ())
            size = 0
        rows[-1] += unit
        size, last = size + added, end
    return rows


def _added(unit: Sequence[int], texts: Sequence[Text], before: Ids) -> tuple[int, Ids]:
    """Tokens that these texts add to a row whose last text is `before`, and the new last text."""
    added = 0
    for i in unit:
        read = texts[i].read
        shared = _shared(before, read)
        added += len(read) - (shared if shared >= WORTH_SHARING or shared == len(read) else 0)
        before = read
    return added, before


def _shared(ids: Ids, other: Ids) -> int:
    """Length of the common prefix of two texts."""
    most = min(len(ids), len(other))
    if ids[:most] == other[:most]:
        return most
    low, high = 0, most  # the first `low` are the same, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if ids[:middle] == other[:middle] else (low, middle)
    return low


def _laid_out(texts: Sequence[Ids]) -> tuple[list[int], list[int], list[Node], list[Path]]:
    """Tokens, positions and nodes of a row of these texts, and the path of each text.

    In sorted order, texts with a common prefix are neighbours, and the common prefix of several neighbours is the
    shortest that two adjacent ones of them have.
    """
    order = sorted(range(len(texts)), key=texts.__getitem__)
    ordered = [texts[i] for i in order]
    common = [0, *(_shared(text, following) for text, following in pairwise(ordered))]

    def runs(first: int, stop: int, depth: int) -> list[tuple[int, int]]:
        """Split neighbours into runs that get a node each: those with enough in common beyond `depth`."""
        worth = depth + WORTH_SHARING
        joins = (common[i] >= worth or ordered[i] == ordered[i - 1] for i in range(first + 1, stop))
        starts = [first, *(i for i, join in enumerate(joins, first + 1) if not join)] if first < stop else []
        return list(pairwise([*starts, stop]))

    tokens: list[int] = []
    positions: list[int] = []
    node_paths: list[Path] = []
    """For each node the spans above it and its own."""
    ends: dict[Span, int] = {}
    paths: list[Path] = [()] * len(texts)
    # A stack instead of recursion: texts that extend one another may be nested as deep as there are texts.
    above: Path = ()
    pending = [(*run, 0, above) for run in runs(0, len(texts), 0)]
    while pending:
        first, stop, depth, above = pending.pop()
        until = min(common[first + 1 : stop], default=len(ordered[first]))
        start = len(tokens)
        tokens += ordered[first][depth:until]
        positions += range(depth, until)
        path = (*above, (start, len(tokens)))
        node_paths.append(path)
        ends.update(dict.fromkeys(path, len(tokens)))
        while first < stop and len(ordered[first]) == until:  # texts that end here come first
            paths[order[first]] = path
            first += 1
        pending += [(*run, until, path) for run in runs(first, stop, until)][::-1]
    nodes = [Node(path[-1], path[:-1], (path[-1][1], ends[path[-1]])) for path in node_paths]
    return tokens, positions, nodes, paths
