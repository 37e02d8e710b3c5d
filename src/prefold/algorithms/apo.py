"""Anchored Preference Optimization, arXiv 2408.06266.

With the rewards r = beta * log-ratio, the losses of a pair are (equations 7 and 8)

    apo_zero   1 - sigmoid(r(chosen)) + sigmoid(r(rejected))
    apo_down   sigmoid(r(chosen)) + 1 - sigmoid(r(chosen) - r(rejected))

The first raises the chosen completion: for pairs whose chosen side is better than what the model writes. The second
lowers both, the rejected one more: for a model that writes better than the chosen side.
Left out: the unpaired variant.
"""

from dataclasses import dataclass

from prefold.algorithms.base import Tensor
from prefold.algorithms.pairwise import Pairs, Pairwise


@dataclass(frozen=True)
class APOZero(Pairwise):
    """Anchored Preference Optimization, zero: raise the chosen completion, lower the rejected one"""

    paper = "2408.06266"
    oracle = "`DPOTrainer`, `apo_zero`"

    def losses(self, pairs: Pairs) -> Tensor:
        return (-self.beta * pairs.chosen_ratios).sigmoid() + (self.beta * pairs.rejected_ratios).sigmoid()


@dataclass(frozen=True)
class APODown(Pairwise):
    """Anchored Preference Optimization, down: lower both completions, the rejected one more"""

    paper = "2408.06266"
    oracle = "`DPOTrainer`, `apo_down`"

    def losses(self, pairs: Pairs) -> Tensor:
        chosen, rejected = pairs.chosen_ratios, pairs.rejected_ratios
        return (self.beta * chosen).sigmoid() + (self.beta * (rejected - chosen)).sigmoid()
