"""Prompt trees, and how they are laid out in one flat row of tokens.

A row of two trees, the first with completions A and B, the second with C:

    tokens      p0 p1 p2 | a0 a1 | b0 b1 b2 || q0 q1 | c0 c1
    positions    0  1  2 |  3  4 |  3  4  5 ||  0  1 |  2  3
    scored                  a0 a1   b0 b1 b2           c0 c1
    predictors              p2 a0   p2 b0 b1           q1 c0

There is no padding. A completion's first token is predicted by the last token of its prompt, so that position is read
once for every completion. Context tokens of a completion are read and not scored, like those of prompts. If b1 were the
output of a tool, it would not be scored, and it would still predict b2:

    scored                  a0 a1   b0    b2           c0 c1
    predictors              p2 a0   p2    b1           q1 c0

Data in: `TokenTree`; data out: `PackedTrees`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

Span = tuple[int, int]
"""Start (inclusive) and stop (exclusive) of consecutive tokens."""


@dataclass(frozen=True)
class TokenTree:
    """One prompt and its completions, as token ids. None of them is empty.

    `context`: for each completion the spans of its tokens that are read and not scored, such as the output of a tool,
    in order and apart from each other; empty if every token of every completion is scored. At least one token of each
    completion is scored.
    """

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    context: tuple[tuple[Span, ...], ...] = ()

    def __post_init__(self) -> None:
        if not any(self.context):
            object.__setattr__(self, "context", ())

    @property
    def key(self) -> str:
        """The same for equal trees, and for those alone."""
        return repr((self.prompt, self.completions, *([self.context] if self.context else [])))

    @property
    def digest(self) -> bytes:
        """`key` in 16 bytes."""
        return hashlib.blake2b(self.key.encode(), digest_size=16).digest()

    @property
    def scored(self) -> tuple[Sequence[int], ...]:
        """For each completion the indices of its scored tokens."""
        indices = tuple(range(len(ids)) for ids in self.completions)
        if not self.context:
            return indices
        scored = [
            [i for i in own if not any(start <= i < stop for start, stop in spans)]
            for own, spans in zip(indices, self.context, strict=True)
        ]
        assert all(scored), "a completion without a scored token"
        return tuple(scored)

    @property
    def scored_tokens(self) -> int:
        """Number of scored tokens in all completions."""
        return sum(map(len, self.scored))

    @property
    def size(self) -> int:
        """Tokens of the tree when its prompt is written once."""
        return len(self.prompt) + sum(map(len, self.completions))

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest completion."""
        return len(self.prompt) + max(map(len, self.completions), default=0)

    @property
    def plain_size(self) -> int:
        """Tokens of the tree when every completion brings its own copy of the prompt."""
        return self.size + len(self.prompt) * (max(len(self.completions), 1) - 1)


class Node(NamedTuple):
    """Consecutive tokens that attend to the same spans `above`, in order, and causally to their `own`. The descendants
    of the node follow it directly, in `below`, which is empty for a leaf."""

    own: Span
    above: tuple[Span, ...]
    below: Span

    @property
    def longest(self) -> int:
        """Tokens that the last token of the node attends to."""
        return sum(stop - start for start, stop in (*self.above, self.own))


@dataclass(frozen=True)
class PackedTrees:
    """Several trees as one row of `T` tokens. `nodes` are in the order of the row, each before its descendants.

    `predictors` are indices into the row, `targets` token ids, one for each of the `S` scored tokens of completions;
    `completion` is the completion of the row that each belongs to, `lengths` the scored tokens of each of `N`
    completions.
    Where prompts are scored too, their `P` tokens from the second one on are the last of `predictors` and `targets`,
    and `owner` is the tree that each of them belongs to.
    """

    trees: tuple[TokenTree, ...]
    nodes: tuple[Node, ...]
    input_ids: Int[Tensor, "1 T"]
    positions: Int[Tensor, "1 T"]
    predictors: Int[Tensor, " predicted"]
    targets: Int[Tensor, " predicted"]
    completion: Int[Tensor, " S"]
    lengths: Int[Tensor, " N"]
    owner: Int[Tensor, " P"] | None = None
    scratch: dict[str, Any] = field(default_factory=dict, compare=False)
    """What is derived from the layout once and used in every layer."""

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with one of its completions."""
        tokens: int = self.once("longest", lambda row: max(node.longest for node in row.nodes))
        return tokens

    @property
    def prompts(self) -> list[Span]:
        """The span of each tree's prompt."""
        return [node.own for node in self.nodes if not node.above]

    def once(self, name: str, derive: Callable[[PackedTrees], Any]) -> Any:
        """`derive` of this row, computed at the first call."""
        if name not in self.scratch:
            self.scratch[name] = derive(self)
        return self.scratch[name]


def pack(trees: Sequence[TokenTree], device: torch.device | str = "cpu", scores_prompt: bool = False) -> PackedTrees:
    """Lay trees out in one row."""
    nodes: list[Node] = []
    tokens: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    lengths: list[int] = []
    for tree in trees:
        start, depth = len(tokens), len(tree.prompt)
        prompt = (start, start + depth)
        nodes.append(Node(prompt, (), (prompt[1], start + tree.size)))
        tokens += tree.prompt
        positions += range(depth)
        for ids, scored in zip(tree.completions, tree.scored, strict=True):
            first, stop = len(tokens), len(tokens) + len(ids)
            nodes.append(Node((first, stop), (prompt,), (stop, stop)))
            tokens += ids
            positions += range(depth, depth + len(ids))
            predictors += [first + i - 1 if i else prompt[1] - 1 for i in scored]
            targets += [ids[i] for i in scored]
            lengths.append(len(scored))
    owner: list[int] | None = None
    if scores_prompt:
        owner = [i for i, tree in enumerate(trees) for _ in tree.prompt[1:]]
        predictors += [i for node in nodes if not node.above for i in range(node.own[0], node.own[1] - 1)]
        targets += [token for tree in trees for token in tree.prompt[1:]]
    return row_of(nodes, tokens, positions, predictors, targets, lengths, device, trees, owner)


def row_of(
    nodes: Sequence[Node],
    tokens: Sequence[int],
    positions: Sequence[int],
    predictors: Sequence[int],
    targets: Sequence[int],
    lengths: Sequence[int],
    device: torch.device | str,
    trees: Sequence[TokenTree] = (),
    owner: Sequence[int] | None = None,
) -> PackedTrees:
    """A row of these parts, as tensors on a device."""

    def tensor(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return PackedTrees(
        tuple(trees),
        tuple(nodes),
        tensor(tokens)[None],
        tensor(positions)[None],
        tensor(predictors),
        tensor(targets),
        # Given the output size, a GPU need not be waited for.
        tensor(range(len(lengths))).repeat_interleave(tensor(lengths), output_size=sum(lengths)),
        tensor(lengths),
        None if owner is None else tensor(owner),
    )
