"""DiscoPOP, the discovered log-ratio modulated loss, arXiv 2406.08414.

With z = beta * difference of the log-ratios, the loss of a pair blends a logistic and an exponential one (equation 5):

    (1 - sigmoid(z / tau)) * -log sigmoid(z)  +  sigmoid(z / tau) * exp(-z)

The second term is computed as exp(log sigmoid(z / tau) - z): at z = -100 its two factors are 0 and infinite in float32,
their product 0.
Left out: the search that found it.
"""

from dataclasses import dataclass
from typing import Annotated

from prefold.algorithms.base import POSITIVE, Bound, Positive, Tensor, logsigmoid
from prefold.algorithms.pairwise import ByDifference, Pairs


@dataclass(frozen=True)
class DiscoPOP(ByDifference):
    """DiscoPOP: a discovered blend of the logistic and the exponential loss"""

    beta: Positive = 0.05  # appendix B.1 of the paper
    """How strongly the policy is held to the reference."""
    # Appendix E of the paper. Above 1 the loss would grow exponentially with a wrong margin.
    discopop_tau: Annotated[float, POSITIVE, Bound(lambda tau: tau <= 1, "at most 1")] = 0.05
    """Temperature of the blend of the two losses, at most 1."""

    paper = "2406.08414"
    oracle = "`DPOTrainer`, `discopop`"

    def losses(self, pairs: Pairs) -> Tensor:
        z, tau = self.beta * self.difference(pairs), self.discopop_tau
        logistic = (-z / tau).sigmoid() * -logsigmoid(z)
        return logistic + (logsigmoid(z / tau) - z).exp()
