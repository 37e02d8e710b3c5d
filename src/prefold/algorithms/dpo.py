"""Direct Preference Optimization, arXiv 2305.18290.

With the implicit reward r(x, y) = beta * (log pi(y|x) - log pi_ref(y|x)) of a completion (section 4), the loss of a
pair is (equation 7)

    -log sigmoid(r(x, chosen) - r(x, rejected))

With label smoothing e, the share of pairs believed to be the wrong way round, it is the conservative loss (Mitchell, "A
note on DPO with noisy preferences")

    -(1 - e) log sigmoid(r(x, chosen) - r(x, rejected)) - e log sigmoid(r(x, rejected) - r(x, chosen))

Left out: the partition function Z(x) of equation 5, which cancels in the difference; a separate reference model.
"""

from dataclasses import dataclass

from prefold.algorithms.base import Positive, Smoothing, Tensor, logsigmoid
from prefold.algorithms.pairwise import ByDifference, Pairs


def dpo_loss(difference: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Losses from the log-ratio of the chosen completion minus that of the rejected one in nats, any shape."""
    margin = beta * difference
    losses = -logsigmoid(margin)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * logsigmoid(-margin)
    return losses


@dataclass(frozen=True)
class DPO(ByDifference):
    """Direct Preference Optimization: classify which completion is the chosen one"""

    beta: Positive = 0.1
    """How strongly the policy is held to the reference: 0.01 (loose) to 0.5 (tight)."""
    label_smoothing: Smoothing = 0.0
    """Share of pairs believed to be the wrong way round, less than 0.5 (conservative DPO)."""

    paper = "2305.18290"
    oracle = "`DPOTrainer`, `sigmoid`; label smoothing: `aot` on one pair"

    def losses(self, pairs: Pairs) -> Tensor:
        return dpo_loss(self.difference(pairs), beta=self.beta, label_smoothing=self.label_smoothing)
