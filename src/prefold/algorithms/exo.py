"""Efficient Exact Optimization from preferences, arXiv 2402.00856.

With q = sigmoid(beta * difference of the log-ratios), the policy's own preference for the chosen completion, and the
label's preference 1 - e, the loss of a pair is the reverse KL divergence (equation 16 with K = 2)

    q log(q / (1 - e)) + (1 - q) log((1 - q) / e)

while DPO's is the forward one. It is infinite at e = 0.
Left out: rewards instead of preferences (equation 13), more than two completions.
"""

import math
from dataclasses import dataclass
from typing import Annotated

from prefold.algorithms.base import Bound, Tensor, logsigmoid
from prefold.algorithms.pairwise import ByDifference, Pairs


@dataclass(frozen=True)
class EXO(ByDifference):
    """Efficient Exact Optimization: DPO with the reverse KL divergence of the two preferences"""

    # The default is the paper's.
    label_smoothing: Annotated[float, Bound(lambda e: 0 < e < 0.5, "greater than 0 and less than 0.5")] = 1e-3
    """Share of pairs believed to be the wrong way round, greater than 0 and less than 0.5."""

    paper = "2402.00856"
    oracle = "`DPOTrainer`, `exo_pair`"

    def losses(self, pairs: Pairs) -> Tensor:
        difference, e = self.difference(pairs), self.label_smoothing
        log_q, log_not_q = logsigmoid(self.beta * difference), logsigmoid(-self.beta * difference)
        return log_q.exp() * (log_q - math.log1p(-e)) + log_not_q.exp() * (log_not_q - math.log(e))
