"""DiscoPOP, the discovered log-ratio modulated loss, arXiv 2406.08414.

With z = beta * difference of the log-ratios, the loss of a pair blends a logistic and an exponential one (equation 5):

    (1 - sigmoid(z / tau)) * -log sigmoid(z)  +  sigmoid(z / tau) * exp(-z)

The second term is computed as exp(log sigmoid(z / tau) - z): at z = -100 its two factors are 0 and infinite in float32,
their product 0.
Left out: the search that found it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from prefold.algorithms.base import require_positive
from prefold.algorithms.pairwise import ByDifference, Pairs


def discopop_loss(difference: Tensor, *, beta: float, tau: float) -> Tensor:
    """Losses from the difference of the log-ratios in nats, any shape."""
    margin = beta * difference
    logistic = (-margin / tau).sigmoid() * -logsigmoid(margin)
    return logistic + (logsigmoid(margin / tau) - margin).exp()


@dataclass(frozen=True)
class DiscoPOP(ByDifference):
    """DiscoPOP: a discovered blend of the logistic and the exponential loss"""

    beta: float = 0.05  # appendix B.1 of the paper
    """How strongly the policy is held to the reference."""
    discopop_tau: float = 0.05  # appendix E of the paper
    """How sharply the two losses are told apart, at most 1."""

    paper: ClassVar[str] = "2406.08414"
    oracle: ClassVar[str] = "`DPOTrainer`, `discopop`"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(discopop_tau=self.discopop_tau)
        if self.discopop_tau > 1:  # the loss would grow exponentially with a wrong margin
            raise ValueError(f"discopop_tau must be at most 1, got {self.discopop_tau}")

    def losses(self, pairs: Pairs) -> Tensor:
        return discopop_loss(self.difference(pairs), beta=self.beta, tau=self.discopop_tau)
