"""Length-normalised DPO, as in Tulu 3, arXiv 2411.15124.

The loss of DPO, of log-ratios per token:

    -log sigmoid(beta * (chosen log-ratio / chosen length - rejected log-ratio / rejected length))

Left out: nothing.
"""

from dataclasses import dataclass

from prefold.algorithms.base import Positive, Tensor
from prefold.algorithms.dpo import dpo_loss
from prefold.algorithms.pairwise import ByDifference, Pairs


@dataclass(frozen=True)
class SigmoidNorm(ByDifference):
    """DPO of log-ratios per token"""

    beta: Positive = 5.0  # Tulu 3's; a log-ratio per token is about a hundredth of one per completion
    """How strongly the policy is held to the reference, per token."""

    paper = "2411.15124"
    oracle = "`DPOTrainer`, `sigmoid_norm`"

    def losses(self, pairs: Pairs) -> Tensor:
        return dpo_loss(self.difference_per_token(pairs), beta=self.beta)
