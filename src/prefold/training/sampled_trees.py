"""The trees of a step from the model's own completions: prompts -> completions -> rewards -> advantages -> trees.

What is sampled at a step depends on the weights, the seed, the step, the prompt and how often it was drawn before, and
on nothing else, so a resumed run samples what an uninterrupted one does. Checkpoints fall between rollouts, so none of
them contains one. Each of several processes samples a share of the groups; the first one has the rewards score all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prefold import ranks
from prefold.algorithms import Algorithm, Draws, Metric
from prefold.data.examples import Example, Examples, prompts_of
from prefold.generation.engine import require_end_token, sample
from prefold.generation.sampling import Completion, Sampling
from prefold.generation.sequences import seed_of
from prefold.rewards.scoring import Group, LoadedReward, scored_groups
from prefold.training.loop import StepOrder, StepTrees, TreeSet
from prefold.trees.attention import unwrapped, using_attention
from prefold.trees.head import Statistics
from prefold.trees.logprobs import TreeLogprobs, router_coefficient
from prefold.trees.packing import TokenTree
from prefold.trees.reference import compute_reference
from prefold.trees.scorer import Scorer

Served = Callable[[int, Sequence[tuple[int, ...]]], tuple[list[list[Completion]], dict[str, float]]]
"""Samples a group of completions for each prompt with the weights of a step; returns them and metrics of sampling."""
GROUPS_SHOWN = 4
"""Groups of a step that are written to the run folder."""


class SampledTrees:
    """A source of steps on completions of `prompts` by the model as it is at each step.

    Args:
        algorithm: how completions are sampled and judged.
        scorer: of the policy.
        prompts: the training set.
        rewards: what scores completions.
        columns: columns of the prompts' rows that the rewards get.
        tokenizer: of the model.
        order: which prompts each step covers.
        show: called with the number of a step and some of its groups, as they are written to the run folder.
        seed: of the sampling.
        dtype: the compute dtype of training.
        served: has servers sample completions; None: the model samples them here.

    Raises:
        UserError: the model has no end token.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        scorer: Scorer,
        prompts: Examples,
        rewards: Sequence[LoadedReward],
        columns: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        order: StepOrder,
        show: Sequence[Callable[[int, list[dict[str, Any]]], None]],
        seed: int,
        dtype: torch.dtype = torch.float32,
        served: Served | None = None,
    ):
        require_end_token(unwrapped(scorer.model), tokenizer)
        assert algorithm.draws is not None
        self.algorithm, self.scorer = algorithm, scorer
        self.prompts, self.rewards, self.columns, self.tokenizer = prompts, rewards, columns, tokenizer
        self.order, self.show, self.seed, self.dtype, self.served = order, show, seed, dtype, served
        # Training switches the model to an attention that cannot generate.
        self.attention = unwrapped(scorer.model).config._attn_implementation
        # Not with a mixture of experts: its routers have a loss of their own.
        self.leaves_out = algorithm.needs_advantages and not router_coefficient(scorer.model)
        self.draws = algorithm.draws
        self.sampling = replace(sampling_of(self.draws), with_entropies=self.leaves_out)
        self.rollout = StepTrees(TreeSet([]), ())
        self.of_servers: dict[str, float] = {}

    def __call__(self, step: int) -> StepTrees:
        """A rollout for the prompts of the step if one is due, else the one before again."""
        if step % self.order.iterations == 0:
            self.rollout = self.roll_out(step)
            return self.rollout
        return self.rollout._replace(metrics={})

    def roll_out(self, step: int) -> StepTrees:
        """A tree for each prompt of a step, with the completions that are trained on; some go to the run folder."""
        examples = [self.prompts[i] for i in self.order[step]]
        groups, advantages, drawn_again = self.drawn(step, examples)
        completions = [group.completions for group in groups]
        shown = [group_record(*pair) for pair in zip(groups[:GROUPS_SHOWN], advantages, strict=False)]
        for show in self.show:
            show(step + 1, shown)
        kept = [[i for i, each in enumerate(group) if self.algorithm.trains_on(each.finished)] for group in completions]
        used = [[group[i] for i in indices] for group, indices in zip(completions, kept, strict=True)]
        trees = [
            TokenTree(example.tree.prompt, tuple(completion.token_ids for completion in group))
            for example, group in zip(examples, used, strict=True)
        ]
        reference = None
        if self.algorithm.needs_reference:
            reference = compute_reference(self.scorer, trees, self.dtype)
        extras: Any = {"advantages": [values[indices] for values, indices in zip(advantages, kept, strict=True)]}
        if (logprobs := sampler_logprobs(used)) is not None:
            extras["served" if self.served else "sampled"] = logprobs
        flat = [completion for group in completions for completion in group]
        metrics = {**reward_metrics(groups), **length_metrics(flat)}
        metrics |= self.of_servers
        left_out = [i for i, values in enumerate(extras["advantages"]) if self.is_left_out(used[i], values)]
        if self.leaves_out:
            metrics["groups/left_out"] = len(left_out)
        if self.draws.resample:
            metrics["groups/drawn_again"] = drawn_again
        of_left_out = self.metrics_of_left_out([used[i] for i in left_out])
        data = TreeSet(trees, reference, extras)
        return StepTrees(data, range(len(trees)), metrics, frozenset(left_out), of_left_out)

    def drawn(self, step: int, examples: Sequence[Example]) -> tuple[list[Group], Tensor, int]:
        """A group for each prompt of a step; their advantages `[B, G]`; and how many groups were drawn again.

        Groups whose advantages are all 0 are drawn again, as often as the recipe allows (after arXiv 2503.14476,
        equation 11, which samples further prompts instead; here the same prompt is sampled again). The scores of
        replaced groups are discarded, except for how often their rewards failed.
        """
        groups = self.scored(step, examples, [seed_of(self.seed, step, i) for i in range(len(examples))])
        advantages, drawn_again = advantages_of(self.algorithm, self.rewards, groups), 0
        for draw in range(1, self.draws.resample + 1):
            again = [i for i, values in enumerate(advantages) if not values.any()]
            if not again:
                break
            seeds = [seed_of(self.seed, step, i, draw) for i in again]
            fresh = self.scored(step, [examples[i] for i in again], seeds)
            for i, group in zip(again, fresh, strict=True):
                failed = {name: count + groups[i].failed[name] for name, count in group.failed.items()}
                groups[i] = replace(group, failed=failed)
            advantages = advantages_of(self.algorithm, self.rewards, groups)
            drawn_again += len(again)
        return groups, advantages, drawn_again

    def scored(self, step: int, examples: Sequence[Example], seeds: Sequence[int]) -> list[Group]:
        """A group of completions for each prompt, with their rewards, the same in all processes."""
        completions = self.completions_of(step, [example.tree.prompt for example in examples], seeds)
        return ranks.from_first(lambda: scored_groups(self.rewards, prompts_of(examples), completions, self.columns))

    def is_left_out(self, completions: Sequence[Completion], advantages: Tensor) -> bool:
        """Whether these completions of a group need no forward pass: their advantages are 0, and the sampler gives what
        the metrics need."""
        are_measured = all(each.entropies is not None and each.logprobs for each in completions)
        return self.leaves_out and bool(completions) and are_measured and not advantages.any()

    def metrics_of_left_out(self, groups: Sequence[Sequence[Completion]]) -> Mapping[str, Metric]:
        """The algorithm's metrics of completions without advantages, from the values of the sampler: those of the first
        step on them, and none of their ratios is ever clipped."""
        if not groups:
            return {}
        completions = [each for group in groups for each in group]
        lengths = torch.tensor([len(each.token_ids) for each in completions])
        logprobs = torch.tensor([value for each in completions for value in each.logprobs], dtype=torch.float64)
        entropy = torch.tensor([value for each in completions for value in each.entropies or ()], dtype=torch.float64)
        statistics = Statistics(entropy, torch.zeros_like(entropy), torch.zeros_like(entropy, dtype=torch.bool))
        owner = torch.arange(len(lengths)).repeat_interleave(lengths)
        extras = {"advantages": torch.zeros(len(lengths))}
        return self.algorithm.loss(TreeLogprobs(logprobs, owner, lengths, statistics, extras=extras), None).metrics

    def completions_of(
        self, step: int, prompts: Sequence[tuple[int, ...]], seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """A group for each prompt, sampled from the current model; servers sample with seeds of their own."""
        model, served = self.scorer.model, self.served
        model.eval()
        precision = torch.autocast(unwrapped(model).device.type, self.dtype, enabled=self.dtype.itemsize == 2)
        with using_attention(unwrapped(model), self.attention), precision:
            if served is not None:
                completions, self.of_servers = served(step, prompts)
                return completions
            return sample(model, self.tokenizer, prompts, self.sampling, seeds)


def sampling_of(draws: Draws) -> Sampling:
    """The sampling settings of training."""
    how = draws.temperature, draws.top_p, draws.top_k, draws.min_p
    return Sampling(draws.max_completion_length, draws.num_generations, *how)


def sampler_logprobs(groups: Sequence[Sequence[Completion]]) -> list[Tensor] | None:
    """For each group, the log-probs of its tokens, one completion after the other; None if some are missing."""
    if any(len(each.logprobs) != len(each.token_ids) for group in groups for each in group):
        return None
    return [torch.tensor([value for each in group for value in each.logprobs]) for group in groups]


# ---- records of a rollout ---------------------------------------------------------------------------------------


def advantages_of(algorithm: Algorithm, rewards: Sequence[LoadedReward], groups: Sequence[Group]) -> Tensor:
    """`[B, G]`."""
    scores = [as_tensor([group.scores[name] for group in groups]) for name in groups[0].scores]
    weighted = [(reward.weight, of_reward) for reward, of_reward in zip(rewards, scores, strict=True)]
    return algorithm.advantages(as_tensor([group.rewards for group in groups]), weighted)


def as_tensor(rows: Sequence[Sequence[float | None]]) -> Tensor:
    """`[B, G]`, NaN for None."""
    return torch.tensor([[math.nan if value is None else value for value in row] for row in rows], dtype=torch.float64)


def group_record(group: Group, advantages: Tensor) -> dict[str, Any]:
    """A group as it is written to the run folder."""
    completions = [
        {
            "text": completion.text,
            "tokens": len(completion.token_ids),
            "finished": completion.finished,
            "scores": {name: values[i] for name, values in group.scores.items()},
            "reward": group.rewards[i],
            "advantage": float(advantages[i]),
        }
        for i, completion in enumerate(group.completions)
    ]
    return {"prompt": list(group.prompt.prompt), "completions": completions}


def reward_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """TRL's metrics of rewards, over the completions that have one; the share of the groups whose rewards are all
    equal, which teach nothing; on how many completions each reward that may fail failed; and the cost of rewards that
    call an endpoint."""
    metrics: dict[str, float] = {}
    for name in groups[0].scores:
        values = [value for group in groups for value in known(group.scores[name])]
        metrics |= spread(values, f"rewards/{name}/mean", f"rewards/{name}/std")
    metrics |= spread([value for group in groups for value in known(group.rewards)], "reward", "reward_std")
    metrics["frac_reward_zero_std"] = fmean(len(set(known(group.rewards))) < 2 for group in groups)
    for name, cost in ((name, cost) for group in groups for name, cost in group.cost.items()):
        for what, number in cost.items():
            metrics[f"rewards/{name}/{what}"] = metrics.get(f"rewards/{name}/{what}", 0) + number
    return metrics | {
        f"rewards/{name}/failed": sum(group.failed[name] for group in groups) for name in groups[0].failed
    }


def spread(values: Sequence[float], mean_name: str, deviation_name: str) -> dict[str, float]:
    """Mean and standard deviation of a sample, as far as they are defined."""
    return {
        **({mean_name: fmean(values)} if values else {}),
        **({deviation_name: stdev(values)} if len(values) > 1 else {}),
    }


def known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def length_metrics(completions: Sequence[Completion]) -> dict[str, float]:
    """TRL's metrics of lengths in tokens, end tokens included; those of finished completions are 0 if there are
    none."""
    every = [len(completion.token_ids) for completion in completions]
    finished = [len(completion.token_ids) for completion in completions if completion.finished]
    metrics = {"completions/clipped_ratio": 1 - len(finished) / len(every)}
    for name, lengths in (("length", every), ("terminated_length", finished or [0])):
        metrics |= {
            f"completions/mean_{name}": fmean(lengths),
            f"completions/min_{name}": float(min(lengths)),
            f"completions/max_{name}": float(max(lengths)),
        }
    return metrics
