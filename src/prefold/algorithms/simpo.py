"""Simple Preference Optimization, arXiv 2405.14734.

Rewards are log-probs per token times beta, without a reference; the loss of a pair asks for a margin gamma (equation
6):

    -log sigmoid(beta * (log pi(chosen) / chosen length - log pi(rejected) / rejected length) - gamma)

Left out: TRL's additions to it: label smoothing, the NLL term (`cpo_alpha`, 1 by TRL's default; `mixed` with `sft` adds
one), AlphaPO's `alpha`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from prefold.algorithms.base import NO_STATE, Algorithm, LossOutput, State, require_positive
from prefold.algorithms.pairwise import pair_metrics

if TYPE_CHECKING:
    from prefold.trees.logprobs import TreeLogprobs
    from prefold.trees.packing import TokenTree


def simpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float, simpo_gamma: float) -> Tensor:
    """Losses from log-probs per token in nats, any shape."""
    return -logsigmoid(beta * (chosen - rejected) - simpo_gamma)


@dataclass(frozen=True)
class SimPO(Algorithm):
    """Simple Preference Optimization: log-probs per token as rewards, with a margin, without a reference"""

    # The authors': beta from 2.0, gamma / beta about a half. TRL's 0.1 and 0.5 suit losses of summed log-probs.
    beta: float = 2.0
    """Scale of the rewards: 2.0 to 10."""
    simpo_gamma: float = 1.0
    """Margin between the rewards; about half of beta."""

    paper: ClassVar[str] = "2405.14734"
    oracle: ClassVar[str] = "`CPOTrainer`, `simpo` with `cpo_alpha=0`"

    def __post_init__(self) -> None:
        require_positive(beta=self.beta)
        if not self.simpo_gamma >= 0:
            raise ValueError(f"simpo_gamma must be 0 or more, got {self.simpo_gamma}")

    def units(self, trees: Sequence[TokenTree]) -> dict[str, int]:
        return {"pairs": len(trees)}

    def loss(self, policy: TreeLogprobs, reference: TreeLogprobs | None, state: State = NO_STATE) -> LossOutput:
        chosen, rejected = policy.means().view(-1, 2).unbind(1)
        losses = simpo_loss(chosen, rejected, beta=self.beta, simpo_gamma=self.simpo_gamma)
        metrics = pair_metrics(chosen, rejected, self.beta * chosen, self.beta * rejected)
        return LossOutput({"pairs": losses.sum()}, metrics)
