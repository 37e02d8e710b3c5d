"""Contrastive Preference Optimization, arXiv 2401.08417.

DPO with a uniform reference, which cancels, plus supervised fine-tuning on the chosen completions (equation 3):

    -log sigmoid(beta * (log pi(chosen) - log pi(rejected))) - cpo_alpha * log pi(chosen) per token

`loss_type` replaces the logistic loss by SLiC's hinge loss, or by IPO's, of log-probs per token.
Left out: AlphaPO's `alpha`; `simpo` is an algorithm of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from prefold.algorithms.base import (
    NO_STATE,
    Algorithm,
    LossOutput,
    NotNegative,
    Positive,
    Smoothing,
    State,
    Tensor,
    TokenTree,
    TreeLogprobs,
)
from prefold.algorithms.dpo import dpo_loss
from prefold.algorithms.hinge import hinge_loss
from prefold.algorithms.ipo import ipo_loss
from prefold.algorithms.pairwise import pair_metrics
from prefold.algorithms.sft import chosen_nll, chosen_tokens


@dataclass(frozen=True)
class CPO(Algorithm):
    """Contrastive Preference Optimization: DPO without a reference, and supervised fine-tuning beside it"""

    beta: Positive = 0.1
    """Scale of the difference of the log-probs."""
    cpo_alpha: NotNegative = 1.0
    """Weight of the supervised loss on the chosen completions."""
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """Loss of the difference of the log-probs; for `ipo`, per token."""
    label_smoothing: Smoothing = 0.0
    """For `sigmoid`: share of pairs believed to be the wrong way round, less than 0.5."""

    paper = "2401.08417"
    oracle = "`CPOTrainer`"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError("label_smoothing is used by `loss_type: sigmoid` only")

    def units(self, trees: Sequence[TokenTree]) -> dict[str, int]:
        return {"pairs": len(trees), "chosen_tokens": chosen_tokens(trees)}

    def loss(self, policy: TreeLogprobs, reference: TreeLogprobs | None, state: State = NO_STATE) -> LossOutput:
        logprobs = policy.means() if self.loss_type == "ipo" else policy.sums()
        chosen, rejected = logprobs.view(-1, 2).unbind(1)
        nll, metric = chosen_nll(policy)
        metrics = pair_metrics(chosen, rejected, self.beta * chosen, self.beta * rejected)
        losses = {"pairs": self.contrast(chosen - rejected).sum(), "chosen_tokens": self.cpo_alpha * nll}
        return LossOutput(losses, {"nll_loss": metric, **metrics})

    def contrast(self, difference: Tensor) -> Tensor:
        """`[B]` losses of `[B]` differences of log-probs in nats."""
        if self.loss_type == "hinge":
            return hinge_loss(difference, beta=self.beta)
        if self.loss_type == "ipo":
            return ipo_loss(difference, beta=self.beta)
        return dpo_loss(difference, beta=self.beta, label_smoothing=self.label_smoothing)
