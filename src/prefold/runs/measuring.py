"""What held-out data say of a model, before training and after it, for each kind of method.

Pairs and unpaired completions are measured by their log-probs, prompts by the rewards of completions that are sampled
as in training, and a model that gives scores by the scores of pairs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefold import ranks
from prefold.algorithms.base import PAIRED, SAMPLED, SCORING, UNPAIRED, Kind
from prefold.data.examples import Examples, prompts_of
from prefold.data.preference import Message, Unpaired
from prefold.evaluation.held_out_pairs import (
    CHANCE,
    PairScores,
    against_chance,
    by_pair,
    compare_pairs,
    match,
    score_pairs,
)
from prefold.evaluation.held_out_rewards import by_prompt, compare_rewards
from prefold.generation.engine import answer, sample
from prefold.generation.sampling import Completion, Sampling
from prefold.generation.sequences import seed_of
from prefold.models.adapters import load_start
from prefold.models.device import choose_device
from prefold.models.load import load_model, tokenizer_of
from prefold.recipe import Model, RecipeBase
from prefold.rewards.scoring import Group, column_names, scored_groups
from prefold.runs.context import Run, head_seed_of, loaded_rewards, scorer_of
from prefold.terminal import progress_bar
from prefold.training.sampled_trees import sampling_of
from prefold.trees.memory import free_memory

Answers = list[list[Completion]]
Comparison = tuple[dict[str, Any], list[dict[str, Any]] | None]
"""The content of the file in `evaluation/` that compares after with before, and the lines of `heldout.jsonl`."""


class Measuring(ABC):
    """How one kind of method has models measured.

    `metric` is what models are chosen by, in the file that compares them; `has_before` whether the model before
    training can be measured.
    """

    metric: ClassVar[str] = "accuracy"
    has_before: ClassVar[bool] = True

    def __init__(self, run: Run, held_out: Examples):
        self.recipe, self.held_out = run.recipe, held_out
        self.prompts, self.given = evaluation_prompts(run.recipe, held_out)

    def measure(self, section: Model, when: str) -> tuple[Any, Answers]:
        """What held-out data say of a model, and its answers. The model is released afterwards."""
        recipe = self.recipe
        model, tokenizer = load_start(section, dtype=measuring_dtype()), tokenizer_of(section)
        result, template = self.score(model, tokenizer, when), recipe.data.template
        sampling = Sampling.of(recipe.evaluate, recipe.evaluate.num_answers)
        answers = answer(model, tokenizer, self.prompts, sampling, f"answers {when}", None, template, self.given)
        del model
        free_memory()
        return result, answers

    @abstractmethod
    def score(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, when: str) -> Any: ...

    @abstractmethod
    def compare(self, before: Any, after: Any) -> Comparison: ...


class PairsByLogprobs(Measuring):
    def score(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, when: str) -> PairScores | None:
        if not self.held_out:
            return None
        return self.pair_scores(model, f"held-out pairs {when}")

    def pair_scores(self, model: nn.Module, label: str) -> PairScores | None:
        return score_pairs(scorer_of(self.recipe, model, self.held_out), self.held_out.trees, label)

    def compare(self, before: PairScores | None, after: PairScores | None) -> Comparison:
        if before is None or after is None:
            return {"pairs": 0}, None
        return compare_pairs(before, after, self.recipe.algorithm.reward_scale), by_pair(after.means, before.means)


class MatchedPairs(PairsByLogprobs):
    """Each desirable completion with an undesirable one."""

    def pair_scores(self, model: nn.Module, label: str) -> PairScores | None:
        labels = [record.label for record in self.held_out.records if isinstance(record, Unpaired)]
        matches = match(self.held_out.prompt_keys, labels)
        if not matches:
            return None
        return score_pairs(scorer_of(self.recipe, model, self.held_out), self.held_out.trees, label, matches)


class PromptsByRewards(Measuring):
    metric = "reward"

    def score(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, when: str) -> list[Group]:
        """Rewards of a completion of each held-out prompt, sampled as in training."""
        recipe, held_out = self.recipe, self.held_out
        drawn = held_out_sampling(recipe)
        assert drawn is not None
        prompts = prompts_of(held_out)
        columns = column_names(prompts)
        rewards = loaded_rewards(recipe, columns) if prompts else []
        seeds = [seed_of(recipe.train.seed, index) for index in range(len(prompts))]
        with progress_bar(f"held-out prompts {when}", len(prompts)) as advance:
            ids = [tree.prompt for tree in held_out.trees]
            completions = sample(model, tokenizer, ids, drawn, seeds, advance)
        return ranks.from_first(lambda: scored_groups(rewards, prompts, completions, columns))

    def compare(self, before: Sequence[Group], after: Sequence[Group]) -> Comparison:
        return compare_rewards(before, after), by_prompt(before, after)


class PairsByHead(PairsByLogprobs):
    """How well a trained head tells held-out pairs apart. Before training there was none to compare it with."""

    has_before = False

    def measure(self, section: Model, when: str) -> tuple[PairScores | None, Answers]:
        if not self.held_out:
            return None, []
        model = load_model(section, dtype=measuring_dtype(), head_seed=head_seed_of(self.recipe))
        scores = self.pair_scores(model, "held-out pairs")
        del model
        free_memory()
        return scores, []

    def compare(self, before: PairScores | None, after: PairScores | None) -> Comparison:
        if after is None:
            return {"pairs": 0, "chance": {"accuracy": CHANCE}}, None
        return against_chance(after), by_pair(after.sums)


MEASURING: dict[Kind, type[Measuring]] = {
    PAIRED: PairsByLogprobs,
    UNPAIRED: MatchedPairs,
    SAMPLED: PromptsByRewards,
    SCORING: PairsByHead,
}


def measuring_dtype() -> str | None:
    """On a CPU float32 costs little and keeps rounding out of the comparison."""
    return "float32" if choose_device().type == "cpu" else None


def evaluation_prompts(recipe: RecipeBase, held_out: Examples) -> tuple[list[list[Message]], list[dict[str, Any]]]:
    """The conversations to answer, and what their template is given beside them: those the recipe names, else the first
    different held-out prompts."""
    wanted = recipe.evaluate.prompts
    given: list[dict[str, Any]] = []
    if isinstance(wanted, list):
        prompts = [[Message(role="user", content=text)] for text in wanted]
    else:
        first = {key: index for index, key in reversed(list(enumerate(held_out.prompt_keys)))}
        records = [held_out.records[index] for index in sorted(first.values())[:wanted]]
        prompts, given = [list(record.prompt) for record in records], [record.template_kwargs for record in records]
    if recipe.evaluate.system is None:
        return prompts, given
    system = Message(role="system", content=recipe.evaluate.system)
    return [[system, *(message for message in prompt if message["role"] != "system")] for prompt in prompts], given


def held_out_sampling(recipe: RecipeBase) -> Sampling | None:
    """How a completion of each held-out prompt is drawn: as in training; None for methods that train on stored ones."""
    draws = recipe.algorithm.draws
    return replace(sampling_of(draws), num_answers=1) if draws else None
