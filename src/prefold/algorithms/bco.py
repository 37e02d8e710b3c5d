"""Binary Classifier Optimization of pairs, arXiv 2404.04656.

With the rewards r = beta * log-ratio and a shift d, the loss of a pair is that of a classifier which calls the chosen
completion good and the rejected one bad (section 4):

    -log sigmoid(r(chosen) - d) - log sigmoid(-(r(rejected) - d))

d is the mean of the rewards of both kinds, which tightens the bound on DPO's loss. It is estimated as the mean over all
completions trained on so far, those of the current step included, without gradient; so the loss couples the pairs of a
step, and the mean is carried from step to step.
Left out: unpaired data and the matching of its prompt distributions.
"""

from dataclasses import dataclass, replace

from prefold.algorithms.base import NO_STATE, LossOutput, Positive, State, Tensor, TreeLogprobs, logsigmoid
from prefold.algorithms.pairwise import Pairs, Pairwise, compare


@dataclass(frozen=True)
class BCO(Pairwise):
    """Binary Classifier Optimization: call the chosen completion good and the rejected one bad"""

    beta: Positive = 0.01  # appendix C of the paper
    """How strongly the policy is held to the reference."""
    reward_shift: bool = True
    """Classify by the distance from the mean reward so far, as the paper does, instead of from 0, as TRL 1.16 does."""

    paper = "2404.04656"
    oracle = "`DPOTrainer`, `bco_pair`, which is `reward_shift: false`; the shift by hand"
    couples_step = property(lambda self: self.reward_shift)

    def losses(self, pairs: Pairs, shift: float = 0.0) -> Tensor:
        chosen, rejected = self.beta * pairs.chosen_ratios, self.beta * pairs.rejected_ratios
        return -logsigmoid(chosen - shift) - logsigmoid(shift - rejected)

    def loss(self, policy: TreeLogprobs, reference: TreeLogprobs | None, state: State = NO_STATE) -> LossOutput:
        if not self.reward_shift:
            return super().loss(policy, reference)
        pairs = compare(policy, reference, self.ld_alpha)
        from torch import cat

        rewards = self.beta * cat([pairs.chosen_ratios, pairs.rejected_ratios]).detach()
        before, seen = state.get("mean", 0.0), state.get("count", 0.0)
        count = seen + len(rewards)
        mean = before + (float(rewards.mean()) - before) * len(rewards) / count
        output = self.output(self.losses(pairs, mean), pairs, policy)
        return replace(output, state={"mean": mean, "count": count})
