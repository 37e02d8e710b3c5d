"""Groups: the completions of a prompt as token ids, and what the rewards say about them.

What a group is depends on the model, the prompt and the group's seed, and on nothing else that is sampled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefold.data.examples import Example
from prefold.data.preference import Prompt
from prefold.errors import UserError
from prefold.generation.engine import LocalEngine, end_tokens
from prefold.generation.sampling import Completion, Sampling
from prefold.generation.weights import fold_adapter
from prefold.rewards.functions import LoadedReward, score, weighted
from prefold.terminal import Advance


@dataclass(frozen=True)
class Group:
    """The completions of a prompt; for each of them what each reward says, by the reward's name, and their weighted sum
    (`rewards`), None where nothing is said. `failed`: how many of them a reward that may fail failed on."""

    prompt: Prompt
    completions: list[Completion]
    scores: dict[str, list[float | None]]
    rewards: list[float | None]
    failed: dict[str, int] = field(default_factory=dict)


def scored_groups(
    rewards: Sequence[LoadedReward],
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    columns: Sequence[str],
) -> list[Group]:
    """Have the rewards score the completions of each prompt, all in one call.

    Args:
        columns: of the prompts' rows, that the rewards are given; null where a row has no such column.

    Raises:
        UserError, StageError: as `score`.
    """
    rows = [(prompt, one) for prompt, group in zip(prompts, completions, strict=True) for one in group]
    found = score(
        rewards,
        [list(prompt.prompt) for prompt, _ in rows],
        [one.text for _, one in rows],
        [one.token_ids for _, one in rows],
        {name: [prompt.columns.get(name) for prompt, _ in rows] for name in columns},
    )
    by_name = dict(zip(names_of(rewards), found, strict=True))
    skipping = [name for name, reward in zip(by_name, rewards, strict=True) if reward.on_error == "skip"]
    totals = weighted(rewards, found)
    groups, stop = [], 0
    for prompt, completed in zip(prompts, completions, strict=True):
        start, stop = stop, stop + len(completed)
        places = range(start, stop)
        groups.append(
            Group(
                prompt,
                list(completed),
                {name: scores.values[start:stop] for name, scores in by_name.items()},
                totals[start:stop],
                {name: len(by_name[name].failed.intersection(places)) for name in skipping},
            )
        )
    return groups


def prompts_of(examples: Iterable[Example]) -> list[Prompt]:
    """The records of examples of a set of prompts."""
    return [example.record for example in examples if isinstance(example.record, Prompt)]


def names_of(rewards: Sequence[LoadedReward]) -> list[str]:
    """What to call rewards in records; the second of a name is `NAME-2`."""
    names = [reward.name for reward in rewards]
    before = [names[:place].count(name) for place, name in enumerate(names)]
    return [f"{name}-{earlier + 1}" if earlier else name for name, earlier in zip(names, before, strict=True)]


# ---- sampling ---------------------------------------------------------------------------------------------------


def require_end_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that a completion can end.

    Raises:
        UserError: neither model nor tokenizer names an end token.
    """
    if not end_tokens(model, tokenizer):
        raise UserError(
            "names no end token, so no completion would ever end",
            where=model.name_or_path or "model",
            expected="`eos_token_id` in generation_config.json, or an EOS token of the tokenizer",
            advice="name an instruct model in `model.name`",
        )


def sample(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[int, ...]],
    sampling: Sampling,
    seeds: Sequence[int],
    advance: Advance = lambda amount, text: None,
) -> list[list[Completion]]:
    """`sampling.num_answers` completions of each prompt, adapters folded in meanwhile where that is exact to undo.
    Several processes sample a share each, and all of them get everything.

    Args:
        seeds: one for each prompt, instead of that of `sampling`.
        advance: told of each prompt that is done.
    """
    with fold_adapter(model):
        return LocalEngine(model, tokenizer).sample(prompts, replace(sampling, seed=0), seeds, advance)
