"""Simple Preference Optimization, arXiv 2405.14734.

Rewards are log-probs per token times beta, without a reference; the loss of a pair asks for a margin gamma (equation
6):

    -log sigmoid(beta * (log pi(chosen) / chosen length - log pi(rejected) / rejected length) - gamma)

Left out: TRL's additions to it: label smoothing, the NLL term (`cpo_alpha`, 1 by TRL's default; `mixed` with `sft` adds
one), AlphaPO's `alpha`.
"""

from dataclasses import dataclass

from prefold.algorithms.base import NO_STATE, LossOutput, NotNegative, Positive, State, TreeLogprobs, logsigmoid
from prefold.algorithms.pairwise import PerPair, pair_metrics


@dataclass(frozen=True)
class SimPO(PerPair):
    """Simple Preference Optimization: log-probs per token as rewards, with a margin, without a reference"""

    # The authors': beta from 2.0, gamma / beta about a half. TRL's 0.1 and 0.5 suit losses of summed log-probs.
    beta: Positive = 2.0
    """Scale of the rewards: 2.0 to 10."""
    simpo_gamma: NotNegative = 1.0
    """Margin between the rewards; about half of beta."""

    paper = "2405.14734"
    oracle = "`CPOTrainer`, `simpo` with `cpo_alpha=0`"

    def loss(self, policy: TreeLogprobs, reference: TreeLogprobs | None, state: State = NO_STATE) -> LossOutput:
        chosen, rejected = policy.means().view(-1, 2).unbind(1)
        losses = -logsigmoid(self.beta * (chosen - rejected) - self.simpo_gamma)
        return LossOutput(
            {"pairs": losses.sum()}, pair_metrics(chosen, rejected, self.beta * chosen, self.beta * rejected)
        )
