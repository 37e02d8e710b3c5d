"""Efficient Exact Optimization from preferences, arXiv 2402.00856.

With q = sigmoid(beta * difference of the log-ratios), the policy's own preference for the chosen completion, and the
label's preference 1 - e, the loss of a pair is the reverse KL divergence (equation 16 with K = 2)

    q log(q / (1 - e)) + (1 - q) log((1 - q) / e)

while DPO's is the forward one. It is infinite at e = 0.
Left out: rewards instead of preferences (equation 13), more than two completions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from prefold.algorithms.pairwise import ByDifference, Pairs


def exo_loss(difference: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """Losses from the difference of the log-ratios in nats, any shape; `label_smoothing`: the e of the equation."""
    log_q, log_not_q = logsigmoid(beta * difference), logsigmoid(-beta * difference)
    return log_q.exp() * (log_q - math.log1p(-label_smoothing)) + log_not_q.exp() * (
        log_not_q - math.log(label_smoothing)
    )


@dataclass(frozen=True)
class EXO(ByDifference):
    """Efficient Exact Optimization: DPO with the reverse KL divergence of the two preferences"""

    label_smoothing: float = 1e-3  # the paper's
    """Share of pairs believed to be the wrong way round, greater than 0 and less than 0.5."""

    paper: ClassVar[str] = "2402.00856"
    oracle: ClassVar[str] = "`DPOTrainer`, `exo_pair`"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be greater than 0 and less than 0.5, got {self.label_smoothing}")

    def losses(self, pairs: Pairs) -> Tensor:
        return exo_loss(self.difference(pairs), beta=self.beta, label_smoothing=self.label_smoothing)
