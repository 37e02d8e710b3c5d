"""Supervised fine-tuning on the chosen completions.

    -log pi(token | what is before it), averaged over the tokens of the chosen completions of the step

Left out: the loss on prompts; data without a rejected side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from prefold.algorithms.base import ADAPTER_DEFAULTS, NO_STATE, Algorithm, LossOutput, Mean, State
from prefold.algorithms.pairwise import chosen_tokens, means

if TYPE_CHECKING:
    from prefold.trees.logprobs import TreeLogprobs
    from prefold.trees.packing import TokenTree


def chosen_nll(policy: TreeLogprobs) -> tuple[Tensor, int]:
    """Negative log-prob of the chosen completions of pairs, as a sum in nats, and their tokens."""
    return -policy.pairs()[0].sum(), int(policy.lengths.view(-1, 2)[:, 0].sum())


@dataclass(frozen=True)
class SFT(Algorithm):
    """Supervised fine-tuning on the chosen completions"""

    paper: ClassVar[str] = ""
    oracle: ClassVar[str] = "`DPOTrainer`, `sft`"
    # The rate of the QLoRA paper's supervised runs, arXiv 2305.14314.
    defaults: ClassVar[dict[str, Any]] = {**ADAPTER_DEFAULTS, "train.learning_rate": 2e-4}

    def units(self, trees: Sequence[TokenTree]) -> dict[str, int]:
        return {"chosen_tokens": chosen_tokens(trees)}

    def loss(self, policy: TreeLogprobs, reference: TreeLogprobs | None, state: State = NO_STATE) -> LossOutput:
        total, tokens = chosen_nll(policy)
        chosen, rejected = policy.pairs()
        metrics = means({"logps/chosen": chosen, "logps/rejected": rejected})
        return LossOutput({"chosen_tokens": total}, {"nll_loss": Mean(total.detach(), tokens), **metrics})
