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

from collections.abc import Sequence
from dataclasses import dataclass, replace

from prefold.algorithms.base import (
    NO_STATE,
    UNPAIRED,
    Algorithm,
    LossOutput,
    Mean,
    Positive,
    State,
    Tensor,
    TokenTree,
    TreeLogprobs,
)
from prefold.algorithms.pairwise import means


@dataclass(frozen=True)
class KTO(Algorithm):
    """Kahneman-Tversky Optimization: from completions that are each good or bad, without pairs"""

    beta: Positive = 0.1
    """How strongly the policy is held to the reference."""
    desirable_weight: Positive = 1.0
    """Weight of the desirable completions. The paper recommends a weight times number of 1 to 1.33 times that of the
    undesirable ones."""
    undesirable_weight: Positive = 1.0
    """Weight of the undesirable completions."""

    paper = "2402.01306"
    oracle = "`KTOTrainer`, `kto`, a step in one micro-batch"
    kind = UNPAIRED
    needs_reference = True
    record_fields = ("label",)
    couples_step = True

    def units(self, trees: Sequence[TokenTree]) -> dict[str, int]:
        return {"completions": sum(len(tree.completions) for tree in trees)}

    def further_trees(self, trees: Sequence[TokenTree]) -> dict[str, list[TokenTree]]:
        """Every prompt with the completions of the tree before it, the first with those of the last."""
        before = [*trees[-1:], *trees[:-1]]
        pairs = zip(trees, before, strict=True)
        return {"mismatched": [replace(other, prompt=tree.prompt) for tree, other in pairs]}

    def loss(self, policy: TreeLogprobs, reference: TreeLogprobs | None, state: State = NO_STATE) -> LossOutput:
        """`extras`: `label` `[N]`, whether a completion is desirable; and those of the `further_trees`."""
        assert reference is not None
        logprobs, labels = policy.sums(), policy.extras["label"]
        kl = (policy.extras["mismatched"] - reference.extras["mismatched"]).detach().mean().clamp(min=0)
        ratios = logprobs - reference.sums()
        gains = (ratios - kl).where(labels, kl - ratios)
        losses = (-self.beta * gains).sigmoid()
        losses = (self.desirable_weight * losses).where(labels, self.undesirable_weight * losses)
        metrics = {"kl": Mean(kl, 1), **label_metrics(logprobs, self.beta * ratios, labels)}
        return LossOutput({"completions": losses.sum()}, metrics)


def label_metrics(logprobs: Tensor, rewards: Tensor, labels: Tensor) -> dict[str, Mean]:
    """TRL's metrics of `[N]` completions: means over the desirable ones (`chosen`) and over the others (`rejected`), if
    there are any, and the difference of the two mean rewards, if there are both."""
    metrics: dict[str, Mean] = {}
    for name, selected in (("chosen", labels), ("rejected", ~labels)):
        if selected.any():
            metrics |= means({f"rewards/{name}": rewards[selected], f"logps/{name}": logprobs[selected]})
    if len(metrics) == 4:
        chosen, rejected = (metrics[f"rewards/{name}"] for name in ("chosen", "rejected"))
        metrics["rewards/margins"] = Mean(chosen.total / chosen.number - rejected.total / rejected.number, 1)
    return metrics
