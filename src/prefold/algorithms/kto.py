"""Kahneman-Tversky Optimization, arXiv 2402.01306.

Completions with a label each, desirable or not, instead of pairs. With the log-ratio r of a completion and a reference
point z, its loss is (equation 7)

    desirable_weight   * (1 - sigmoid(beta * (r - z)))     of a desirable one
    undesirable_weight * (1 - sigmoid(beta * (z - r)))     of an undesirable one

z estimates the KL divergence of policy and reference: the mean log-ratio of completions under prompts that are not
theirs, at least 0, without gradient. As in TRL, each prompt is given the completion of the tree before it; the mean is
over the whole step, where TRL takes it over a micro-batch.
Left out: TRL's `apo_zero_unpaired`; finding the weights from the balance of the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from prefold.algorithms.base import NO_STATE, UNPAIRED, Algorithm, Kind, LossOutput, Mean, State, require_positive
from prefold.algorithms.pairwise import means

if TYPE_CHECKING:
    from prefold.trees.logprobs import TreeLogprobs
    from prefold.trees.packing import TokenTree


def mismatched(trees: Sequence[TokenTree]) -> list[TokenTree]:
    """Every prompt with the completions of the tree before it, the first with those of the last."""
    return [
        replace(tree, completions=before.completions)
        for before, tree in zip([*trees[-1:], *trees[:-1]], trees, strict=True)
    ]


def kto_loss(
    policy: Tensor,
    reference: Tensor,
    labels: Tensor,
    policy_mismatched: Tensor,
    reference_mismatched: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of `N` completions (equation 7 of arXiv 2402.01306).

    Args:
        policy, reference: `[N]`, summed log-probs of the completions in nats.
        labels: `[N]`, whether they are desirable.
        policy_mismatched, reference_mismatched: `[M]`, summed log-probs of completions under other prompts.
        beta: how strongly the policy is held to the reference.

    Returns:
        `[N]` losses, `[N]` rewards beta * log-ratio, scalar estimate of the KL divergence in nats.
    """
    kl = (policy_mismatched - reference_mismatched).detach().mean().clamp(min=0)
    ratios = policy - reference
    gains = torch.where(labels, ratios - kl, kl - ratios)
    losses = (-beta * gains).sigmoid()
    return torch.where(labels, desirable_weight * losses, undesirable_weight * losses), beta * ratios, kl


@dataclass(frozen=True)
class KTO(Algorithm):
    """Kahneman-Tversky Optimization: from completions that are each good or bad, without pairs"""

    beta: float = 0.1
    """How strongly the policy is held to the reference."""
    desirable_weight: float = 1.0
    """Weight of the desirable completions. The paper wants weight times number to be 1 to 1.33 times that of the
    undesirable ones."""
    undesirable_weight: float = 1.0
    """Weight of the undesirable completions."""

    paper: ClassVar[str] = "2402.01306"
    oracle: ClassVar[str] = "`KTOTrainer`, `kto`, a step in one micro-batch"
    kind: ClassVar[Kind] = UNPAIRED
    needs_reference: ClassVar[bool] = True
    record_fields: ClassVar[tuple[str, ...]] = ("label",)
    couples_step: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_positive(
            beta=self.beta, desirable_weight=self.desirable_weight, undesirable_weight=self.undesirable_weight
        )

    def units(self, trees: Sequence[TokenTree]) -> dict[str, int]:
        return {"completions": sum(len(tree.completions) for tree in trees)}

    def further_trees(self, trees: Sequence[TokenTree]) -> dict[str, list[TokenTree]]:
        return {"mismatched": mismatched(trees)}

    def loss(self, policy: TreeLogprobs, reference: TreeLogprobs | None, state: State = NO_STATE) -> LossOutput:
        """`extras`: `label` `[N]`, whether a completion is desirable; and of the `further_trees`."""
        assert reference is not None
        logprobs, labels = policy.sums(), policy.extras["label"]
        losses, rewards, kl = kto_loss(
            logprobs,
            reference.sums(),
            labels,
            policy.extras["mismatched"],
            reference.extras["mismatched"],
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        metrics = {"kl": Mean(kl, 1), **label_metrics(logprobs, rewards, labels)}
        return LossOutput({"completions": losses.sum()}, metrics)


def label_metrics(logprobs: Tensor, rewards: Tensor, labels: Tensor) -> dict[str, Mean]:
    """TRL's metrics of `[N]` completions: means over the desirable ones (`chosen`) and over the others, where there are
    any, and the difference of the two mean rewards, where there are both."""
    metrics: dict[str, Mean] = {}
    for name, those in (("chosen", labels), ("rejected", ~labels)):
        if those.any():
            metrics |= means({f"rewards/{name}": rewards[those], f"logps/{name}": logprobs[those]})
    if len(metrics) == 4:
        chosen, rejected = (metrics[f"rewards/{name}"] for name in ("chosen", "rejected"))
        metrics["rewards/margins"] = Mean(chosen.total / chosen.number - rejected.total / rejected.number, 1)
    return metrics
