"""Odds Ratio Preference Optimization, arXiv 2403.07691.

Supervised fine-tuning on the chosen side, with a term that holds the rejected one down; no reference. With p the
geometric mean of a completion's token probabilities and odds = p / (1 - p) (equation 4), the loss is (equations 6, 7)

    NLL - beta * log sigmoid(log(odds(chosen) / odds(rejected)))

The NLL is the mean over the tokens of the chosen conversations, prompts included, as the paper's code and TRL have it;
the first token of a conversation is predicted by nothing and not counted, nor is context inside a completion. beta is
the paper's lambda.
Left out: nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from prefold.algorithms.base import (
    NO_STATE,
    Algorithm,
    LossOutput,
    Positive,
    State,
    Tensor,
    TokenTree,
    TreeLogprobs,
    logsigmoid,
)
from prefold.algorithms.pairwise import means, pair_metrics
from prefold.algorithms.sft import chosen_nll, chosen_tokens


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) of `x` <= 0, any shape, without cancellation.

    At 0, where it is minus infinity, the value is that at the normal number just below 0 (-87 in float32), and there is
    no gradient. The branch for small exp(x) gets no arguments near 0, where its derivative is infinite.
    """
    from torch import finfo

    x = x.clamp(max=-finfo(x.dtype).tiny)
    near = x > -math.log(2)
    return (-x.expm1()).log().where(near, (-x.where(~near, -1.0).exp()).log1p())


def log_odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Log of odds(chosen) / odds(rejected) from log-probs per token in nats, any shape, float32 or better."""
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))


@dataclass(frozen=True)
class ORPO(Algorithm):
    """Odds Ratio Preference Optimization: supervised fine-tuning that holds the rejected completions down"""

    beta: Positive = 0.1  # TRL's
    """Weight of the odds ratio, relative to the supervised loss."""
    completion_only_loss: bool = False
    """Leave the prompts out of the supervised loss."""

    paper = "2403.07691"
    oracle = "`ORPOTrainer`"
    scores_prompt = property(lambda self: not self.completion_only_loss)
    _tokens = property(lambda self: "chosen_tokens" if self.completion_only_loss else "conversation_tokens")

    def units(self, trees: Sequence[TokenTree]) -> dict[str, int]:
        return {"pairs": len(trees), self._tokens: chosen_tokens(trees, self.scores_prompt)}

    def loss(self, policy: TreeLogprobs, reference: TreeLogprobs | None, state: State = NO_STATE) -> LossOutput:
        chosen, rejected = policy.means().view(-1, 2).unbind(1)
        log_odds = log_odds_ratio(chosen, rejected)
        ratio = logsigmoid(log_odds)
        nll, metric = chosen_nll(policy, self.scores_prompt)
        metrics = {
            "nll_loss": metric,
            **means({"log_odds_ratio": ratio, "log_odds_chosen": log_odds}),
            **pair_metrics(chosen, rejected, self.beta * chosen, self.beta * rejected),
        }
        return LossOutput({"pairs": -self.beta * ratio.sum(), self._tokens: nll}, metrics)
