"""Noise Contrastive Alignment of pairs, arXiv 2402.05369.

With the rewards r = beta * log-ratio, the loss of a pair (section 4.1) is

    -log sigmoid(r(chosen)) - 1/2 log sigmoid(-r(chosen)) - 1/2 log sigmoid(-r(rejected))

It sets each reward by itself, so the log-prob of the chosen completion is kept from falling along with the other.
Left out: more than two completions with explicit rewards.
"""

from dataclasses import dataclass

from prefold.algorithms.base import Positive, Tensor, logsigmoid
from prefold.algorithms.pairwise import Pairs, Pairwise


@dataclass(frozen=True)
class NCA(Pairwise):
    """Noise Contrastive Alignment: each reward by itself, so that the chosen one does not fall"""

    beta: Positive = 0.01  # alpha in appendix C of the paper
    """How strongly the policy is held to the reference."""

    paper = "2402.05369"
    oracle = "`DPOTrainer`, `nca_pair`"

    def losses(self, pairs: Pairs) -> Tensor:
        chosen, rejected = self.beta * pairs.chosen_ratios, self.beta * pairs.rejected_ratios
        return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)
