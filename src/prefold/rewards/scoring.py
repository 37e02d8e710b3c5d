"""Rewards: plain functions of named arguments that give every completion a number.

A reward is called with lists of equal length, each by its name, and takes those that it names (all of them with
`**kwargs`):

    prompts          the conversations, lists of {role, content}
    completions      the texts that answer them
    completion_ids   their token ids, where a model of this machine wrote them
    and the columns of the prompts' rows by their names, null where a row has no such column.

It returns one number for each completion, or None where it has nothing to say about it. What it returns is checked, and
a failure shows the completion that caused it and stops the run, or leaves that completion without a score where the
recipe says so (`on_error: skip`). It is never taken for 0.
"""

from __future__ import annotations

import inspect
import logging
import math
import textwrap
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefold.data.preference import Message, Prompt
from prefold.errors import StageError, UserError, json_type
from prefold.generation.sampling import Completion
from prefold.rewards.builtin import RewardFunction

_SHOWN_CHARACTERS = 160

logger = logging.getLogger("prefold")


@dataclass(frozen=True)
class LoadedReward:
    """A reward that is ready to be called; `file` is that of a user's own. With `on_error: skip` it says nothing about
    completions that it fails on."""

    name: str
    function: RewardFunction
    weight: float = 1.0
    file: str | None = None
    on_error: str = "stop"

    def takes(self, name: str) -> bool:
        """Whether the function is given the argument of that name."""
        parameters = inspect.signature(self.function).parameters
        return name in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())

    def __call__(self, arguments: Mapping[str, Any]) -> Sequence[float | None]:
        return self.function(**{name: value for name, value in arguments.items() if self.takes(name)})


@dataclass(frozen=True)
class Scores:
    """What a reward says about each completion, unweighted; and the indices of those that it failed on, about which it
    says nothing."""

    values: list[float | None]
    failed: frozenset[int] = frozenset()


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
        groups.append(Group(prompt, list(group), values, totals[start:stop], failed))
    return groups


def column_names(prompts: Iterable[Prompt]) -> list[str]:
    """Of the prompts' rows: what rewards can be given beside prompts and completions."""
    return list(dict.fromkeys(name for prompt in prompts for name in prompt.columns))


def names_of(rewards: Sequence[LoadedReward]) -> list[str]:
    """What to call rewards in records; the second of a name is `NAME-2`."""
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
    """What each reward says about the completions.

    Args:
        prompts: one for each completion; so are `ids` (None where they are not known) and every column.

    Raises:
        UserError: a user's function fails, or returns anything but a finite number or None for each completion, and
            is not to be skipped then.
        StageError: the same of a built-in reward.
    """
    arguments: dict[str, Any] = {**columns, "prompts": prompts, "completions": completions}
    if ids is not None:
        arguments["completion_ids"] = ids
    return [_scores(reward, arguments) for reward in rewards]


def weighted(rewards: Sequence[LoadedReward], scores: Sequence[Scores]) -> list[float | None]:
    """The weighted sum for each completion over the rewards that say something about it; None if none does."""
    totals: list[float | None] = []
    for values in zip(*(of_reward.values for of_reward in scores), strict=True):
        said = [reward.weight * value for reward, value in zip(rewards, values, strict=True) if value is not None]
        totals.append(math.fsum(said) if said else None)
    return totals


# ---- calling and checking ---------------------------------------------------------------------------------------


class _Refused(Exception):
    """A reward failed, or returned what cannot be used; `message` shows the completion at `index`, as far as one is to
    blame."""

    def __init__(
        self,
        reward: LoadedReward,
        what: str,
        arguments: Mapping[str, Any],
        index: int | None,
        error: Exception | None = None,
    ):
        lines = [f"the reward `{reward.name}` {what}"]
        if index is None:
            lines.append(f"  for {len(arguments['completions'])} completions together, though for none of them alone")
        elif index < len(arguments["completions"]):
            lines.append(f"  prompt: {_shortened(arguments['prompts'][index][-1]['content'])}")
            lines.append(f"  completion: {_shortened(arguments['completions'][index])}")
        self.message: UserError | StageError = StageError("\n".join(lines))
        if reward.file:
            path = Path(reward.file).expanduser().absolute()
            where = line_of(error, path, reward.file) if error else reward.file
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
    count = len(arguments["completions"])
    try:
        returned = reward(arguments)
    except (UserError, StageError):
        raise
    except Exception as error:
        raise _Refused(reward, f"failed: {summary_of(error)}", arguments, _failing(reward, arguments), error) from error
    if isinstance(returned, str | bytes | dict | set) or not hasattr(returned, "__len__"):
        raise _Refused(reward, f"returned {_kind(returned)}, not a list", arguments, 0)
    if len(returned) != count:
        raise _Refused(reward, f"returned {len(returned)} values for {count} completions", arguments, 0)
    return [_number(reward, value, arguments, index) for index, value in enumerate(returned)]


def _only(arguments: Mapping[str, Any], index: int) -> dict[str, Any]:
    return {name: values[index : index + 1] for name, values in arguments.items()}


def _failing(reward: LoadedReward, arguments: Mapping[str, Any]) -> int | None:
    """The first completion for which the reward fails by itself; None if it does for no single one."""
    for index in range(len(arguments["completions"])):
        try:
            reward(_only(arguments, index))
        except Exception:
            return index
    return None


def _number(reward: LoadedReward, value: Any, arguments: Mapping[str, Any], index: int) -> float | None:
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        shown = value if isinstance(value, float | int) else _kind(value)
        raise _Refused(reward, f"returned {shown}, not a finite number or None", arguments, index)
    return number


def _shortened(text: str) -> str:
    return repr(textwrap.shorten(text, _SHOWN_CHARACTERS, placeholder=" ..."))


def _kind(value: Any) -> str:
    known = value is None or isinstance(value, bool | int | float | str | list | dict)
    return json_type(value) if known else f"a {type(value).__name__}"


def summary_of(error: BaseException) -> str:
    reason = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__


def line_of(error: BaseException, path: Path, where: str) -> str:
    """The file and its line at which the error arose, as far as it can be told."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f"{where}, line {error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    return f"{where}, line {frames[-1].lineno}" if frames else where
