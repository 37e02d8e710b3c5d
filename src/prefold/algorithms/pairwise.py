"""What losses of pairs have in common: comparison with the reference, metrics, settings.

A subclass of `Pairwise` implements the losses of pairs and nothing else. One of `ByDifference` computes them from the
difference of the two completions' scores alone.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from prefold.algorithms.base import (
    NO_STATE,
    Algorithm,
    Bound,
    LossOutput,
    Mean,
    Positive,
    State,
    Tensor,
    TokenTree,
    TreeLogprobs,
)
from prefold.algorithms.divergence import Divergence, divergence_scores


@dataclass(frozen=True)
class Pairs:
    """`[B]` each: summed log-probs of the completions in nats, under policy and reference, and lengths in tokens."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor

    @property
    def chosen_ratios(self) -> Tensor:
        """`[B]`: log of the probability ratio of policy and reference."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratios(self) -> Tensor:
        return self.rejected - self.ref_rejected


def compare(policy: TreeLogprobs, reference: TreeLogprobs | None, ld_alpha: float | None = None) -> Pairs:
    """The pairs of a batch of trees with two completions each."""
    assert reference is not None
    if ld_alpha is not None:
        policy, reference = discount_tails(policy, ld_alpha), discount_tails(reference, ld_alpha)
    chosen_lengths, rejected_lengths = policy.lengths.view(-1, 2).unbind(1)
    return Pairs(*policy.pairs(), *reference.pairs(), chosen_lengths, rejected_lengths)


def discount_tails(logprobs: TreeLogprobs, ld_alpha: float) -> TreeLogprobs:
    """The log-probs, times `ld_alpha` beyond the length of the pair's shorter completion (arXiv 2409.06411)."""
    from torch import arange

    lengths, completion = logprobs.lengths, logprobs.completion
    first = lengths.cumsum(0) - lengths
    position = arange(len(completion), device=completion.device) - first[completion]
    shared = lengths.view(-1, 2).amin(1).repeat_interleave(2)
    tokens = logprobs.tokens.where(position < shared[completion], ld_alpha * logprobs.tokens)
    return replace(logprobs, tokens=tokens)


def pair_weights(policy: TreeLogprobs) -> Tensor:
    """`[B]`, without gradient: how likely the policy itself is to write both completions (arXiv 2406.11827).

    Equation 2 with its alignment of weights: a token counts as p(token) / sum of p^2 over the vocabulary, which is
    1 on average for a model's own samples, however peaked its distribution is; a completion as the geometric mean of
    its tokens.
    """
    assert policy.statistics is not None
    aligned = policy.tokens.detach() - policy.statistics.squares.log()
    return replace(policy, tokens=aligned).means().view(-1, 2).sum(1).exp()


def means(values: dict[str, Tensor]) -> dict[str, Mean]:
    """Metrics from their values, one dimension each."""
    return {name: Mean(value.detach().sum(), len(value)) for name, value in values.items()}


def pair_metrics(chosen: Tensor, rejected: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor) -> dict[str, Mean]:
    """TRL's metrics of `[B]` pairs from log-probs and rewards. A tie counts as wrong."""
    return means(
        {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
            "rewards/margins": chosen_rewards - rejected_rewards,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }
    )


@dataclass(frozen=True)
class PerPair(Algorithm):
    """A loss that is a mean over pairs."""

    def units(self, trees: Sequence[TokenTree]) -> dict[str, int]:
        return {"pairs": len(trees)}


@dataclass(frozen=True)
class AgainstReference(PerPair):
    """A loss of pairs whose log-probs are compared with those of a reference."""

    beta: Positive = 0.1
    """How strongly the policy is held to the reference."""
    ld_alpha: Annotated[float | None, Bound(lambda share: 0 <= share <= 1, "from 0 to 1")] = None
    """Weight, 0 to 1, of the tokens beyond the length of the pair's shorter completion (LD-DPO, arXiv 2409.06411);
    unset: all count the same."""

    needs_reference = True

    def loss(self, policy: TreeLogprobs, reference: TreeLogprobs | None, state: State = NO_STATE) -> LossOutput:
        pairs = compare(policy, reference, self.ld_alpha)
        return self.output(self.losses(pairs), pairs, policy)

    def output(self, losses: Tensor, pairs: Pairs, policy: TreeLogprobs) -> LossOutput:
        if self.needs_statistics:
            losses = losses * pair_weights(policy)
        rewards = self.beta * pairs.chosen_ratios, self.beta * pairs.rejected_ratios
        return LossOutput({"pairs": losses.sum()}, pair_metrics(pairs.chosen, pairs.rejected, *rewards))

    @abstractmethod
    def losses(self, pairs: Pairs) -> Tensor:
        """`[B]`, one per pair."""


@dataclass(frozen=True)
class Pairwise(AgainstReference):
    """A loss of each pair by itself."""

    use_weighting: bool = False
    """Weigh each pair by how likely the policy itself is to write it (WPO, arXiv 2406.11827)."""

    needs_statistics = property(lambda self: self.use_weighting)


@dataclass(frozen=True)
class ByDifference(Pairwise):
    """A loss of the difference of the two scores, in which the normaliser of an f-divergence cancels."""

    f_divergence_type: Divergence = "reverse_kl"
    """Divergence that holds the policy to the reference (arXiv 2309.16240)."""
    f_alpha_divergence_coef: float = 0.5
    """Coefficient of `alpha_divergence`: 1 is the reverse KL divergence, 0 the forward one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.f_alpha_divergence_coef != 0.5 and self.f_divergence_type != "alpha_divergence":
            raise ValueError("f_alpha_divergence_coef is used by `f_divergence_type: alpha_divergence` only")

    def scores(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """`[B]`, `[B]`: of chosen and rejected completions; with the reverse KL divergence, their log-ratios."""
        kind, ratios = self.f_divergence_type, (pairs.chosen_ratios, pairs.rejected_ratios)
        if kind == "reverse_kl":
            return ratios
        chosen, rejected = (divergence_scores(ratio, kind, self.f_alpha_divergence_coef) for ratio in ratios)
        return chosen, rejected

    def difference(self, pairs: Pairs) -> Tensor:
        """`[B]`: score of the chosen minus score of the rejected completion."""
        chosen, rejected = self.scores(pairs)
        return chosen - rejected

    def difference_per_token(self, pairs: Pairs) -> Tensor:
        """`[B]`: the same, each score divided by the length of its completion."""
        chosen, rejected = self.scores(pairs)
        return chosen / pairs.chosen_lengths - rejected / pairs.rejected_lengths
