"""The hinge loss of SLiC-HF, arXiv 2305.10425, on DPO's implicit rewards.

The calibration loss (section 2) demands a margin between the two completions and is 0 beyond it; with implicit rewards
in place of log-probs, as in RSO (arXiv 2309.06657), and a margin of 1:

    max(0, 1 - beta * (chosen log-ratio - rejected log-ratio))

Left out: SLiC's cross-entropy regulariser (`mixed` with `sft` adds one).
"""

from dataclasses import dataclass

from prefold.algorithms.base import Tensor
from prefold.algorithms.pairwise import ByDifference, Pairs


def hinge_loss(difference: Tensor, *, beta: float) -> Tensor:
    """Losses from the difference of the log-ratios in nats, any shape."""
    return (1 - beta * difference).relu()


@dataclass(frozen=True)
class Hinge(ByDifference):
    """SLiC: a margin of 1 between the implicit rewards, and no more"""

    paper = "2305.10425"
    oracle = "`DPOTrainer`, `hinge`"

    def losses(self, pairs: Pairs) -> Tensor:
        return hinge_loss(self.difference(pairs), beta=self.beta)
