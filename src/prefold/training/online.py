"""Training on the model's own completions: rollouts -> rewards -> advantages -> the same packed trees.

An item of the dataloader names the prompts of an optimizer step. The trainer samples a group of completions for each of
them, has the rewards score them, and makes the trees of the step from them; from there on a step is that of
`PreferenceTrainer`. What is sampled at a step depends on the weights, the seed, the step and the prompt alone, so a
resumed run samples what a straight one does. Checkpoints fall between rollouts, so none of them holds one. Of several
processes each samples a share of the groups; the first one has the rewards score all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from prefold import ranks
from prefold.algorithms import GRPO, Draws, LossOutput, Mean
from prefold.algorithms.grpo import group_advantages
from prefold.data.examples import Examples, prompts_of
from prefold.generation.groups import require_end_token, sample
from prefold.generation.sampling import Completion, Sampling, seed_of
from prefold.rewards.scoring import Group, LoadedReward, scored_groups
from prefold.training.offline import PreferenceTrainer, StepOrder, TreeSet
from prefold.training.record import StepRecord
from prefold.training.trackers import send_completions
from prefold.trees.attention import using_attention
from prefold.trees.logprobs import TreeLogprobs
from prefold.trees.packing import TokenTree
from prefold.trees.reference import compute_reference
from prefold.trees.scorer import Scorer, unwrapped

GROUPS_SHOWN = 4
"""Groups of a step that are written to the run folder."""


@dataclass(frozen=True)
class Rollout:
    """What was sampled for one step: a tree for each prompt, with the completions that are trained on.

    `advantages`: for each tree, `[completions]`. `reference`: for each tree, the reference's log-probs of its
    completions' tokens; None if the algorithm needs none. `sampled`: for each tree, the log-probs that they were drawn
    with; None where the sampler does not tell.
    """

    trees: list[TokenTree]
    advantages: list[Tensor]
    reference: list[Tensor] | None
    sampled: list[Tensor] | None
    metrics: dict[str, float]


class OnlineTrainer(PreferenceTrainer):
    """Trains `scorer.model` on its own completions of `prompts`.

    Args:
        algorithm: loss, and how completions are sampled and judged.
        scorer: how log-probs are computed, and the token budget.
        prompts: the training set.
        rewards: what scores completions.
        columns: of the prompts' rows, that the rewards are given.
        tokenizer: of the model.
        order: which prompts each step covers.
        record: where metrics, times and samples of the steps go.
        args: of transformers; batch size and accumulation are 1, since an item is a whole step.

    Raises:
        UserError: the model has no end token.
    """

    def __init__(
        self,
        algorithm: GRPO,
        scorer: Scorer,
        prompts: Examples,
        rewards: Sequence[LoadedReward],
        columns: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        order: StepOrder,
        record: StepRecord,
        args: TrainingArguments,
    ):
        require_end_token(unwrapped(scorer.model), tokenizer)
        args.save_steps = math.ceil(args.save_steps / algorithm.num_iterations) * algorithm.num_iterations
        scorer = replace(scorer, temperature=algorithm.temperature)
        super().__init__(algorithm, scorer, TreeSet([]), order, record, args)
        self.grpo, self.prompts, self.rewards, self.tokenizer = algorithm, prompts, rewards, tokenizer
        self.columns = columns
        # Training switches the model to an attention that cannot generate.
        self.attention = unwrapped(scorer.model).config._attn_implementation
        self.rollout = Rollout([], [], None, None, {})
        self.old: dict[int, Tensor] = {}

    # ---- a step ----

    @property
    def is_first_on_rollout(self) -> bool:
        return self.state.global_step % self.grpo.num_iterations == 0

    def indices_of(self, item: Sequence[int]) -> Sequence[int]:
        """A rollout for the prompts at `item`, where one is due; places of its trees."""
        if self.is_first_on_rollout:
            self.rollout = self.roll_out(item)
            self.data, self.old = TreeSet(self.rollout.trees, self.rollout.reference), {}
        return range(len(self.data.trees))

    def _step(self, model: nn.Module, indices: Sequence[int]) -> Tensor:
        loss = super()._step(model, indices)
        if not any(tree.completions for tree in self.data.trees):
            # Optimizers want gradients, be they 0.
            weights = [weight.sum() for weight in model.parameters() if weight.requires_grad]
            self.accelerator.backward(0 * torch.stack(weights).sum())
        if self.is_first_on_rollout:
            self.step_metrics = {**self.rollout.metrics, **self.step_metrics}
        return loss

    def loss_of(self, policy: TreeLogprobs, data: TreeSet, indices: Sequence[int]) -> LossOutput:
        policy = replace(policy, advantages=torch.cat([self.rollout.advantages[i] for i in indices]).to(policy.tokens))
        if not self.is_first_on_rollout:
            policy = replace(policy, old=torch.cat([self.old[i] for i in indices]))
        elif self.grpo.num_iterations > 1:
            sizes = [sum(map(len, data.trees[i].completions)) for i in indices]
            self.old |= zip(indices, policy.tokens.detach().split(sizes), strict=True)
        output = super().loss_of(policy, data, indices)
        return replace(output, metrics={**output.metrics, **self._sampler_metrics(policy, indices)})

    def _sampler_metrics(self, policy: TreeLogprobs, indices: Sequence[int]) -> dict[str, Mean]:
        """How far the sampler's log-probs are from those that are trained on: rounding, dropout, and what `top_p` and
        the like cut off. They serve nothing else."""
        if not self.is_first_on_rollout or self.rollout.sampled is None:
            return {}
        sampled = torch.cat([self.rollout.sampled[i] for i in indices]).to(policy.tokens)
        difference = (policy.tokens.detach() - sampled).abs()
        return {"sampling/sampling_logp_difference/mean": Mean(difference.sum(), len(difference))}

    # ---- a rollout ----

    def roll_out(self, places: Sequence[int]) -> Rollout:
        """Sample and judge completions of the prompts at `places`, and write some of them to the run folder."""
        examples = [self.prompts[place] for place in places]
        seeds = [seed_of(self.args.seed, self.state.global_step, place) for place in range(len(places))]
        completions = self.completions_of([example.tree.prompt for example in examples], seeds)
        groups = ranks.from_first(lambda: scored_groups(self.rewards, prompts_of(examples), completions, self.columns))
        advantages = group_advantages(rewards_of(groups), self.grpo.scale_rewards)
        self._show([shown(*pair) for pair in zip(groups[:GROUPS_SHOWN], advantages, strict=False)])
        kept = [[place for place, one in enumerate(group) if self._is_kept(one)] for group in completions]
        used = [[group[place] for place in places] for group, places in zip(completions, kept, strict=True)]
        trees = [
            TokenTree(example.tree.prompt, tuple(one.token_ids for one in group))
            for example, group in zip(examples, used, strict=True)
        ]
        return Rollout(
            trees,
            [of_group[places] for of_group, places in zip(advantages, kept, strict=True)],
            self._reference_of(trees) if self.grpo.needs_reference else None,
            sampler_logprobs(used),
            {**reward_metrics(groups), **length_metrics([one for group in completions for one in group])},
        )

    def _show(self, groups: Sequence[dict[str, Any]]) -> None:
        step = self.state.global_step + 1
        self.record.rollout(step, groups)
        send_completions(step, groups)

    def completions_of(self, prompts: Sequence[tuple[int, ...]], seeds: Sequence[int]) -> list[list[Completion]]:
        """A group for each prompt, by the model as it is now."""
        policy = self.scorer.model
        policy.eval()
        with using_attention(unwrapped(policy), self.attention), self.accelerator.autocast():
            return sample(policy, self.tokenizer, prompts, sampling_of(self.grpo.draws), seeds)

    def _reference_of(self, trees: Sequence[TokenTree]) -> list[Tensor]:
        with self.accelerator.autocast():
            return compute_reference(self.scorer, trees)

    def _is_kept(self, completion: Completion) -> bool:
        return completion.finished or not self.grpo.mask_truncated_completions


def sampling_of(draws: Draws) -> Sampling:
    """How training samples."""
    return Sampling(
        max_new_tokens=draws.max_completion_length,
        num_answers=draws.num_generations,
        temperature=draws.temperature,
        top_p=draws.top_p,
        top_k=draws.top_k,
        min_p=draws.min_p,
    )


def sampler_logprobs(groups: Sequence[Sequence[Completion]]) -> list[Tensor] | None:
    """For each group, the log-probs of its tokens, one completion after the other."""
    if any(len(one.logprobs) != len(one.token_ids) for group in groups for one in group):
        return None
    return [torch.tensor([value for one in group for value in one.logprobs]) for group in groups]


# ---- records of a rollout ---------------------------------------------------------------------------------------


def rewards_of(groups: Sequence[Group]) -> Tensor:
    """`[B, G]`, NaN where no reward says anything."""
    rows = [[math.nan if value is None else value for value in group.rewards] for group in groups]
    return torch.tensor(rows, dtype=torch.float64)


def shown(group: Group, advantages: Tensor) -> dict[str, Any]:
    """A group as it is written to the run folder."""
    completions = [
        {
            "text": one.text,
            "tokens": len(one.token_ids),
            "finished": one.finished,
            "scores": {name: values[place] for name, values in group.scores.items()},
            "reward": group.rewards[place],
            "advantage": float(advantages[place]),
        }
        for place, one in enumerate(group.completions)
    ]
    return {"prompt": list(group.prompt.prompt), "completions": completions}


def reward_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """TRL's metrics of rewards, over the completions that they say something about; the share of the groups whose
    rewards are all equal, which teach nothing; and how many completions each reward that may fail failed on."""
    metrics: dict[str, float] = {}
    for name in groups[0].scores:
        values = [value for group in groups for value in known(group.scores[name])]
        metrics |= spread(values, f"rewards/{name}/mean", f"rewards/{name}/std")
    metrics |= spread([value for group in groups for value in known(group.rewards)], "reward", "reward_std")
    metrics["frac_reward_zero_std"] = fmean(len(set(known(group.rewards))) < 2 for group in groups)
    return metrics | {
        f"rewards/{name}/failed": sum(group.failed[name] for group in groups) for name in groups[0].failed
    }


def spread(values: Sequence[float], mean_name: str, deviation_name: str) -> dict[str, float]:
    """Mean and standard deviation of a sample, as far as there are any."""
    return {
        **({mean_name: fmean(values)} if values else {}),
        **({deviation_name: stdev(values)} if len(values) > 1 else {}),
    }


def known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def length_metrics(completions: Sequence[Completion]) -> dict[str, float]:
    """TRL's metrics of lengths in tokens, end tokens included; those of the finished ones are 0 where there are
    none."""
    every = [len(one.token_ids) for one in completions]
    finished = [len(one.token_ids) for one in completions if one.finished]
    metrics = {"completions/clipped_ratio": 1 - len(finished) / len(every)}
    for name, lengths in (("length", every), ("terminated_length", finished or [0])):
        metrics |= {
            f"completions/mean_{name}": fmean(lengths),
            f"completions/min_{name}": float(min(lengths)),
            f"completions/max_{name}": float(max(lengths)),
        }
    return metrics
