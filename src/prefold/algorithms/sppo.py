"""Self-Play Preference Optimization with hard labels, arXiv 2405.00675.

The policy's log-ratios are pulled to eta * (P - 1/2), where P is the probability that the completion wins (equation
4.7); with P = 1 for the chosen one, 0 for the rejected one, and beta = 1 / eta:

    (chosen log-ratio - 1 / (2 beta))^2 + (rejected log-ratio + 1 / (2 beta))^2

Left out: win probabilities from a preference model, and the rounds of self-play (one run is one round).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prefold.algorithms.pairwise import Pairs, Pairwise


def sppo_loss(chosen_ratios: Tensor, rejected_ratios: Tensor, *, beta: float) -> Tensor:
    """Losses from log-ratios in nats, any shape."""
    return (chosen_ratios - 0.5 / beta) ** 2 + (rejected_ratios + 0.5 / beta) ** 2


@dataclass(frozen=True)
class SPPO(Pairwise):
    """Self-Play Preference Optimization: pull each log-ratio to a target of its own"""

    beta: float = 1e-3  # eta = 1e3 in appendix C of the paper
    """How strongly the policy is held to the reference: the targets are plus and minus 1 / (2 beta) nats."""

    paper: ClassVar[str] = "2405.00675"
    oracle: ClassVar[str] = "`DPOTrainer`, `sppo_hard`"

    def losses(self, pairs: Pairs) -> Tensor:
        return sppo_loss(pairs.chosen_ratios, pairs.rejected_ratios, beta=self.beta)
