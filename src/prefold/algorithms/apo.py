"""Anchored Preference Optimization, arXiv 2408.06266.

With the rewards r = beta * log-ratio, the losses of a pair are (equations 7 and 8)

    apo_zero   1 - sigmoid(r(chosen)) + sigmoid(r(rejected))
    apo_down   sigmoid(r(chosen)) + 1 - sigmoid(r(chosen) - r(rejected))

The first raises the chosen completion: for pairs whose chosen side is better than what the model writes. The second
lowers both, the rejected one more: for a model that writes better than the chosen side.
Left out: the unpaired variant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prefold.algorithms.pairwise import Pairs, Pairwise


def apo_zero_loss(chosen_ratios: Tensor, rejected_ratios: Tensor, *, beta: float) -> Tensor:
    """Losses from log-ratios in nats, any shape."""
    return (-beta * chosen_ratios).sigmoid() + (beta * rejected_ratios).sigmoid()


def apo_down_loss(chosen_ratios: Tensor, rejected_ratios: Tensor, *, beta: float) -> Tensor:
    """Losses from log-ratios in nats, any shape."""
    return (beta * chosen_ratios).sigmoid() + (beta * (rejected_ratios - chosen_ratios)).sigmoid()


@dataclass(frozen=True)
class APOZero(Pairwise):
    """Anchored Preference Optimization, zero: raise the chosen completion, lower the rejected one"""

    paper: ClassVar[str] = "2408.06266"
    oracle: ClassVar[str] = "`DPOTrainer`, `apo_zero`"

    def losses(self, pairs: Pairs) -> Tensor:
        return apo_zero_loss(pairs.chosen_ratios, pairs.rejected_ratios, beta=self.beta)


@dataclass(frozen=True)
class APODown(Pairwise):
    """Anchored Preference Optimization, down: lower both completions, the rejected one more"""

    paper: ClassVar[str] = "2408.06266"
    oracle: ClassVar[str] = "`DPOTrainer`, `apo_down`"

    def losses(self, pairs: Pairs) -> Tensor:
        return apo_down_loss(pairs.chosen_ratios, pairs.rejected_ratios, beta=self.beta)
