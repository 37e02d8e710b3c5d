"""Robust DPO, arXiv 2403.00409.

An unbiased estimate of DPO's loss on clean pairs, from pairs of which the share e is the wrong way round (section 3.1):

    ((1 - e) loss(chosen, rejected) - e loss(rejected, chosen)) / (1 - 2 e)

The loss may be negative, and it has no lower bound: unlike conservative DPO's, it rewards ever larger margins.
Left out: nothing.
"""

from dataclasses import dataclass

from prefold.algorithms.base import Smoothing, Tensor
from prefold.algorithms.dpo import dpo_loss
from prefold.algorithms.pairwise import ByDifference, Pairs


@dataclass(frozen=True)
class Robust(ByDifference):
    """Robust DPO: unbiased where a known share of the pairs is the wrong way round"""

    label_smoothing: Smoothing = 0.1  # section 6 of the paper
    """Share of pairs that are the wrong way round, less than 0.5."""

    paper = "2403.00409"
    oracle = "`DPOTrainer`, `robust`"

    def losses(self, pairs: Pairs) -> Tensor:
        difference, e = self.difference(pairs), self.label_smoothing
        as_given, flipped = dpo_loss(difference, beta=self.beta), dpo_loss(-difference, beta=self.beta)
        return ((1 - e) * as_given - e * flipped) / (1 - 2 * e)
