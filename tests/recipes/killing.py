"""A run in a process of its own, which SIGKILL ends at one of its file operations, or some time after it.

Processes are forked from a server that has torch and transformers imported already, so a run takes seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["prefold.runs.api", "datasets", "peft"])
CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
"""What Python reports of changes to files. Opening for reading is among them, which does no harm."""


def perform(values: dict[str, Any], cache: Path, operation: int, reached: Any, waits: bool) -> None:
    """The whole run, and then the number of its file operations beside its folder; or until it is killed."""
    os.environ |= {"PREFOLD_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    import prefold
    from prefold.recipe import make_recipe

    folder, operations = str(values["output_dir"]), 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal operations
        if event in CHANGES and str(arguments[0]).startswith(folder):
            operations += 1
            if operations == operation:
                reached.set() if waits else os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    prefold.run(make_recipe(values))
    counted = operations
    Path(folder).with_suffix(".operations").write_text(str(counted))


def run(values: dict[str, Any], cache: Path, operation: int = 0, delay: float = 0.0) -> int:
    """Run to the end, or kill the process so many seconds after that file operation; returns its exit code."""
    reached = CONTEXT.Event()
    process: BaseProcess = CONTEXT.Process(target=perform, args=(values, cache, operation, reached, delay > 0))
    process.start()
    if delay:
        reached.wait(timeout=600)
        time.sleep(delay)
        process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode
