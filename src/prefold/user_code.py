"""Calls of a user's code, which may raise anything or exit, and whose changes to the process's state are undone."""

from __future__ import annotations

import ast
import inspect
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch

T = TypeVar("T")


def _streams() -> tuple[Any, ...]:
    return sys.stdin, sys.stdout, sys.stderr


def _set_streams(streams: tuple[Any, ...]) -> None:
    sys.stdin, sys.stdout, sys.stderr = streams


STATE: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
    (os.getcwd, os.chdir),
    (sys.getrecursionlimit, sys.setrecursionlimit),
    (torch.get_default_dtype, torch.set_default_dtype),
    # Setting a default device, even the usual one, makes torch intercept every call from then on.
    (torch.get_default_device, lambda device: torch.set_default_device(None if device.type == "cpu" else device)),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (_streams, _set_streams),
)
"""State that is read before a call and restored after it. Not the random generators: prefold does not draw from their
states, and a reward that does continues with its own numbers when a run is resumed."""


class UserCodeFailed(Exception):
    """The code raised `error`, which may be any exception, `SystemExit` too."""

    def __init__(self, error: BaseException):
        super().__init__(str(type(error).__name__))
        self.error = error


def call_user_code(call: Callable[[], T]) -> T:
    """The result of the code.

    Raises:
        UserCodeFailed: it raised anything, or called `os._exit`.
        KeyboardInterrupt: Ctrl-C was pressed meanwhile, even if the code caught it.
    """
    with _CtrlC() as ctrl_c, _without_os_exit(), _state_kept():
        try:
            result = call()
        except BaseException as error:
            if not ctrl_c.raised:
                raise UserCodeFailed(error) from error
    if ctrl_c.raised:
        raise KeyboardInterrupt
    return result


@contextmanager
def _state_kept() -> Iterator[None]:
    before = [read() for read, _ in STATE]
    try:
        yield
    finally:
        for value, (read, restore) in zip(before, STATE, strict=True):
            try:
                changed = read() != value
            except OSError:  # the working directory is gone
                changed = True
            if changed:
                restore(value)


@contextmanager
def _without_os_exit() -> Iterator[None]:
    """While open, `os._exit` raises in this thread. In children and other threads it ends the process as usual."""
    exit_at_once, process, thread = os._exit, os.getpid(), threading.get_ident()

    def raising(status: int) -> NoReturn:
        if (os.getpid(), threading.get_ident()) == (process, thread):
            raise SystemExit(f"os._exit({status})")
        exit_at_once(status)

    os._exit = raising
    try:
        yield
    finally:
        os._exit = exit_at_once


class _CtrlC:
    """Distinguishes Ctrl-C from a KeyboardInterrupt that the code raises: whether the signal's handler `raised`."""

    raised = False

    def __enter__(self) -> _CtrlC:
        self.handler: Any = signal.getsignal(signal.SIGINT)
        self.wraps = callable(self.handler) and threading.current_thread() is threading.main_thread()
        if self.wraps:
            signal.signal(signal.SIGINT, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        if self.wraps:
            signal.signal(signal.SIGINT, self.handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.raised = True
        self.handler(number, frame)
        self.raised = False
        # Training's own handler restores the one before it, for a second Ctrl-C.
        if (handler := signal.getsignal(number)) != self._catch:
            self.handler = handler
            signal.signal(number, self._catch)


def files_of_code(file: Path) -> list[Path]:
    """A Python file, and those of its folder that it imports, directly or indirectly; empty if it does not exist.
    Imports in functions count, names that are computed do not."""
    files: list[Path] = []
    pending = [file]
    while pending:
        path = pending.pop()
        if path in files or not path.is_file():
            continue
        files.append(path)
        with suppress(OSError, SyntaxError, ValueError, IndexError):  # loading it will say so
            for node in ast.walk(ast.parse(path.read_bytes())):
                pending += _imported(node, file.parent, path)
    return files


def _imported(node: ast.AST, folder: Path, path: Path) -> list[Path]:
    """The files that an import statement in `path` may refer to, whether they exist or not."""
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        folder = path.parents[node.level - 1] if node.level else folder
        names = [f"{node.module or ''}.{alias.name}".strip(".") for alias in node.names]
    parts = [name.split(".")[: length + 1] for name in names for length in range(name.count(".") + 1)]
    modules = [folder.joinpath(*some) for some in parts]
    return [file for module in modules for file in (module / "__init__.py", module.with_name(f"{module.name}.py"))]


# ---- in words ---------------------------------------------------------------------------------------------------


def summary_of(error: BaseException) -> str:
    """Kind and first line of an error of the user's code."""
    try:
        reason = str(error).partition("\n")[0]
    except Exception:  # an exception of the user's own may fail to say what it is
        reason = ""
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__


def line_of(error: BaseException, path: Path, where: str) -> str:
    """The file and its line that raised the error, as far as that is known."""
    if isinstance(error, SyntaxError) and error.lineno and error.filename and Path(error.filename) == path:
        return f"{where}, line {error.lineno}"
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == str(path)]
    return f"{where}, line {lines[-1]}" if lines else where


def start_of(function: Callable[..., Any], path: Path, where: str) -> str:
    """The file and the line at which a function in it begins, as far as that is known."""
    code = getattr(inspect.unwrap(getattr(function, "func", function)), "__code__", None)
    return f"{where}, line {code.co_firstlineno}" if code and code.co_filename == str(path) else where
