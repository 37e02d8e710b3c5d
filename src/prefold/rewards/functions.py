"""Rewards: plain functions of named arguments that give every completion a number.

A reward is called with lists of equal length, each by its name, and takes those that it names (all of them with
`**kwargs`):

    prompts          the conversations, lists of {role, content}
    completions      the texts that answer them
    completion_ids   their token ids, where a model of this machine wrote them
    and the columns of the prompts' rows by their names, null where a row has no such column.

It returns one number for each completion, or None where it has nothing to say about it. A built-in reward is a
dataclass whose fields are its settings; one of the user's own is a function in a Python file that the recipe or the
command names. What a reward returns is checked, and a failure shows the completion that caused it and stops the run, or
leaves that completion without a score where the recipe says so (`on_error: skip`). It is never taken for 0.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import logging
import math
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from prefold.data.preference import Message, json_type
from prefold.errors import StageError, UserError
from prefold.files import without_home
from prefold.rewards.formulas import SymbolicEquality
from prefold.rewards.reward_model import RewardModel

if TYPE_CHECKING:
    from prefold.recipe import RewardBase

RewardFunction = Callable[..., Sequence[float | None]]
OnError = Literal["stop", "skip"]
_SHOWN_CHARACTERS = 160

logger = logging.getLogger("prefold")


# ---- built-in rewards -------------------------------------------------------------------------------------------


class _Settings:
    """What the schema of recipes says about a setting is the docstring below it."""

    __pydantic_config__: ClassVar[Any] = {"use_attribute_docstrings": True}


@dataclass(frozen=True)
class Length(_Settings):
    """-|target - length|: 0 for a completion of exactly that length, one less for each token (character) off it."""

    target: int
    """The wanted length."""
    unit: Literal["tokens", "characters"] = "tokens"
    """What `target` counts."""

    def __post_init__(self) -> None:
        if self.target < 0:
            raise ValueError("`target` must be 0 or more")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("completion_ids",) if self.unit == "tokens" else ()

    def __call__(
        self, completions: Sequence[str], completion_ids: Sequence[Sequence[int]] | None = None
    ) -> list[float | None]:
        counted = completion_ids if self.unit == "tokens" and completion_ids is not None else completions
        return [-float(abs(self.target - len(one))) for one in counted]


@dataclass(frozen=True)
class Regex(_Settings):
    """1 where the pattern is found anywhere in the completion, else 0."""

    pattern: str
    """A regular expression of Python's `re`; `(?s)` at its start lets a dot match a new line."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"`pattern` is not a regular expression: {error}") from None

    def __call__(self, completions: Sequence[str]) -> list[float | None]:
        return [float(re.search(self.pattern, completion) is not None) for completion in completions]


@dataclass(frozen=True)
class ExactNumber(_Settings):
    """1 where the completion's number is that of the column `answer`, else 0; None where the answer has no number.

    The number of a text is the one after its last `####` if there is one, else its last number. $, % and the commas of
    thousands are passed over, so `$1,250.00` is 1250 and `5%` is 5.
    """

    def __call__(self, completions: Sequence[str], answer: Sequence[Any]) -> list[float | None]:
        right = [number_in(str(value)) for value in answer]
        return [
            None if wanted is None else float(number_in(completion) == wanted)
            for completion, wanted in zip(completions, right, strict=True)
        ]


@dataclass(frozen=True)
class Repetition(_Settings):
    """-(share of the runs of words that were there before): 0 where all of them differ, near -1 where one repeats."""

    ngram_size: int = 3
    """Words of a run."""

    def __post_init__(self) -> None:
        if self.ngram_size < 1:
            raise ValueError("`ngram_size` must be 1 or more")

    def __call__(self, completions: Sequence[str]) -> list[float | None]:
        return [-self._repeated(completion.lower().split()) for completion in completions]

    def _repeated(self, words: list[str]) -> float:
        runs = [tuple(words[place : place + self.ngram_size]) for place in range(len(words) - self.ngram_size + 1)]
        return 1 - len(set(runs)) / len(runs) if runs else 0.0


REWARDS: dict[str, type[Any]] = {
    "length": Length,
    "regex": Regex,
    "exact_number": ExactNumber,
    "repetition": Repetition,
    "reward_model": RewardModel,
    "symbolic_equality": SymbolicEquality,
}


def settings_of(name: str) -> dict[str, bool]:
    """The settings of a built-in reward, and whether each must be given.

    Raises:
        ValueError: there is no such reward.
    """
    if name not in REWARDS:
        near = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(REWARDS)}"
        raise ValueError(f"`{name}` is not a built-in reward ({hint}); a function of your own needs its `file`")
    return {field.name: field.default is MISSING for field in fields(REWARDS[name])}


# ---- numbers in texts -------------------------------------------------------------------------------------------

# A minus behind a word, number or bracket stands between two things; digits behind a letter belong to a word (CO2).
_NUMBER = re.compile(
    r"((?<![\w)\]])[-+\u2212])?(?:\$\s?([-+\u2212])?)?"
    r"((?<![A-Za-z0-9_])(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
    r"([eE][-+]?[0-9]{1,3}(?![0-9]))?"
)


def number_in(text: str) -> Decimal | None:
    """The number after the last `####` if there is one, else the last number; None if there is none."""
    marked = _numbers(text.rpartition("####")[2]) if "####" in text else []
    numbers = marked[:1] or _numbers(text)
    return numbers[-1] if numbers else None


def _numbers(text: str) -> list[Decimal]:
    return [
        Decimal(("-" if before in _MINUS or behind in _MINUS else "") + digits.replace(",", "") + exponent)
        for before, behind, digits, exponent in _NUMBER.findall(text)
    ]


_MINUS = ("-", "\u2212")


# ---- opening ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadedReward:
    """A reward that is ready to be called; `file` is that of a user's own. With `on_error: skip` it says nothing about
    completions that it fails on."""

    name: str
    function: RewardFunction
    weight: float = 1.0
    file: str | None = None
    on_error: OnError = "stop"

    def takes(self, name: str) -> bool:
        """Whether the function is given the argument of that name."""
        parameters = inspect.signature(self.function).parameters
        return name in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())

    def __call__(self, arguments: Mapping[str, Any]) -> Sequence[float | None]:
        return self.function(**{name: value for name, value in arguments.items() if self.takes(name)})


def open_rewards(specs: Sequence[RewardBase], known: Collection[str]) -> list[LoadedReward]:
    """The rewards of a recipe or command.

    Args:
        known: the names of the arguments that they can be given: `prompts`, `completions`, perhaps
            `completion_ids`, and the columns.

    Raises:
        UserError: a file or function cannot be loaded, or asks for an argument that is not known.
    """
    rewards = [_opened(spec) for spec in specs]
    for reward in rewards:
        _check_arguments(reward, known)
    return rewards


def _opened(spec: RewardBase) -> LoadedReward:
    if spec.file is None:
        return LoadedReward(spec.name, REWARDS[spec.name](**spec.settings), spec.weight, on_error=spec.on_error)
    function = _function_in(spec.file, spec.name)
    return LoadedReward(spec.name, function, spec.weight, without_home(spec.file), spec.on_error)


def _function_in(file: str, name: str) -> RewardFunction:
    path, where = Path(file).expanduser().absolute(), without_home(file)
    if not path.is_file():
        raise UserError("no such file", where=where, expected="a Python file with reward functions")
    spec = importlib.util.spec_from_file_location(f"prefold_rewards_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError("is not a Python file", where=where, expected="a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the names of their annotations
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"cannot be loaded: {_told(error)}", where=_line_in(error, path, where)) from error
    functions = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
    function = getattr(module, name, None)
    if not callable(function):
        near = difflib.get_close_matches(name, functions, n=1)
        raise UserError(
            f"there is no function `{name}` in it",
            where=where,
            expected=f"one of: {', '.join(functions)}" if functions else "",
            advice=f"did you mean `{near[0]}`?" if near else "",
        )
    return function  # type: ignore[no-any-return]


def _check_arguments(reward: LoadedReward, known: Collection[str]) -> None:
    where = f"{reward.file}, `{reward.name}`" if reward.file else f"reward `{reward.name}`"
    try:
        parameters = inspect.signature(reward.function).parameters.values()
    except (TypeError, ValueError):
        raise UserError("its parameters cannot be told", where=where, expected="a function written in Python") from None
    named = [one.name for one in parameters if one.default is one.empty and one.kind in _BY_NAME]
    for name in (*named, *getattr(reward.function, "needs", ())):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UserError(
                f"needs `{name}`, which is not there",
                where=where,
                expected=f"only names of {', '.join(known)}",
                advice=_WITHOUT.get(name) or (f"did you mean `{near[0]}`?" if near else ""),
            )
    if unnamed := [one.name for one in parameters if one.kind is one.POSITIONAL_ONLY]:
        raise UserError(f"`{unnamed[0]}` cannot be given by its name", where=where, advice="remove the `/`")


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_WITHOUT = {"completion_ids": "an endpoint gives texts only; `length` can count characters (`unit=characters`)"}


# ---- scoring ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """What a reward says about each completion, unweighted; and the places of those that it failed on, about which it
    says nothing."""

    values: list[float | None]
    failed: frozenset[int] = frozenset()


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
    for of_one in zip(*(one.values for one in scores), strict=True):
        said = [reward.weight * value for reward, value in zip(rewards, of_one, strict=True) if value is not None]
        totals.append(math.fsum(said) if said else None)
    return totals


class _Refused(Exception):
    """A reward failed, or returned what cannot be used; `message` is what to tell."""

    def __init__(self, message: UserError | StageError):
        self.message = message


def _scores(reward: LoadedReward, arguments: Mapping[str, Any]) -> Scores:
    try:
        return Scores(_called(reward, arguments))
    except _Refused as refused:
        if reward.on_error == "stop":
            raise refused.message from refused.__cause__
        told = str(refused.message)
    return _one_by_one(reward, arguments, told)


def _one_by_one(reward: LoadedReward, arguments: Mapping[str, Any], told: str) -> Scores:
    """Each completion by itself; `told` is what was wrong with them together."""
    count = len(arguments["completions"])
    values: list[float | None] = []
    failed: list[int] = []
    for place in range(count):
        try:
            values += _called(reward, {name: column[place : place + 1] for name, column in arguments.items()})
        except _Refused:
            values.append(None)
            failed.append(place)
    logger.warning("%s\n  skipped: %s of %s completions get no score of it", told, len(failed), count)
    return Scores(values, frozenset(failed))


def _called(reward: LoadedReward, arguments: Mapping[str, Any]) -> list[float | None]:
    count = len(arguments["completions"])
    try:
        returned = reward(arguments)
    except (UserError, StageError):
        raise
    except Exception as error:
        place = _failing(reward, arguments)
        raise _refused(reward, f"failed: {_told(error)}", arguments, place, error) from error
    if isinstance(returned, str | bytes | dict | set) or not hasattr(returned, "__len__"):
        raise _refused(reward, f"returned {_kind(returned)}, not a list", arguments, 0)
    if len(returned) != count:
        raise _refused(reward, f"returned {len(returned)} values for {count} completions", arguments, 0)
    return [_checked(reward, value, arguments, place) for place, value in enumerate(returned)]


def _failing(reward: LoadedReward, arguments: Mapping[str, Any]) -> int | None:
    """The place of the first completion for which the reward fails by itself; None if it does for no single one."""
    for place in range(len(arguments["completions"])):
        try:
            reward({name: values[place : place + 1] for name, values in arguments.items()})
        except Exception:
            return place
    return None


def _checked(reward: LoadedReward, value: Any, arguments: Mapping[str, Any], place: int) -> float | None:
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        shown = value if isinstance(value, float | int) else _kind(value)
        raise _refused(reward, f"returned {shown}, not a finite number or None", arguments, place)
    return number


def _refused(
    reward: LoadedReward,
    what: str,
    arguments: Mapping[str, Any],
    place: int | None,
    error: Exception | None = None,
) -> _Refused:
    """With the message that shows the completion at `place`, as far as one is to blame."""
    where = reward.file or ""
    if error is not None and reward.file:
        where = _line_in(error, Path(reward.file).expanduser().absolute(), reward.file)
    lines = [f"the reward `{reward.name}` {what}"]
    if place is None:
        lines.append(f"  for {len(arguments['completions'])} completions together, though for none of them alone")
    elif place < len(arguments["completions"]):
        lines.append(f"  prompt: {_shortened(arguments['prompts'][place][-1]['content'])}")
        lines.append(f"  completion: {_shortened(arguments['completions'][place])}")
    message = "\n".join(lines)
    return _Refused(UserError(message, where=where) if reward.file else StageError(message))


def _shortened(text: str) -> str:
    return repr(textwrap.shorten(text, _SHOWN_CHARACTERS, placeholder=" ..."))


def _told(error: BaseException) -> str:
    reason = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__


def _line_in(error: BaseException, path: Path, where: str) -> str:
    """The file and its line at which the error arose, as far as it can be told."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f"{where}, line {error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    return f"{where}, line {frames[-1].lineno}" if frames else where


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float | str | list | dict):
        return json_type(value)
    return f"a {type(value).__name__}"
