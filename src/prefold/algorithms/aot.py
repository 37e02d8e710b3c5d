"""Alignment via Optimal Transport, arXiv 2406.05882.

The distribution of one quantity over the step is to dominate that of another, so both are sorted and compared rank by
rank with DPO's loss (section 3), label smoothing included:

    aot           log pi(chosen) - log pi(rejected)   over   log pi_ref(chosen) - log pi_ref(rejected)
    aot_unpaired  log-ratios of the chosen            over   log-ratios of the rejected

The sort spans the whole optimizer step, so the result does not depend on how the step is split. TRL sorts each
micro-batch by itself.
Left out: WPO's weights, which belong to pairs that the sort takes apart; other losses than the logistic one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from prefold.algorithms.base import NO_STATE, LossOutput, State, require_between
from prefold.algorithms.dpo import dpo_loss
from prefold.algorithms.pairwise import AgainstReference, Pairs, compare, pair_output

if TYPE_CHECKING:
    from prefold.trees.logprobs import TreeLogprobs


def aot_loss(better: Tensor, worse: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """`[B]` losses by rank, of two `[B]` samples in nats, of which the first is to dominate."""
    return dpo_loss(better.sort().values - worse.sort().values, beta=beta, label_smoothing=label_smoothing)


@dataclass(frozen=True)
class AOT(AgainstReference):
    """Alignment via Optimal Transport: the policy's margins dominate the reference's, rank by rank"""

    label_smoothing: float = 0.0
    """Share of ranks believed to be the wrong way round, less than 0.5."""

    paper: ClassVar[str] = "2406.05882"
    oracle: ClassVar[str] = "`DPOTrainer`, `aot`, a step in one micro-batch"
    couples_step: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_between(0, 0.5, label_smoothing=self.label_smoothing)

    def loss(self, policy: TreeLogprobs, reference: TreeLogprobs | None, state: State = NO_STATE) -> LossOutput:
        pairs = compare(policy, reference, self.ld_alpha)
        losses = aot_loss(*self.samples(pairs), beta=self.beta, label_smoothing=self.label_smoothing)
        return pair_output(losses, pairs, self.beta)

    def samples(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """What is to dominate, and what it is to dominate."""
        return pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected


@dataclass(frozen=True)
class AOTUnpaired(AOT):
    """Alignment via Optimal Transport: the chosen log-ratios dominate the rejected ones, rank by rank"""

    oracle: ClassVar[str] = "`DPOTrainer`, `aot_unpaired`, a step in one micro-batch"

    def samples(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        return pairs.chosen_ratios, pairs.rejected_ratios
