"""Group Relative Policy Optimization, arXiv 2402.03300, and its variants.

The model samples G completions of a prompt, rewards score them, and each is judged by how its reward r compares with
the others' (section 4.1.2): its advantage is A = (r - mean) / (std + 1e-4). With the ratio w = pi / pi_old of a token's
probabilities now and when it was sampled, the loss of the token is (equation 3)

    -min(w A, clip(w, 1 - epsilon, 1 + epsilon_high) A) + beta * KL

where KL = pi_ref / pi - log(pi_ref / pi) - 1 (equation 4; Schulman's k3). With `use_bias_correction_kl` the KL is
multiplied by w, which makes its gradient that of the reverse KL divergence (arXiv 2512.02556, section 3.1); the paper
and older versions of TRL do not. `loss_type` says what the losses of the tokens are divided by, over the whole step:

    grpo     by the length of their completion, then by the number of completions
    dr_grpo  by the number of completions times `max_completion_length` (arXiv 2503.20783)
    bnpo     by the number of tokens
    dapo     by the number of tokens (arXiv 2503.14476)
    cispo    likewise; the loss is -min(w, epsilon_high) A log pi without gradient through w (arXiv 2506.13585)

TRL's bnpo divides by the tokens of a micro-batch. Over a whole step, bnpo and dapo are the same. With
`importance_sampling_level: sequence` (GSPO, arXiv 2507.18071) the ratio of a token is the geometric mean of those of
its completion; it needs an epsilon of about 3e-4. `delta` bounds ratios where the advantage is negative, which equation
3 does not (arXiv 2505.07291). In the first step on a rollout all ratios are 1: nothing is clipped, and token and
sequence level, and cispo and dapo, have the same policy gradient.

The log-probs are those at the sampling temperature, as in TRL, and before truncation by `top_p`, `top_k` and `min_p`.

Servers that sample the completions compute log-probs of their own, q, that differ by rounding or by a lag. Each token's
loss, without the KL, is then multiplied by pi_old / q, or by the product of these over its completion, clipped to
bounds or set to 0 beyond them (truncated importance sampling, as in TRL's `vllm_importance_sampling_mode`). If `top_p`
and the like truncate the distribution, q is taken before that, as pi is, so that the weight is 1 where server and
policy agree; TRL takes it afterwards, so that every weight is the probability mass that was kept.

Completions that are left out (`mask_truncated_completions`) are not computed at all: they are in no tree, and count in
the divisor of `grpo` and `dr_grpo`, as in TRL.
Other advantages: with `baseline: leave_one_out` that of RLOO (arXiv 2402.14740), the reward minus the mean of the
others'; with `multi_objective_aggregation: normalize_then_sum` that of GDPO (arXiv 2601.05242): each reward is
normalised in its group by itself, the results are weighted and added, and divided by their standard deviation over the
batch.

Left out: the loss types sapo, luspo and vespo; entropy bonuses and masks; masks of off-policy completions; a reference
that follows the policy; RLOO's divergence as a part of the reward; the smallest and the largest of the clip ratios
among TRL's metrics.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from prefold.algorithms.base import (
    ADAPTER_DEFAULTS,
    NO_STATE,
    POSITIVE,
    SAMPLED,
    Algorithm,
    Bound,
    Draws,
    Extreme,
    LossOutput,
    Mean,
    Metric,
    Positive,
    State,
    Tensor,
    TokenTree,
    TreeLogprobs,
)

EPSILON = 0.2
_SMALL = 1e-4
"""Added to a standard deviation, so that a group of equal rewards has advantages of 0."""
Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
_PositiveInt = Annotated[int, POSITIVE]
_FINITE = Bound(lambda value: 0 <= value < math.inf, "at least 0 and less than inf")
_BELOW_1 = Bound(lambda share: 0 <= share < 1, "at least 0 and less than 1")
_UP_TO_1 = Bound(lambda share: 0 < share <= 1, "greater than 0 and at most 1")


def centred(values: Tensor) -> Tensor:
    """`[B, G]` minus the mean of the finite values of each row; exactly 0 where these are all equal."""
    below = values - values.nan_to_num(-math.inf).amax(1, keepdim=True)
    return below - below.nanmean(1, keepdim=True)


def deviation(values: Tensor) -> Tensor:
    """`[B, 1]`: sample standard deviation of the finite values of each row of `[B, G]`; NaN for fewer than two."""
    known = values.isfinite().sum(1, keepdim=True)
    return (centred(values).square().nansum(1, keepdim=True) / (known - 1).clamp(min=0)).sqrt()


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """`[S]`: estimate of the KL divergence of policy and reference at each sampled token, never negative (equation 4 of
    arXiv 2402.03300)."""
    difference = reference - logprobs
    return difference.expm1() - difference


def spread_of(weights: Tensor) -> dict[str, Metric]:
    """Metrics of importance weights, by TRL's names."""
    ends: dict[str, Metric] = {"min": Extreme(weights.min(), min), "max": Extreme(weights.max(), max)}
    values = {**ends, "mean": Mean(weights.sum(), len(weights))}
    return {f"sampling/importance_sampling_ratio/{name}": value for name, value in values.items()}


@dataclass(frozen=True)
class GRPO(Algorithm):
    """Group Relative Policy Optimization: from rewards of the model's own completions, each compared with its group"""

    num_generations: int = 8
    """G, the completions of a prompt."""
    max_completion_length: _PositiveInt = 256
    """Tokens after which a completion is cut off."""
    temperature: Positive = 1.0
    """Sampling temperature."""
    top_p: Annotated[float, _UP_TO_1] = 1.0
    """Sample from the likeliest tokens that together have this probability."""
    top_k: Annotated[int, _FINITE] = 0
    """Sample from this many of the likeliest tokens; 0 is off."""
    min_p: Annotated[float, _BELOW_1] = 0.0
    """Leave out tokens below this share of the likeliest one's probability; 0 is off."""
    beta: Annotated[float, _FINITE] = 0.0
    """Weight of the KL divergence from the reference; at 0 none is computed. The paper's is 0.04."""
    use_bias_correction_kl: bool = True
    """Weigh the KL divergence by the ratio, so that its gradient is unbiased."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo"] = "dapo"
    """What the losses of tokens are divided by; the paper's is `grpo`, which favours short completions."""
    epsilon: Positive = EPSILON
    """Ratios are clipped at 1 - epsilon, where the advantage is negative."""
    epsilon_high: Annotated[float | None, POSITIVE] = None
    """Ratios are clipped at 1 + epsilon_high, where the advantage is positive; unset: as epsilon. For `cispo` the
    largest ratio itself, e.g. 5.0."""
    delta: Annotated[float | None, POSITIVE] = None
    """Upper bound of ratios where the advantage is negative; more than 1 + epsilon_high. Unset: none."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """`sequence`: one ratio per completion (GSPO)."""
    baseline: Literal["mean", "leave_one_out"] = "mean"
    """What a reward is compared with: the mean of its group, or of the others in it (RLOO)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Standard deviation by which advantages are divided."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """`normalize_then_sum`: each reward is compared with its group by itself (GDPO)."""
    num_iterations: _PositiveInt = 1
    """Optimizer steps on each rollout. Checkpoints fall between rollouts: `train.max_steps` and `train.save_steps` are
    rounded up to a multiple of this."""
    importance_sampling_correction: Correction = "sequence_mask"
    """How losses are weighted if servers sample the completions (`generation`): by how much likelier a token
    (`token_...`) or a whole completion (`sequence_...`) is to the policy than it was to the server. `..._truncate`
    clips the weights to the two bounds below, `..._mask` leaves out what is beyond them; `none`: no weights."""
    importance_sampling_clip_max: Annotated[float | None, POSITIVE] = 3.0
    """Upper bound of these weights."""
    importance_sampling_clip_min: Annotated[float | None, POSITIVE] = None
    """Lower bound of these weights."""
    resample: Annotated[int, _FINITE] = 0
    """How many times at most groups whose rewards are all equal are sampled again (as in DAPO)."""
    mask_truncated_completions: bool = False
    """Leave completions that were cut off out of the loss."""

    paper = "2402.03300"
    oracle = "`GRPOTrainer`, every `loss_type` named here, and its advantages"
    kind = SAMPLED
    # A step is 8 prompts and 64 completions; the rate is the one that TRL's users settled on for LoRA.
    defaults = ADAPTER_DEFAULTS | {"train.learning_rate": 2e-5, "train.batch_size": 8}
    needs_statistics = True
    needs_reference = property(lambda self: self.beta > 0)
    needs_advantages = property(lambda self: self.beta == 0)
    iterations = property(lambda self: self.num_iterations)
    for_servers = ("importance_sampling_correction", "importance_sampling_clip_max", "importance_sampling_clip_min")
    draws = property(lambda self: Draws(*(getattr(self, name) for name in Draws._fields)))

    def __post_init__(self) -> None:
        if self.num_generations < 2:
            raise ValueError(f"num_generations must be 2 or more, got {self.num_generations}: one has no group")
        super().__post_init__()
        cispo, delta, scaled = self.loss_type == "cispo", self.delta, self.scale_rewards == "group"
        others = self.baseline == "leave_one_out"
        low, most = self.importance_sampling_clip_min, self.importance_sampling_clip_max
        refused = [
            (
                cispo and (self.epsilon_high is None or self.epsilon != EPSILON),
                "cispo clips at `epsilon_high` alone, e.g. 5.0; set it, and no `epsilon`",
            ),
            (cispo and delta is not None, "cispo holds all ratios at `epsilon_high`; remove `delta`"),
            (
                delta is not None and delta <= 1 + self.high,
                f"delta must be greater than 1 + epsilon_high, here {1 + self.high:g}, got {delta}",
            ),
            (
                self.by_reward and others,
                "normalize_then_sum compares rewards with their group's mean; remove `baseline`",
            ),
            (self.by_reward and not scaled, "normalize_then_sum has deviations of its own; remove `scale_rewards`"),
            (
                low is not None and most is not None and low >= most,
                f"importance_sampling_clip_min must be less than importance_sampling_clip_max, got {low} and {most}",
            ),
            (
                self.importance_sampling_correction.endswith("truncate") and low is most is None,
                "importance_sampling_correction holds weights within bounds, and has none; set "
                "`importance_sampling_clip_max`",
            ),
            (others and scaled, "leave_one_out divides by no group's deviation; set `scale_rewards: none`, or `batch`"),
        ]
        for is_wrong, text in refused:
            if is_wrong:
                raise ValueError(text)

    @property
    def by_reward(self) -> bool:
        """Whether each reward is compared with its group by itself."""
        return self.multi_objective_aggregation == "normalize_then_sum"

    @property
    def remark(self) -> tuple[str, str] | None:  # type: ignore[override]
        if self.importance_sampling_level == "token" or self.loss_type == "grpo":
            return None
        what = f"ratios of whole completions with `loss_type: {self.loss_type}`, which sums over tokens: a completion "
        what += "counts by its length, which is not the objective of GSPO"
        return what, "set `grpo.loss_type: grpo` for GSPO's, or `grpo.importance_sampling_level: token`"

    @property
    def high(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def _weighs_sequences(self) -> bool:
        return self.importance_sampling_correction.startswith("sequence")

    @property
    def _divided_by(self) -> str:
        return "completions" if self.loss_type in ("grpo", "dr_grpo") else "completion_tokens"

    def units(self, trees: Sequence[TokenTree]) -> dict[str, int]:
        """Args: trees: of the whole step, also those whose completions are all left out."""
        tokens = sum(tree.scored_tokens for tree in trees)
        counts = {"completions": len(trees) * self.num_generations, "completion_tokens": max(1, tokens)}
        return {self._divided_by: counts[self._divided_by]}

    def advantages(self, rewards: Tensor, each: Sequence[tuple[float, Tensor]] = ()) -> Tensor:
        """A completion that no reward scores has an advantage of 0, and is left out of means and deviations.
        `scale_rewards` chooses the sample standard deviation: of the group, of the batch, or none. RLOO's is that of
        the differences, as in TRL."""
        if self.by_reward:
            from torch import stack

            alone = [(weight, centred(scores) / (deviation(scores) + _SMALL)) for weight, scores in each]
            parts = [weight * scaled.nan_to_num(0.0) for weight, scaled in alone]
            # The values of a group add up to 0, so their mean is 0, and in groups of equal rewards they stay exactly 0.
            rewards = advantages = stack(parts).sum(0).where(rewards.isfinite(), math.nan)
        else:
            advantages = centred(rewards)
        if self.baseline == "leave_one_out":
            known = rewards.isfinite().sum(1, keepdim=True)
            rewards = advantages = advantages * known / (known - 1)
        if self.scale_rewards != "none":
            sample = rewards.view(1, -1) if self.by_reward or self.scale_rewards == "batch" else rewards
            advantages = advantages / (deviation(sample) + _SMALL)
        return advantages.nan_to_num(0.0)

    def trains_on(self, finished: bool) -> bool:
        return finished or not self.mask_truncated_completions

    def loss(self, policy: TreeLogprobs, reference: TreeLogprobs | None, state: State = NO_STATE) -> LossOutput:
        """`extras`: `advantages` `[N]`; if known, `sampled` `[S]`, the log-probs that the tokens were sampled with, or
        `served` `[S]` if servers sampled them; and `old` `[S]`, those before the first step on the rollout, missing at
        that step."""
        assert policy.statistics is not None
        tokens, advantages = policy.tokens, policy.extras["advantages"].to(policy.tokens)[policy.completion]
        ratios = self.ratios(policy)
        losses = self.token_losses(ratios, advantages, tokens)
        metrics: dict[str, Metric] = {"entropy": Mean(policy.statistics.entropy.sum(), len(tokens))}
        is_first, served = "old" not in policy.extras, "served" in policy.extras
        if served and self.importance_sampling_correction != "none":
            weights = self.importance_weights(policy)
            losses = losses * (weights[policy.completion] if self._weighs_sequences else weights)
            metrics |= spread_of(weights) if is_first else {}
        if self.beta:
            assert reference is not None
            kl = k3(tokens, reference.tokens)
            kl = kl * ratios if self.use_bias_correction_kl else kl
            losses = losses + self.beta * kl
            metrics["kl"] = Mean(kl.detach().sum(), len(tokens))
        metrics |= self.clip_ratios(policy, ratios.detach(), advantages)
        sampled = policy.extras.get("served", policy.extras.get("sampled"))
        if is_first and sampled is not None:
            # Rounding, dropout, and truncation by `top_p` and the like.
            differences = (tokens.detach() - sampled.to(tokens)).abs()
            metrics["sampling/sampling_logp_difference/mean"] = Mean(differences.sum(), len(differences))
        kept = {"old": tokens.detach()} if is_first and self.num_iterations > 1 else {}
        return LossOutput({self._divided_by: self.reduced(policy, losses)}, metrics, kept=kept)

    def importance_weights(self, policy: TreeLogprobs) -> Tensor:
        """`[S]`, or `[N]` of whole completions: how much likelier they were to the policy than to the server that
        sampled them, within the bounds."""
        logs = policy.extras.get("old", policy.tokens.detach()) - policy.extras["served"].to(policy.tokens)
        weights = (replace(policy, tokens=logs).sums() if self._weighs_sequences else logs).exp()
        low, most = self.importance_sampling_clip_min or 0.0, self.importance_sampling_clip_max or math.inf
        clipped = weights.clamp(low, most)
        truncates = self.importance_sampling_correction.endswith("truncate")
        return clipped if truncates else weights.where(clipped == weights, 0.0)

    def ratios(self, policy: TreeLogprobs) -> Tensor:
        """`[S]`: how much likelier each token, or its completion per token, is than when it was sampled."""
        # In the first step on a rollout the log-probs are the old ones, and only their gradient matters.
        old = policy.extras.get("old", policy.tokens.detach())
        logs = policy.tokens - old
        if self.importance_sampling_level == "sequence":
            logs = replace(policy, tokens=logs).means()[policy.completion]
        return logs.exp()

    def token_losses(self, ratios: Tensor, advantages: Tensor, logprobs: Tensor) -> Tensor:
        """`[S]`, from the ratios of tokens and the advantages of their completions."""
        if self.loss_type == "cispo":  # equation 4 of arXiv 2506.13585
            return -ratios.detach().clamp(max=self.high) * advantages * logprobs
        # Equation 3 of arXiv 2402.03300.
        bounded = ratios if self.delta is None else ratios.clamp(max=self.delta)
        return -(bounded * advantages).minimum(ratios.clamp(1 - self.epsilon, 1 + self.high) * advantages)

    def reduced(self, policy: TreeLogprobs, losses: Tensor) -> Tensor:
        """The losses of tokens as the sum that is to be divided by `units`."""
        if self.loss_type == "grpo":
            return replace(policy, tokens=losses).means().sum()
        if self.loss_type == "dr_grpo":
            return losses.sum() / self.max_completion_length
        return losses.sum()

    def clip_ratios(self, policy: TreeLogprobs, ratios: Tensor, advantages: Tensor) -> dict[str, Mean]:
        """Shares of the tokens (of the completions, at sequence level) whose ratio was clipped, by TRL's names."""
        above = (ratios > (self.high if self.loss_type == "cispo" else 1 + self.high)) & (advantages > 0)
        if self.loss_type == "cispo":
            return {"cispo_clip_ratio": self._share(policy, above)}
        below = (ratios < 1 - self.epsilon) & (advantages < 0)
        shares = {"low": below, "high": above, "region": below | above}
        return {f"clip_ratio/{name}_mean": self._share(policy, clipped) for name, clipped in shares.items()}

    def _share(self, policy: TreeLogprobs, clipped: Tensor) -> Mean:
        values = clipped.to(policy.tokens.dtype)
        if self.importance_sampling_level == "sequence":
            values = replace(policy, tokens=values).means()
        return Mean(values.sum(), len(values))
