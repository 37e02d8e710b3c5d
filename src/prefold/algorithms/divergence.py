"""f-DPO, arXiv 2309.16240: DPO with another divergence than the reverse KL.

With the probability ratio t = pi(y|x) / pi_ref(y|x), the score of a completion is f'(t) instead of log t (theorem 1):

    reverse_kl        f(t) = t log t                        f'(t) = log t + 1
    forward_kl        f(t) = -log t                         f'(t) = -1 / t
    js_divergence     f(t) = t log t - (t+1) log((t+1)/2)   f'(t) = log(2t / (t+1))
    alpha_divergence  f(t) = (t^a - a t + a - 1)/(a (a-1))  f'(t) = (t^(a-1) - 1)/(a-1)

Constants cancel in the difference of two scores; here they are chosen so that a ratio of 1 scores 0. The forward KL is
then the alpha divergence with a = 0.
"""

import math
from typing import Literal

from prefold.algorithms.base import Tensor, logsigmoid

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

LARGEST_EXPONENT = 80.0
"""exp(80) fits in float32, exp(90) does not. Beyond it a score is constant and has no gradient."""


def divergence_scores(log_ratios: Tensor, kind: Divergence, alpha: float) -> Tensor:
    """Scores of completions from log t in nats, any shape; `alpha`: a of the alpha divergence, else unused."""
    if kind == "js_divergence":
        return math.log(2) + logsigmoid(log_ratios)
    power = {"reverse_kl": 0.0, "forward_kl": -1.0, "alpha_divergence": alpha - 1.0}[kind]
    if abs(power) < 1e-6:
        return log_ratios
    return (power * log_ratios).clamp(max=LARGEST_EXPONENT).expm1() / power
