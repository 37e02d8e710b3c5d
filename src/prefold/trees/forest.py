"""Texts as one row in which nothing is written twice that they share at their start.

Where a prompt tree has completions below its prompt, a forest has as many levels as the texts ask for. Four texts, of
which three start with `p` and two of these go on with `q`:

    tokens      p0 p1 p2 p3 | q0 q1 q2 q3 | a0 a1 | b0 || c0 c1 c2

For reading: which answer is likelier, how likely is a document. Data in: `Text`; data out: `PackedTrees`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from prefold.trees.packing import Node, PackedTrees, Span

WORTH_SHARING = 4
"""Tokens that texts have in common beyond what they share already, below which a node of their own costs more than
reading them twice."""

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Text:
    """Token ids, of which the last `scored` are scored. There is one at least before them, and one at least of them."""

    tokens: Ids
    scored: int

    @property
    def read(self) -> Ids:
        """What the model reads: the last token is only predicted."""
        return self.tokens[:-1]

    @property
    def context(self) -> Ids:
        """What is not scored."""
        return self.tokens[: -self.scored]


def pack_forest(texts: Sequence[Text], device: torch.device | str = "cpu") -> PackedTrees:
    """Lay texts out in one row; of the log-probs of its scored tokens, those of completion `i` are of text `i`."""
    layout = _Layout([text.read for text in texts])
    predictors: list[int] = []
    targets: list[int] = []
    for text, path in zip(texts, layout.paths, strict=True):
        predictors += _last(text.scored, path)
        targets += text.tokens[-text.scored :]
    lengths = [text.scored for text in texts]

    def tensor(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return PackedTrees(
        trees=(),
        blocks=(),
        input_ids=tensor(layout.tokens)[None],
        positions=tensor(layout.positions)[None],
        predictors=tensor(predictors),
        targets=tensor(targets),
        completion=tensor(range(len(texts))).repeat_interleave(tensor(lengths)),
        lengths=tensor(lengths),
        nodes=tuple(layout.nodes()),
    )


def split_texts(texts: Sequence[Text], max_tokens: int) -> list[list[int]]:
    """Distribute texts over rows of at most `max_tokens`, those with much in common side by side.

    Texts with the same context are never parted: they share a row that may be larger. Returns the indices of each
    row's texts.
    """
    order = sorted(range(len(texts)), key=lambda place: texts[place].tokens)
    rows: list[list[int]] = []
    size = 0
    last: Ids = ()
    for unit in _same_context(order, texts):
        added, end = _added(unit, texts, last)
        if not rows or size + added > max_tokens:
            rows.append([])
            added, end = _added(unit, texts, ())
            size = 0
        rows[-1] += unit
        size, last = size + added, end
    return rows


def _same_context(order: Sequence[int], texts: Sequence[Text]) -> Iterator[list[int]]:
    unit: list[int] = []
    for place in order:
        if unit and texts[place].context != texts[unit[0]].context:
            yield unit
            unit = []
        unit.append(place)
    if unit:
        yield unit


def _added(unit: Sequence[int], texts: Sequence[Text], before: Ids) -> tuple[int, Ids]:
    """Tokens that these texts add to a row whose last text is `before`, and what is the last then."""
    added = 0
    for place in unit:
        read = texts[place].read
        shared = _shared(before, read)
        added += len(read) - (shared if shared >= WORTH_SHARING or shared == len(read) else 0)
        before = read
    return added, before


def _shared(one: Ids, other: Ids) -> int:
    """How many tokens two texts have in common at their start."""
    most = min(len(one), len(other))
    if one[:most] == other[:most]:
        return most
    low, high = 0, most  # the first `low` are the same, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle)
    return low


_Pending = tuple[int, int, int, tuple[int, ...]]
"""First and stop of some sorted sequences, the tokens that are written of them, and the numbers of those nodes."""


class _Layout:
    """Where sequences lie in a row.

    `paths` are the spans of each sequence, in its order. Sorted, sequences that share a start are neighbours, and what
    several neighbours share is the least that two of them that stand side by side do.
    """

    def __init__(self, sequences: Sequence[Ids]):
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.paths: list[tuple[Span, ...]] = [()] * len(sequences)
        self._nodes: list[tuple[Span, tuple[int, ...]]] = []  # with the numbers of the nodes above
        self._order = sorted(range(len(sequences)), key=lambda place: sequences[place])
        self._sorted = [sequences[place] for place in self._order]
        self._common = [0, *(_shared(one, other) for one, other in pairwise(self._sorted))]
        # A stack instead of recursion: texts that continue one another may be nested as deep as there are texts.
        pending: list[_Pending] = [(*run, 0, ()) for run in self._runs(0, len(sequences), 0)]
        while pending:
            first, stop, depth, above = pending.pop()
            pending += self._add(first, stop, depth, above)

    def _add(self, first: int, stop: int, depth: int, above: tuple[int, ...]) -> list[_Pending]:
        """Write what the sorted sequences from `first` to `stop` share beyond `depth`; returns what is left, the last
        one to be written first."""
        until = min(self._common[first + 1 : stop], default=len(self._sorted[first]))
        start = len(self.tokens)
        self.tokens += self._sorted[first][depth:until]
        self.positions += range(depth, until)
        above = (*above, len(self._nodes))
        self._nodes.append(((start, len(self.tokens)), above[:-1]))
        while first < stop and len(self._sorted[first]) == until:  # the shortest come first
            self.paths[self._order[first]] = tuple(self._nodes[number][0] for number in above)
            first += 1
        return [(*run, until, above) for run in self._runs(first, stop, until)][::-1]

    def _runs(self, first: int, stop: int, depth: int) -> Iterator[tuple[int, int]]:
        """Neighbours that are worth a node of their own, beyond `depth`."""
        start = first
        for place in range(first + 1, stop + 1):
            joins = place < stop and (
                self._common[place] >= depth + WORTH_SHARING or self._sorted[place] == self._sorted[place - 1]
            )
            if not joins:
                yield start, place
                start = place

    def nodes(self) -> Iterator[Node]:
        ends = [own[1] for own, _ in self._nodes]
        for own, above in self._nodes:
            for number in above:
                ends[number] = max(ends[number], own[1])
        for (own, above), end in zip(self._nodes, ends, strict=True):
            yield Node(own, tuple(self._nodes[number][0] for number in above), (own[1], end))


def _last(count: int, path: Sequence[Span]) -> list[int]:
    """The last `count` places of a row that a path goes through."""
    found: list[int] = []
    for start, stop in reversed(path):
        found[:0] = range(max(start, stop - (count - len(found))), stop)
    return found
