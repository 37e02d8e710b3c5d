"""Direct Preference Optimization, arXiv 2305.18290.

With the implicit reward r(x, y) = beta * (log pi(y|x) - log pi_ref(y|x)) of a completion (section 4), the loss of a
pair is (equation 7)

    -log sigmoid(r(x, chosen) - r(x, rejected))

Left out: label smoothing and the other pairwise losses (they are algorithms of their own); the partition function Z(x)
of equation 5, which cancels in the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from prefold.algorithms.base import Algorithm, LossOutput, Mean

if TYPE_CHECKING:
    from prefold.trees.logprobs import TreeLogprobs
    from prefold.trees.packing import TokenTree


def dpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and implicit rewards of `B` pairs (equation 7 of arXiv 2305.18290).

    Args:
        chosen, rejected, ref_chosen, ref_rejected: `[B]`, summed log-probs of the completions in nats.
        beta: weight of the KL constraint; larger stays closer to the reference.

    Returns:
        `[B]` losses in nats, `[B]` rewards of the chosen, `[B]` rewards of the rejected completions.
    """
    chosen_rewards = beta * (chosen - ref_chosen)
    rejected_rewards = beta * (rejected - ref_rejected)
    return -logsigmoid(chosen_rewards - rejected_rewards), chosen_rewards, rejected_rewards


@dataclass(frozen=True)
class DPO(Algorithm):
    beta: float = 0.1
    """How strongly the policy is held to the reference: 0.01 (loose) to 0.5 (tight)."""

    needs_reference: ClassVar[bool] = True

    # A learning rate of 5e-5 and rank 16 on all linear layers are what the QLoRA DPO recipes in the field settled on;
    # full fine-tuning wants about a hundredth of that rate.
    defaults: ClassVar[dict[str, Any]] = {
        "train.learning_rate": 5e-5,
        "train.gradient_checkpointing": False,
        "data.max_length": 1024,
    }

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be greater than 0, got {self.beta}")

    @property
    def reward_scale(self) -> float:
        return self.beta

    def units(self, trees: Sequence[TokenTree]) -> dict[str, int]:
        return {"pairs": len(trees)}

    def loss(self, policy: TreeLogprobs, reference: TreeLogprobs | None) -> LossOutput:
        assert reference is not None
        chosen, rejected = policy.pairs()
        losses, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, *reference.pairs(), beta=self.beta)
        metrics = {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
            "rewards/margins": chosen_rewards - rejected_rewards,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }
        return LossOutput(
            loss={"pairs": losses.sum()},
            metrics={name: Mean(values.detach().sum(), len(values)) for name, values in metrics.items()},
        )
