"""Noise Contrastive Alignment of pairs, arXiv 2402.05369.

With the rewards r = beta * log-ratio, the loss of a pair (section 4.1) is

    -log sigmoid(r(chosen)) - 1/2 log sigmoid(-r(chosen)) - 1/2 log sigmoid(-r(rejected))

It sets each reward by itself, so the log-prob of the chosen completion is kept from falling along with the other.
Left out: more than two completions with explicit rewards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from prefold.algorithms.pairwise import Pairs, Pairwise


def nca_loss(chosen_ratios: Tensor, rejected_ratios: Tensor, *, beta: float) -> Tensor:
    """Losses from log-ratios in nats, any shape."""
    chosen, rejected = beta * chosen_ratios, beta * rejected_ratios
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


@dataclass(frozen=True)
class NCA(Pairwise):
    """Noise Contrastive Alignment: each reward by itself, so that the chosen one does not fall"""

    beta: float = 0.01  # alpha in appendix C of the paper
    """How strongly the policy is held to the reference."""

    paper: ClassVar[str] = "2402.05369"
    oracle: ClassVar[str] = "`DPOTrainer`, `nca_pair`"

    def losses(self, pairs: Pairs) -> Tensor:
        return nca_loss(pairs.chosen_ratios, pairs.rejected_ratios, beta=self.beta)
