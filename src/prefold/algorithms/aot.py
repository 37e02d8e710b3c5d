"""Alignment via Optimal Transport, arXiv 2406.05882.

The distribution of one quantity over the step should dominate that of another, so both are sorted and compared rank by
rank with DPO's loss (section 3), label smoothing included:

    aot           log pi(chosen) - log pi(rejected)   over   log pi_ref(chosen) - log pi_ref(rejected)
    aot_unpaired  log-ratios of the chosen            over   log-ratios of the rejected

The sort spans the whole optimizer step, so the result does not depend on how the step is split. TRL sorts each
micro-batch by itself.
Left out: WPO's weights, which belong to pairs that the sort takes apart; other losses than the logistic one.
"""

from dataclasses import dataclass

from prefold.algorithms.base import Smoothing, Tensor
from prefold.algorithms.dpo import dpo_loss
from prefold.algorithms.pairwise import AgainstReference, Pairs


@dataclass(frozen=True)
class AOT(AgainstReference):
    """Alignment via Optimal Transport: the policy's margins dominate the reference's, rank by rank"""

    label_smoothing: Smoothing = 0.0
    """Share of ranks believed to be the wrong way round, less than 0.5."""

    paper = "2406.05882"
    oracle = "`DPOTrainer`, `aot`, a step in one micro-batch"
    couples_step = True

    def losses(self, pairs: Pairs) -> Tensor:
        better, worse = (sample.sort().values for sample in self.samples(pairs))
        return dpo_loss(better - worse, beta=self.beta, label_smoothing=self.label_smoothing)

    def samples(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """`[B]`, `[B]`: the sample that should dominate, and the one that it should dominate."""
        return pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected


@dataclass(frozen=True)
class AOTUnpaired(AOT):
    """Alignment via Optimal Transport: the chosen log-ratios dominate the rejected ones, rank by rank"""

    oracle = "`DPOTrainer`, `aot_unpaired`, a step in one micro-batch"

    def samples(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        return pairs.chosen_ratios, pairs.rejected_ratios
