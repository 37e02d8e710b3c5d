"""A reward model: one score for a conversation, by the Bradley-Terry model of preferences, arXiv 2203.02155.

A head on the last token of a completion gives its score r(x, y). The loss of a pair is (equation 1)

    -log sigmoid(r(x, chosen) - r(x, rejected))

It depends on differences only. With a centering coefficient c, scores are kept near zero by (arXiv 2312.09244,
equation 2)

    c * (r(x, chosen) + r(x, rejected))^2

The head begins with small random weights, as a classifier's in transformers does, drawn with the seed of the run: with
zeros, packed and plain scores could not be compared before the first step. The paper's scores are shifted afterwards so
that demonstrations have a mean of 0; here centering replaces that.
Left out: margins given with the pairs (TRL's column `margin`); weighing the K (K - 1) / 2 pairs of one prompt together.
"""

from dataclasses import dataclass
from typing import Annotated

from prefold.algorithms.base import (
    ADAPTER_DEFAULTS,
    NO_STATE,
    POSITIVE,
    SCORING,
    Extreme,
    LossOutput,
    State,
    TreeLogprobs,
    logsigmoid,
)
from prefold.algorithms.pairwise import PerPair, means


@dataclass(frozen=True)
class BradleyTerry(PerPair):
    """Reward model: a head that scores conversations, for GRPO, best-of-n and `prefold pairs`"""

    center_rewards_coefficient: Annotated[float | None, POSITIVE] = None
    """How strongly scores are held around zero: 0.01 is usual; unset: not at all."""

    paper = "2203.02155"
    oracle = "`RewardTrainer`"
    kind = SCORING
    # The rate of TRL's reward trainer for LoRA. The head is new, and has further to go than weights that are adapted.
    defaults = ADAPTER_DEFAULTS | {"train.learning_rate": 1e-4}

    def loss(self, policy: TreeLogprobs, reference: TreeLogprobs | None, state: State = NO_STATE) -> LossOutput:
        from torch import cat

        chosen, rejected = policy.pairs()
        losses = -logsigmoid(chosen - rejected)
        if self.center_rewards_coefficient is not None:
            losses = losses + self.center_rewards_coefficient * (chosen + rejected).square()
        scores = cat([chosen, rejected]).detach()
        averages = means({"accuracy": (chosen > rejected).float(), "margin": chosen - rejected, "mean_reward": scores})
        extremes = {"min_reward": Extreme(scores.min(), min), "max_reward": Extreme(scores.max(), max)}
        return LossOutput({"pairs": losses.sum()}, {**averages, **extremes})
