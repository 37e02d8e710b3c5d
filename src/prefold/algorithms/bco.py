"""Binary Classifier Optimization of pairs, arXiv 2404.04656.

With the rewards r = beta * log-ratio and a shift d, the loss of a pair is that of a classifier which calls the chosen
completion good and the rejected one bad (section 4):

    -log sigmoid(r(chosen) - d) - log sigmoid(-(r(rejected) - d))

d is the mean of the rewards of both kinds, which tightens the bound on DPO's loss. It is estimated as the mean over all
completions trained on so far, those of the current step included, without gradient; so all pairs of a step belong
together, and the mean is carried from step to step.
Left out: unpaired data and the matching of its prompt distributions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefold.algorithms.base import NO_STATE, LossOutput, State
from prefold.algorithms.pairwise import Pairs, Pairwise, compare

if TYPE_CHECKING:
    from prefold.trees.logprobs import TreeLogprobs


def bco_loss(chosen_rewards: Tensor, rejected_rewards: Tensor, shift: float = 0.0) -> Tensor:
    """Losses from rewards, any shape."""
    return -logsigmoid(chosen_rewards - shift) - logsigmoid(shift - rejected_rewards)


def running_mean(state: State, values: Tensor) -> State:
    """The state (`mean`, `count`) after `values`; an empty one has seen nothing."""
    seen = state.get("count", 0.0)
    count = seen + len(values)
    before = state.get("mean", 0.0)
    return {"mean": before + (float(values.mean()) - before) * len(values) / count, "count": count}


@dataclass(frozen=True)
class BCO(Pairwise):
    """Binary Classifier Optimization: call the chosen completion good and the rejected one bad"""

    beta: float = 0.01  # appendix C of the paper
    """How strongly the policy is held to the reference."""
    reward_shift: bool = True
    """Classify by the distance from the mean reward so far, as the paper does, instead of from 0, as TRL 1.16 does."""

    paper: ClassVar[str] = "2404.04656"
    oracle: ClassVar[str] = "`DPOTrainer`, `bco_pair`, which is `reward_shift: false`; the shift by hand"

    @property
    def couples_step(self) -> bool:
        return self.reward_shift

    def losses(self, pairs: Pairs, shift: float = 0.0) -> Tensor:
        return bco_loss(self.beta * pairs.chosen_ratios, self.beta * pairs.rejected_ratios, shift)

    def loss(self, policy: TreeLogprobs, reference: TreeLogprobs | None, state: State = NO_STATE) -> LossOutput:
        if not self.reward_shift:
            return super().loss(policy, reference)
        pairs = compare(policy, reference, self.ld_alpha)
        rewards = self.beta * torch.cat([pairs.chosen_ratios, pairs.rejected_ratios]).detach()
        state = running_mean(state, rewards)
        return replace(self.output(self.losses(pairs, state["mean"]), pairs, policy), state=state)
