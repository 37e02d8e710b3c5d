"""How much there is to compute: tokens and FLOPs of a run, from the lengths of its trees."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from prefold.plan.meta_model import MetaModel
from prefold.plan.passes import Lengths, Row
from prefold.recipe import RecipeBase
from prefold.trees.attention import heads_of
from prefold.trees.budget import split_by_budget

if TYPE_CHECKING:
    from prefold.training.loop import StepOrder

STEPS_READ = 2000
"""Most steps whose micro-batches are laid out; of a longer run, evenly spaced ones."""


class Tokens(NamedTuple):
    """Token counts of trees: `unique` with each prompt once, `plain` with a copy of it for each completion, `scored`
    those of completions (and prompts, if they are scored); `attended` counts the pairs of positions of which one
    attends to the other."""

    unique: int
    plain: int
    scored: int
    attended: int

    @staticmethod
    def of(trees: Sequence[Lengths], scores_prompt: bool = False) -> Tokens:
        return Tokens(
            unique=sum(map(sum, trees)),
            plain=sum(map(plain_size, trees)),
            scored=sum(sum(tree[1:]) + scores_prompt * (tree[0] - 1) for tree in trees),
            attended=sum(length * (length + 1) // 2 for tree in trees for length in tree)
            + sum(tree[0] * sum(tree[1:]) for tree in trees),
        )


def plain_size(tree: Lengths) -> int:
    return sum(tree) + tree[0] * (max(len(tree) - 1, 1) - 1)


def with_completions(recipe: RecipeBase, trees: Sequence[Lengths]) -> list[Lengths]:
    """The trees; where completions are yet to be sampled, each prompt gets a group of the longest possible ones."""
    _, longest, number = recipe.sampled
    return [(tree[0], *([longest] * number)) for tree in trees] if number else list(trees)


@dataclass(frozen=True)
class Steps:
    """The optimizer steps of a run. `sampled`: the real completions may be shorter than those of `trees`."""

    trees: Sequence[Lengths]
    order: StepOrder | Sequence[Sequence[int]]
    sampled: bool = False

    def __iter__(self) -> Iterator[list[Lengths]]:
        stride = -(-len(self.order) // STEPS_READ)
        for step in range(0, len(self.order), stride):
            yield [self.trees[index] for index in self.order[step]]

    def fullest_row(self, budget: int, packed: bool) -> Row:
        """The micro-batch with the most tokens, as the engine lays them out."""
        size, rows = sum if packed else plain_size, list[Row]()
        for trees in self:
            for indices in split_by_budget(list(map(size, trees)), budget):
                rows.append(tuple(trees[index] for index in indices))
            if self.sampled:
                rows.append(_ending_early(trees, budget, size))
        return max(rows, key=lambda row: (sum(map(size, row)), row))

    def tokens(self, scores_prompt: bool) -> Tokens:
        """The tokens of all steps together, extrapolated from those that are read."""
        steps = [Tokens.of(trees, scores_prompt) for trees in self]
        return Tokens(*(round(len(self.order) / len(steps) * sum(numbers)) for numbers in zip(*steps, strict=True)))


def _ending_early(trees: Sequence[Lengths], budget: int, size: Callable[[Lengths], int]) -> Row:
    """A row with one tree more than would fit at full length, because the completions of that tree end early."""
    sizes = list(accumulate(map(size, trees)))
    number = bisect_left(sizes, budget) + 1
    if number > len(trees) or number == 1:
        return tuple(trees[:number])
    *row, (prompt, *completions) = trees[:number]
    less = -(-(sizes[number - 1] - budget) // len(completions))
    if less < min(completions):
        row.append((prompt, *(length - less for length in completions)))
    return tuple(row)


def training_flops(meta: MetaModel, tokens: Tokens, computed: int) -> float:
    """FLOPs of the matrix products of all steps, forward and backward. `computed`: tokens that go through the layers,
    unique ones on the tree engine, else plain ones.

    The backward pass has one product for the gradients of the inputs, and one for those of the trained weights.
    Checkpointing computes the layers a second time. The gradient of a frozen head is taken in the forward pass.
    """
    sizes, again, trains_all = meta.sizes, int(meta.recipe.train.gradient_checkpointing), int(meta.trains_all)
    layers = 2.0 * computed * ((2 + again + trains_all) * sizes.linear + (3 + again) * sizes.adapter_products)
    # Scores and mixing in every forward pass; the backward pass repeats the scores and has four products of its own.
    attention = 2.0 * tokens.attended * _attention_width(meta) * (2 * (1 + again) + 5)
    return layers + attention + 2.0 * tokens.scored * (2 + 2 * trains_all) * sizes.head


def scoring_flops(meta: MetaModel, tokens: Tokens, computed: int) -> float:
    """FLOPs of one forward pass without gradients."""
    sizes = meta.sizes
    attention = 4.0 * tokens.attended * _attention_width(meta)
    return 2.0 * (computed * sizes.linear + tokens.scored * sizes.head) + attention


def _attention_width(meta: MetaModel) -> int:
    """Width of the queries of all layers together."""
    queries, _, width = heads_of(meta.config)
    return meta.layers * queries * width
