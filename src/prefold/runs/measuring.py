"""Measuring a model on held-out data, before and after training, for each kind of method.

Pairs and unpaired completions are measured by their log-probs, prompts by the rewards of completions that are sampled
as in training, and a reward model by its scores of pairs.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefold import ranks
from prefold.algorithms.base import PAIRED, SAMPLED, SCORING, UNPAIRED, Kind
from prefold.data.examples import Examples, prompts_of
from prefold.data.preference import Message, Preference, Unpaired
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
from prefold.generation.engine import Engine, LocalEngine, answer
from prefold.generation.opening import open_model
from prefold.generation.sampling import Completion, Sampling
from prefold.generation.sequences import seed_of
from prefold.generation.servers import Servers
from prefold.generation.weights import fold_adapter
from prefold.models.adapters import load_start
from prefold.models.load import load_model
from prefold.models.tokenizer import tokenizer_of
from prefold.recipe import Model, RecipeBase
from prefold.rewards.scoring import Group, column_names, scored_groups
from prefold.runs.context import Run
from prefold.runs.opened import head_seed_of, loaded_rewards, scorer_of, served_folder
from prefold.terminal import progress_bar
from prefold.training.sampled_trees import sampling_of
from prefold.training.served import ServedEngine
from prefold.trees.attention import candidates, unwrapped
from prefold.trees.memory import free_memory
from prefold.trees.scorer import Scorer

Answers = list[list[Completion]]
OF_FILES = {"_name_or_path", "dtype", "transformers_version"}
"""Entries of a configuration that say where the weights come from and how they are stored."""
Comparison = tuple[dict[str, Any], list[dict[str, Any]] | None]
"""The content of the file in `evaluation/` that compares after with before, and the lines of `heldout.jsonl`."""


class Measuring(ABC):
    """How models are measured for one kind of method.

    `metric` is the entry of the comparison by which the runs of a sweep are ranked; `has_before` says whether the model
    before training can be measured.
    """

    metric: ClassVar[str] = "accuracy"
    has_before: ClassVar[bool] = True

    def __init__(self, run: Run, held_out: Examples, in_16_bits: bool = False):
        self.recipe, self.folder, self.held_out, self.in_16_bits = run.recipe, run.folder, held_out, in_16_bits
        self.prompts, self.given = evaluation_prompts(run.recipe, held_out)
        self._checked: tuple[Any, Scorer] | None = None
        self._rounding: dict[str, float] = {}

    def measure(self, section: Model, when: str) -> tuple[Any, Answers]:
        """The result on held-out data, and the answers to the prompts. The model is released afterwards."""
        recipe = self.recipe
        model, tokenizer = self.open(section), tokenizer_of(section)
        result, template = self.score(model, tokenizer, when), recipe.data.template
        sampling = Sampling.of(recipe.evaluate, recipe.evaluate.num_answers)
        engine = self.engine(model, tokenizer, when)
        answers = answer(
            model, tokenizer, self.prompts, sampling, f"answers {when}", None, template, self.given, engine
        )
        del model
        free_memory()
        return result, answers

    @property
    def keys(self) -> list[str]:
        """A key for each held-out pair or prompt, the same in every run."""
        return [key.hex() for key in self.held_out.record_keys]

    @property
    def texts(self) -> Iterator[dict[str, Any]]:
        """The pairs as they were read."""
        for record in self.held_out.records:
            assert isinstance(record, Preference)
            sides = {"chosen": list(record.chosen), "rejected": list(record.rejected)}
            yield {"row": str(record.origin), "prompt": list(record.prompt), **sides}

    def open(self, section: Model, load: Callable[..., PreTrainedModel] = load_start) -> PreTrainedModel:
        return open_model(section, "`evaluate`", measured=True, in_16_bits=self.in_16_bits, load=load)

    def engine(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, when: str) -> Engine:
        """What samples: the model, or servers that are given the same weights. Servers of a recipe in 4 or 8 bits have
        another base: what is measured has its weights unquantised."""
        recipe = self.recipe
        if not recipe.generation.by_servers or recipe.model.load_in_4bit or recipe.model.load_in_8bit:
            return LocalEngine(model, tokenizer)
        started_from = Path(recipe.model.adapter).expanduser() if recipe.model.adapter else None
        adapter = self.folder / "adapter" if when == "after" else started_from
        servers, folder = Servers(recipe.generation, tokenizer), served_folder(recipe)
        return ServedEngine(servers, model, tokenizer, adapter, folder, recipe.run_folder.name, self._rounding)

    def scorer(self, model: nn.Module) -> Scorer:
        """A scorer; of models with one configuration only the first is checked, as attention is the same in all."""
        base = unwrapped(model)
        settings = {name: value for name, value in base.config.to_dict().items() if name not in OF_FILES}
        kind = settings, candidates(base.device, base.dtype, base.config.get_text_config())
        if self._checked is None or self._checked[0] != kind:
            scorer = scorer_of(self.recipe, model, self.held_out)
            self._checked = kind, replace(scorer, model=nn.Identity())  # no model is kept
        return replace(self._checked[1], model=model)

    @abstractmethod
    def score(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, when: str) -> Any: ...

    @abstractmethod
    def compare(self, before: Any, after: Any) -> Comparison: ...


class PairsByLogprobs(Measuring):
    def score(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, when: str) -> PairScores | None:
        if not self.held_out:
            return None
        return score_pairs(self.scorer(model), self.held_out.trees, f"held-out pairs {when}")

    def compare(self, before: PairScores | None, after: PairScores | None) -> Comparison:
        if before is None or after is None:
            return {"pairs": 0}, None
        lines = by_pair(self.keys, self.texts, after.means, before.means)
        return compare_pairs(before, after, self.recipe.algorithm.reward_scale), lines


class MatchedPairs(PairsByLogprobs):
    """Unpaired completions, each desirable one matched with an undesirable one."""

    @property
    def matches(self) -> list[tuple[int, int]]:
        labels = [record.label for record in self.held_out.records if isinstance(record, Unpaired)]
        return match(self.held_out.prompt_keys, labels)

    @property
    def keys(self) -> list[str]:
        keys = super().keys
        return [f"{keys[desirable]}-{keys[undesirable]}" for desirable, undesirable in self.matches]

    @property
    def texts(self) -> Iterator[dict[str, Any]]:
        """The matched completions; prompts that differ are part of their completions."""
        records = self.held_out.records
        for indices in self.matches:
            first, second = (records[index] for index in indices)
            assert isinstance(first, Unpaired) and isinstance(second, Unpaired)
            shared = first.prompt if first.prompt == second.prompt else ()
            sides = (first, "chosen"), (second, "rejected")
            answers = {name: [*(() if shared else record.prompt), *record.completion] for record, name in sides}
            yield {"row": f"{first.origin}; {second.origin}", "prompt": list(shared), **answers}

    def score(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, when: str) -> PairScores | None:
        if not self.matches:
            return None
        return score_pairs(self.scorer(model), self.held_out.trees, f"held-out pairs {when}", self.matches)


class PromptsByRewards(Measuring):
    metric = "reward"

    @property
    def keys(self) -> list[str]:
        """The columns that rewards read are part of a prompt's key."""
        columns = (json.dumps(prompt.columns, sort_keys=True, default=str) for prompt in prompts_of(self.held_out))
        keys = zip(super().keys, columns, strict=True)
        return [blake2b(f"{key} {read}".encode(), digest_size=16).hexdigest() for key, read in keys]

    def score(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, when: str) -> list[Group]:
        """Rewards of one completion of each held-out prompt, sampled as in training."""
        recipe, held_out = self.recipe, self.held_out
        sampling = held_out_sampling(recipe)
        assert sampling is not None
        prompts = prompts_of(held_out)
        columns = column_names(prompts)
        rewards = loaded_rewards(recipe, columns) if prompts else []
        seeds = [seed_of(recipe.train.seed, index) for index in range(len(prompts))]
        ids = [tree.prompt for tree in held_out.trees]
        with progress_bar(f"held-out prompts {when}", len(prompts)) as advance, fold_adapter(model):
            completions = self.engine(model, tokenizer, when).sample(ids, replace(sampling, seed=0), seeds, advance)
        return ranks.from_first(lambda: scored_groups(rewards, prompts, completions, columns))

    def compare(self, before: Sequence[Group], after: Sequence[Group]) -> Comparison:
        return compare_rewards(before, after), by_prompt(self.keys, before, after)


class PairsByHead(PairsByLogprobs):
    """How well a trained score head tells held-out pairs apart. Before training there is no head to compare with."""

    has_before = False

    def measure(self, section: Model, when: str) -> tuple[PairScores | None, Answers]:
        if not self.held_out:
            return None, []
        model = self.open(section, partial(load_model, head_seed=head_seed_of(self.recipe)))
        scores = score_pairs(self.scorer(model), self.held_out.trees, "held-out pairs")
        del model
        free_memory()
        return scores, []

    def compare(self, before: PairScores | None, after: PairScores | None) -> Comparison:
        if after is None:
            return {"pairs": 0, "chance": {"accuracy": CHANCE}}, None
        return against_chance(after), by_pair(self.keys, self.texts, after.sums)


MEASURING: dict[Kind, type[Measuring]] = {
    PAIRED: PairsByLogprobs,
    UNPAIRED: MatchedPairs,
    SAMPLED: PromptsByRewards,
    SCORING: PairsByHead,
}


def evaluation_prompts(recipe: RecipeBase, held_out: Examples) -> tuple[list[list[Message]], list[dict[str, Any]]]:
    """The conversations to answer, and the further arguments of their template: those that the recipe names (without
    arguments), else the first distinct held-out prompts."""
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
    """How one completion of each held-out prompt is sampled: as in training; None for methods that do not sample."""
    draws = recipe.algorithm.draws
    return replace(sampling_of(draws), num_answers=1) if draws else None
