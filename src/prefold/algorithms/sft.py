"""Supervised fine-tuning on the chosen completions.

    -log pi(token | what is before it), averaged over the scored tokens of the chosen completions of the step

Left out: the loss on prompts; data without a rejected side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from prefold.algorithms.base import (
    ADAPTER_DEFAULTS,
    NO_STATE,
    Algorithm,
    LossOutput,
    Mean,
    State,
    Tensor,
    TokenTree,
    TreeLogprobs,
)
from prefold.algorithms.pairwise import means


def chosen_tokens(trees: Sequence[TokenTree], prompts: bool = False) -> int:
    """Scored tokens of the chosen completions; with `prompts`, also those of prompts except the first, which nothing
    predicts."""
    return sum(len(tree.scored[0]) + (len(tree.prompt) - 1 if prompts else 0) for tree in trees)


def chosen_nll(policy: TreeLogprobs, prompts: bool = False) -> tuple[Tensor, Mean]:
    """Negative log-prob of the tokens that `chosen_tokens` counts: the sum in nats, and the metric."""
    nll, tokens = -policy.pairs()[0].sum(), int(policy.lengths.view(-1, 2)[:, 0].sum())
    if prompts:
        assert policy.prompts is not None and policy.prompt_lengths is not None
        nll, tokens = nll - policy.prompts.sum(), tokens + int(policy.prompt_lengths.sum())
    return nll, Mean(nll.detach(), tokens)


@dataclass(frozen=True)
class SFT(Algorithm):
    """Supervised fine-tuning on the chosen completions"""

    paper = ""
    oracle = "`DPOTrainer`, `sft`"
    # The rate of the QLoRA paper's supervised runs, arXiv 2305.14314.
    defaults = ADAPTER_DEFAULTS | {"train.learning_rate": 2e-4}

    def units(self, trees: Sequence[TokenTree]) -> dict[str, int]:
        return {"chosen_tokens": chosen_tokens(trees)}

    def loss(self, policy: TreeLogprobs, reference: TreeLogprobs | None, state: State = NO_STATE) -> LossOutput:
        nll, metric = chosen_nll(policy)
        chosen, rejected = policy.pairs()
        metrics = {"nll_loss": metric, **means({"logps/chosen": chosen, "logps/rejected": rejected})}
        return LossOutput({"chosen_tokens": nll}, metrics)
