"""Identity Preference Optimization, arXiv 2310.12036.

The loss pulls the difference of the log-ratios to a finite target instead of pushing it to infinity (equation 17); beta
is the paper's tau:

    (difference - 1 / (2 beta))^2

The difference is that of log-ratios per token, which the equation does not say: with summed ones the loss would grow
with the square of the length. According to TRL, the paper's authors computed their results so.
Left out: summed log-ratios.
"""

from dataclasses import dataclass

from prefold.algorithms.base import Tensor
from prefold.algorithms.pairwise import ByDifference, Pairs


def ipo_loss(difference: Tensor, *, beta: float) -> Tensor:
    """Losses from the difference of the log-ratios per token in nats, any shape."""
    return (difference - 1 / (2 * beta)) ** 2


@dataclass(frozen=True)
class IPO(ByDifference):
    """Identity Preference Optimization: pull the difference to a finite target"""

    paper = "2310.12036"
    oracle = "`DPOTrainer`, `ipo`"

    def losses(self, pairs: Pairs) -> Tensor:
        return ipo_loss(self.difference_per_token(pairs), beta=self.beta)
