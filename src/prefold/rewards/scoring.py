"""Rewards: plain functions of named arguments that give every completion a number.

A reward is called with lists of equal length as keyword arguments, of which it gets those that its signature names (all
of them with `**kwargs`):

    prompts          the conversations, lists of {role, content}
    completions      the texts that answer them
    completion_ids   their token ids, where they are known
    and the columns of the prompts' rows by their names, None where a row has no such column.

It returns one number for each completion, or None where it has nothing to say about it. What it returns is checked. A
failure shows the completion that caused it and stops the run, or, with `on_error: skip`, leaves that completion without
a score. It is never taken for 0.
"""

from __future__ import annotations

import inspect
import logging
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence, Set
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from prefold.data.preference import Message, Prompt
from prefold.errors import StageError, UserError, json_type
from prefold.generation.sampling import Completion
from prefold.rewards.builtin import RewardFunction
from prefold.user_code import UserCodeFailed, call_user_code, line_of, start_of, summary_of

_SHOWN_CHARACTERS = 160

logger = logging.getLogger("prefold")


@dataclass(frozen=True)
class LoadedReward:
    """A reward that is ready to be called. `file`: where a user's own function is from; None for a built-in reward.
    `on_error`: see `RewardBase`."""

    name: str
    function: RewardFunction
    weight: float = 1.0
    file: str | None = None
    on_error: str = "stop"

    def takes(self, name: str) -> bool:
        """Whether the function takes an argument of that name."""
        parameters = inspect.signature(self.function).parameters
        return name in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())

    def __call__(self, arguments: Mapping[str, Any]) -> list[float | None]:
        """A number, or None, for each completion.

        Raises:
            UserCodeFailed: the user's function fails, or returns anything else (`error` is a NotNumbers then).
            NotNumbers: a built-in reward returns anything else.
        """
        given = {name: values for name, values in arguments.items() if self.takes(name)}
        count = len(arguments["completions"])
        if self.file is None:
            return _numbers(self.function(**given), count)
        # Copies, so that what it changes in them is neither trained on nor seen by the next reward.
        copies = {name: [deepcopy(value) for value in values] for name, values in given.items()}
        return call_user_code(lambda: _numbers(self.function(**copies), count))


@dataclass(frozen=True)
class Scores:
    """The unweighted scores of a reward, one for each completion, None where it has nothing to say; `failed`: the
    indices of the completions that it failed on, whose scores are None too."""

    values: list[float | None]
    failed: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Group:
    """The completions of a prompt. `scores`: by the name of a reward, its score for each completion; `rewards`: the
    weighted sum of these for each completion; None where there is no score. `failed`: by the name of a reward with
    `on_error: skip`, how many completions it failed on; `cost`: see `costs_of`."""

    prompt: Prompt
    completions: list[Completion]
    scores: dict[str, list[float | None]]
    rewards: list[float | None]
    failed: dict[str, int] = field(default_factory=dict)
    cost: dict[str, dict[str, int]] = field(default_factory=dict)


def scored_groups(
    rewards: Sequence[LoadedReward],
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    columns: Sequence[str],
) -> list[Group]:
    """Score the completions of all prompts, in one call of each reward.

    Args:
        columns: names of the columns of the prompts' rows that the rewards are given.

    Raises:
        UserError, StageError: as `score`.
    """
    rows = [(prompt, completion) for prompt, group in zip(prompts, completions, strict=True) for completion in group]
    scores = score(
        rewards,
        [list(prompt.prompt) for prompt, _ in rows],
        [completion.text for _, completion in rows],
        [completion.token_ids for _, completion in rows],
        {name: [prompt.columns.get(name) for prompt, _ in rows] for name in columns},
    )
    by_name = dict(zip(names_of(rewards), scores, strict=True))
    skipping = [name for name, reward in zip(by_name, rewards, strict=True) if reward.on_error == "skip"]
    totals = weighted(rewards, scores)
    groups, stop = [], 0
    for prompt, group in zip(prompts, completions, strict=True):
        start, stop = stop, stop + len(group)
        values = {name: of_reward.values[start:stop] for name, of_reward in by_name.items()}
        failed = {name: len(by_name[name].failed.intersection(range(start, stop))) for name in skipping}
        cost = costs_of(rewards, [(prompt, completion.text) for completion in group])
        groups.append(Group(prompt, list(group), values, totals[start:stop], failed, cost))
    return groups


def costs_of(rewards: Sequence[LoadedReward], rows: Sequence[tuple[Prompt, str]]) -> dict[str, dict[str, int]]:
    """What the scores of prompts with their completions have cost, in this run or an earlier one, by the names of the
    rewards that ask an endpoint: requests (`calls`), `prompt_tokens` and `completion_tokens`."""
    prompts, texts = [list(prompt.prompt) for prompt, _ in rows], [text for _, text in rows]
    counting = {
        name: getattr(reward.function, "cost", None)
        for name, reward in zip(names_of(rewards), rewards, strict=True)
        if reward.file is None
    }
    return {name: cost(prompts, texts) for name, cost in counting.items() if cost}


def column_names(prompts: Iterable[Prompt]) -> list[str]:
    """All columns of the prompts' rows."""
    return list(dict.fromkeys(name for prompt in prompts for name in prompt.columns))


def names_of(rewards: Sequence[LoadedReward]) -> list[str]:
    """The names of rewards in records; the second reward of the same name is `NAME-2`."""
    names = [reward.name for reward in rewards]
    earlier = [names[:index].count(name) for index, name in enumerate(names)]
    return [f"{name}-{count + 1}" if count else name for name, count in zip(names, earlier, strict=True)]


def score(
    rewards: Sequence[LoadedReward],
    prompts: Sequence[Sequence[Message]],
    completions: Sequence[str],
    ids: Sequence[Sequence[int]] | None,
    columns: Mapping[str, Sequence[Any]],
) -> list[Scores]:
    """The scores of each reward for the completions.

    Args:
        prompts: one for each completion, as are `ids` and every column.
        ids: the completions' token ids; None if they are not known.

    Raises:
        UserError: a user's function without `on_error: skip` fails, or returns anything but a finite number or None
            for each completion.
        StageError: a built-in reward does.
    """
    arguments: dict[str, Any] = {**columns, "prompts": prompts, "completions": completions}
    if ids is not None:
        arguments["completion_ids"] = ids
    return [_scores(reward, arguments) for reward in rewards]


def weighted(rewards: Sequence[LoadedReward], scores: Sequence[Scores]) -> list[float | None]:
    """The weighted sum of the scores of each completion; None if no reward gave it a score."""
    totals: list[float | None] = []
    for values in zip(*(of_reward.values for of_reward in scores), strict=True):
        terms = [reward.weight * value for reward, value in zip(rewards, values, strict=True) if value is not None]
        totals.append(math.fsum(terms) if terms else None)
    return totals


# ---- calling and checking ---------------------------------------------------------------------------------------


class NotNumbers(Exception):
    """What a reward returned cannot be used; `index` is that of the completion to show."""

    def __init__(self, what: str, index: int = 0):
        super().__init__(what)
        self.index = index


class _Refused(Exception):
    """A reward failed, or returned what cannot be used; `message` shows the completion that caused it, if a single one
    did."""

    def __init__(self, reward: LoadedReward, arguments: Mapping[str, Any], error: BaseException):
        returned = isinstance(error, NotNumbers)
        index = error.index if isinstance(error, NotNumbers) else _failing(reward, arguments)
        lines = [f"the reward `{reward.name}` {error if returned else f'failed: {summary_of(error)}'}"]
        if index is None:
            lines.append(f"  for {len(arguments['completions'])} completions together, though for none of them alone")
        elif index < len(arguments["completions"]):
            lines.append(f"  prompt: {_shortened(arguments['prompts'][index][-1]['content'])}")
            lines.append(f"  completion: {_shortened(arguments['completions'][index])}")
        self.message: UserError | StageError = StageError("\n".join(lines))
        if reward.file:
            path = Path(reward.file).expanduser().absolute()
            where = start_of(reward.function, path, reward.file) if returned else line_of(error, path, reward.file)
            self.message = UserError("\n".join(lines), where=where)


def _scores(reward: LoadedReward, arguments: Mapping[str, Any]) -> Scores:
    try:
        return Scores(_call(reward, arguments))
    except _Refused as refused:
        if reward.on_error == "stop":
            raise refused.message from refused.__cause__
        message = str(refused.message)
    count = len(arguments["completions"])
    values: list[float | None] = []
    failed: list[int] = []
    for index in range(count):
        try:
            values += _call(reward, _only(arguments, index))
        except _Refused:
            values.append(None)
            failed.append(index)
    logger.warning("%s\n  skipped: %s of %s completions get no score of it", message, len(failed), count)
    return Scores(values, frozenset(failed))


def _call(reward: LoadedReward, arguments: Mapping[str, Any]) -> list[float | None]:
    try:
        return reward(arguments)
    except UserCodeFailed as failure:
        raise _Refused(reward, arguments, failure.error) from failure.error
    except (UserError, StageError):
        raise
    except Exception as error:
        raise _Refused(reward, arguments, error) from error


def _only(arguments: Mapping[str, Any], index: int) -> dict[str, Any]:
    return {name: values[index : index + 1] for name, values in arguments.items()}


def _failing(reward: LoadedReward, arguments: Mapping[str, Any]) -> int | None:
    """The index of the first completion for which the reward fails if called with it alone; None if there is none."""
    for index in range(len(arguments["completions"])):
        try:
            reward(_only(arguments, index))
        except Exception:
            return index
    return None


def _numbers(returned: Any, count: int) -> list[float | None]:
    """`returned` as a list. Raises NotNumbers: it is no sequence with a finite number or None for each completion."""
    if inspect.iscoroutine(returned):
        returned.close()  # else Python warns that nothing awaits it
    is_other = isinstance(returned, str | bytes | Mapping | Set) or not hasattr(returned, "__len__")
    if is_other or getattr(returned, "ndim", 1) == 0:
        raise NotNumbers(f"returned {_kind(returned)}, not a list")
    values = list(islice(returned, len(returned)))
    if len(values) != count:
        raise NotNumbers(f"returned {len(values)} values for {count} completions")
    return [_number(value, index) for index, value in enumerate(values)]


def _number(value: Any, index: int) -> float | None:
    if value is None:
        return None
    number: float | None = None
    # A row of a matrix is no number, even if it has a single element.
    if not isinstance(value, str | bytes) and not getattr(value, "ndim", 0):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        except (TypeError, ValueError):
            number = None
    if number is None or not math.isfinite(number):
        shown = _kind(value) if number is None else number
        raise NotNumbers(f"returned {shown}, not a finite number or None", index)
    return number


def _shortened(text: str) -> str:
    return repr(textwrap.shorten(text, _SHOWN_CHARACTERS, placeholder=" ..."))


def _kind(value: Any) -> str:
    name = type(value).__name__
    known = value is None or type(value) in (bool, int, float, str, list, dict)
    return json_type(value) if known else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
