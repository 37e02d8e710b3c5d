"""Self-Play Preference Optimization with hard labels, arXiv 2405.00675.

The policy's log-ratios are pulled to eta * (P - 1/2), where P is the probability that the completion wins (equation
4.7); with P = 1 for the chosen one, 0 for the rejected one, and beta = 1 / eta:

    (chosen log-ratio - 1 / (2 beta))^2 + (rejected log-ratio + 1 / (2 beta))^2

Left out: win probabilities from a preference model, and the rounds of self-play (one run is one round).
"""

from dataclasses import dataclass

from prefold.algorithms.base import Positive, Tensor
from prefold.algorithms.pairwise import Pairs, Pairwise


@dataclass(frozen=True)
class SPPO(Pairwise):
    """Self-Play Preference Optimization: pull each log-ratio to a target of its own"""

    beta: Positive = 1e-3  # eta = 1e3 in appendix C of the paper
    """How strongly the policy is held to the reference: the targets are plus and minus 1 / (2 beta) nats."""

    paper = "2405.00675"
    oracle = "`DPOTrainer`, `sppo_hard`"

    def losses(self, pairs: Pairs) -> Tensor:
        return (pairs.chosen_ratios - 0.5 / self.beta) ** 2 + (pairs.rejected_ratios + 0.5 / self.beta) ** 2
