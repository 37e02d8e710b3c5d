"""Robust DPO, arXiv 2403.00409.

An unbiased estimate of DPO's loss on clean pairs, from pairs of which the share e is the wrong way round (section 3.1):

    ((1 - e) loss(chosen, rejected) - e loss(rejected, chosen)) / (1 - 2 e)

The loss may be negative, and it has no lower bound: unlike conservative DPO's, it rewards ever larger margins.
Left out: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prefold.algorithms.base import require_between
from prefold.algorithms.dpo import dpo_loss
from prefold.algorithms.pairwise import ByDifference, Pairs


def robust_loss(difference: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """Losses from the difference of the log-ratios in nats, any shape; `label_smoothing`: share of flipped pairs."""
    as_given, flipped = dpo_loss(difference, beta=beta), dpo_loss(-difference, beta=beta)
    return ((1 - label_smoothing) * as_given - label_smoothing * flipped) / (1 - 2 * label_smoothing)


@dataclass(frozen=True)
class Robust(ByDifference):
    """Robust DPO: unbiased where a known share of the pairs is the wrong way round"""

    label_smoothing: float = 0.1  # section 6 of the paper
    """Share of pairs that are the wrong way round, less than 0.5."""

    paper: ClassVar[str] = "2403.00409"
    oracle: ClassVar[str] = "`DPOTrainer`, `robust`"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_between(0, 0.5, label_smoothing=self.label_smoothing)

    def losses(self, pairs: Pairs) -> Tensor:
        return robust_loss(self.difference(pairs), beta=self.beta, label_smoothing=self.label_smoothing)
