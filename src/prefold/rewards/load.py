"""The rewards of a recipe or command, ready to be called: built-in ones, and functions of a user's Python file."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from prefold.errors import UserError, did_you_mean
from prefold.files import without_home
from prefold.recipe.rewards import BUILT_IN, RewardBase
from prefold.rewards.builtin import RewardFunction, exact_number, length, regex, repetition
from prefold.rewards.formulas import SymbolicEquality
from prefold.rewards.reward_model import RewardModel
from prefold.rewards.rubric import Rubric
from prefold.rewards.scoring import LoadedReward
from prefold.user_code import UserCodeFailed, call_user_code, line_of, summary_of

_FUNCTIONS: dict[str, Callable[[Any], RewardFunction]] = {
    "length": length,
    "regex": regex,
    "exact_number": exact_number,
    "repetition": repetition,
    "reward_model": RewardModel,
    "rubric": Rubric,
    "symbolic_equality": SymbolicEquality,
}
"""Called with the reward's settings, each returns the reward."""
_NEVER_NUMBERS: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (inspect.iscoroutinefunction, "is an async function, and nothing awaits it"),
    (inspect.isasyncgenfunction, "is an async generator, and nothing awaits it"),
    (inspect.isgeneratorfunction, "has a `yield`, so it returns a generator"),
    (inspect.isclass, "is a class"),
)
"""Callables that cannot return a list, with what is wrong with them."""
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_WITHOUT_IDS = "an endpoint gives texts only; `length` can count characters (`unit=characters`)"


def load_rewards(specs: Sequence[RewardBase], known: Collection[str]) -> list[LoadedReward]:
    """The rewards of a recipe or command.

    Args:
        known: the names of the available arguments: `prompts`, `completions`, `completion_ids` if token ids are known,
            and the columns.

    Raises:
        UserError: a file or function cannot be loaded, or a function needs an argument that is not available.
    """
    rewards = []
    for spec in specs:
        if spec.file is None:
            file, function = None, _FUNCTIONS[spec.name](BUILT_IN[spec.name](**spec.settings))
        else:
            file, function = without_home(spec.file), _function_in(spec.file, spec.name)
        rewards.append(LoadedReward(spec.name, function, spec.weight, file, spec.on_error))
    require_arguments(rewards, known)
    return rewards


def require_arguments(rewards: Sequence[LoadedReward], known: Collection[str], missing: str = "is not there") -> None:
    """Raises UserError: a reward needs an argument that is not `known`; `missing` says why it is not there."""
    for reward in rewards:
        _require_arguments(reward, known, missing)


def _function_in(file: str, name: str) -> RewardFunction:
    module = _module_of(Path(file).expanduser().absolute(), without_home(file))
    function = vars(module).get(name)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_"]
        raise UserError(
            f"there is no function `{name}` in it",
            where=without_home(file),
            expected=f"one of: {', '.join(functions)}" if functions else "",
            advice=did_you_mean(name, functions),
        )
    return function  # type: ignore[no-any-return]


def _module_of(path: Path, where: str) -> ModuleType:
    if not path.is_file():
        raise UserError("no such file", where=where, expected="a Python file with reward functions")
    spec = importlib.util.spec_from_file_location(f"prefold_rewards_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError("is not a Python file", where=where, expected="a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up the names in their annotations there
    loader = spec.loader
    try:
        call_user_code(lambda: loader.exec_module(module))
    except UserCodeFailed as failure:
        error = failure.error
        raise UserError(f"cannot be loaded: {summary_of(error)}", where=line_of(error, path, where)) from error
    return module


def _require_arguments(reward: LoadedReward, known: Collection[str], missing: str) -> None:
    where = f"{reward.file}, `{reward.name}`" if reward.file else f"reward `{reward.name}`"
    called = reward.function.func if isinstance(reward.function, partial) else reward.function
    for applies, what in _NEVER_NUMBERS:
        if applies(called) or applies(getattr(called, "__call__", None)):  # noqa: B004
            raise UserError(what, where=where, expected="a function (`def`) that returns a list of numbers")
    try:
        parameters = inspect.signature(reward.function).parameters.values()
    except Exception:
        raise UserError("its parameters cannot be read", where=where, expected="a function written in Python") from None
    for parameter in parameters:
        name = parameter.name
        if parameter.default is parameter.empty and parameter.kind in _BY_NAME and name not in known:
            raise UserError(
                f"needs `{name}`, which {missing}",
                where=where,
                expected=f"only names of {', '.join(known)}",
                advice=_WITHOUT_IDS if name == "completion_ids" else did_you_mean(name, known),
            )
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise UserError(f"`{name}` cannot be given by its name", where=where, advice="remove the `/`")
    if not any(map(reward.takes, known)):
        expected = f"parameters with names of {', '.join(known)}"
        raise UserError("takes none of the arguments of rewards", where=where, expected=expected)
