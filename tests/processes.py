"""Two processes, or more, for tests that do together what they are told, job after job: starting them takes seconds.

`serve` runs in each of them. Its jobs are the functions below it, by name.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.tensor import DTensor

import prefold
from prefold import ranks
from prefold.launch import environment, free_port
from prefold.recipe import RecipeBase

PATIENCE = 120.0
"""Seconds that a job may take before the processes are taken to be waiting for one another."""


class Pair:
    def __init__(self, number: int = 2, of_a_machine: int = 2) -> None:
        """`of_a_machine`: how many of them take themselves to be on the same machine."""
        port = free_port()
        self.processes, self.lines = [], []
        context = multiprocessing.get_context("spawn")
        for rank in range(number):
            here, there = context.Pipe()
            settings = {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(of_a_machine)}
            with patch.dict(os.environ, {**environment(rank, number, port), **settings}):
                process = context.Process(target=serve, args=(there,), daemon=True)
                process.start()
            self.processes.append(process)
            self.lines.append(here)

    def do(self, job: str, *args: Any, **settings: Any) -> list[Any]:
        """What the job returns in each of the processes."""
        for line in self.lines:
            line.send((job, args, settings, os.environ["PREFOLD_CACHE"]))
        answers = []
        for line in self.lines:
            if not line.poll(PATIENCE):
                raise TimeoutError(f"`{job}` hangs")
            answers.append(line.recv())
        for error in (answer for answer in answers if isinstance(answer, BaseException)):
            raise error
        return answers

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def serve(line: Connection) -> None:
    ranks.join()
    torch.set_num_threads(1)
    modules = 0
    while True:
        job, args, settings, cache = line.recv()
        if len(sys.modules) > modules + 50:
            # As in conftest.py: a run collects garbage several times.
            gc.collect()
            gc.freeze()
            modules = len(sys.modules)
        os.environ["PREFOLD_CACHE"] = cache
        try:
            line.send(JOBS[job](*args, **settings))
        except Exception as error:
            line.send(error)


# ---- jobs -------------------------------------------------------------------------------------------------------


def run(recipe: RecipeBase, row_tokens: int = 4096) -> None:
    """`row_tokens`: what is read at once for a task."""
    from prefold.trees import reader

    with patch.dict(reader.ROW_TOKENS, {"cpu": row_tokens}):
        prefold.run(recipe)


def train(recipe: RecipeBase, stop: int | None = None, room: tuple[int, int] | None = None) -> list[int]:
    """Train, up to a step if there is a `stop`. `room`: a process and the tokens that a row of its may have before its
    memory runs out. Returns the sizes of the rows that were tried."""
    tried: list[int] = []
    with ExitStack() as stack:
        if stop is not None:
            stack.enter_context(stopping_at(stop))
        if room is not None:
            stack.enter_context(short_of_memory(*room, tried))
        try:
            prefold.train(recipe)
        except KeyboardInterrupt:
            assert stop is not None
    return tried


def shards(recipe: RecipeBase) -> dict[str, tuple[list[int], list[int]]]:
    """Train; returns whole and own shape of every weight that is sharded at the last step."""
    from prefold.training.loop import TrainingLoop

    step, found = TrainingLoop.compute_gradients, {}

    def looking(self: TrainingLoop, batch: Any) -> Any:
        result = step(self, batch)
        for name, weight in self.model.named_parameters():
            if isinstance(weight, DTensor):
                found[name] = (list(weight.shape), list(weight.to_local().shape))
        return result

    with patch.object(TrainingLoop, "compute_gradients", looking):
        prefold.train(recipe)
    return found


def reckoned(recipe: RecipeBase) -> int:
    """Bytes of sharded weights that `max_tokens: auto` would reckon with on a GPU."""
    from prefold.models.load import load_model
    from prefold.trees import memory

    model = load_model(recipe.model, shards=2)
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"), config=model.config, parameters=model.parameters)
    with (
        patch.object(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=0)),
        patch.object(memory, "budget_for", lambda config, weights, *others: weights),
    ):
        return memory.auto_max_tokens(on_gpu, False)


def interrupted(recipe: RecipeBase, rank: int, step: int) -> str:
    """Train; one of the processes gets Ctrl-C in a step. Returns what ended this one."""
    from prefold.training.loop import TrainingLoop

    take = TrainingLoop.step

    def signalled(self: TrainingLoop) -> None:
        if self.state.global_step == step - 1 and ranks.rank() == rank:
            signal.raise_signal(signal.SIGINT)
        take(self)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have it ignored in the background
    with patch.object(TrainingLoop, "step", signalled):
        try:
            prefold.train(recipe)
        except KeyboardInterrupt:
            return "Ctrl-C"
        finally:
            signal.signal(signal.SIGINT, before)
    return "nothing"


def measured(recipe: RecipeBase) -> list[dict[str, float]]:
    """Train; returns what this process has measured on the held-out data."""
    from prefold.training.loop import TrainingLoop

    measure, found = TrainingLoop.measure, []

    def looking(self: TrainingLoop, held_out: Any) -> dict[str, float]:
        found.append(measure(self, held_out))
        return found[-1]

    with patch.object(TrainingLoop, "measure", looking):
        prefold.train(recipe)
    return found


def guarded(recipe: RecipeBase) -> None:
    """Train; the third step gives NaN in the second process alone, unless the rate was lowered before."""
    from prefold.training.loop import TrainingLoop

    loss_of = TrainingLoop.loss_of

    def broken(self: TrainingLoop, *args: Any) -> Any:
        output = loss_of(self, *args)
        if ranks.rank() == 1 and self.state.global_step == 2 and self.guards.rate(3) == 1:
            return replace(output, loss={unit: total * float("nan") for unit, total in output.loss.items()})
        return output

    with patch.object(TrainingLoop, "loss_of", broken):
        prefold.train(recipe)


JOBS: dict[str, Callable[..., Any]] = {
    "run": run,
    "train": train,
    "shards": shards,
    "reckoned": reckoned,
    "interrupted": interrupted,
    "measured": measured,
    "guarded": guarded,
}


@contextmanager
def stopping_at(stop: int) -> Iterator[None]:
    from prefold.training.loop import TrainingLoop

    step = TrainingLoop.step

    def stopping(self: TrainingLoop) -> None:
        if self.state.global_step == stop:
            raise KeyboardInterrupt
        step(self)

    with patch.object(TrainingLoop, "step", stopping):
        yield


@contextmanager
def short_of_memory(rank: int, tokens: int, tried: list[int]) -> Iterator[None]:
    """While open, larger rows fail in the backward pass of one process."""
    from prefold.trees.scorer import Scorer

    score = Scorer.score

    def limited(self: Scorer, trees: Any, *args: Any, **settings: Any) -> Any:
        found = score(self, trees, *args, **settings)
        size = sum(tree.size for tree in trees)
        tried.append(size)
        if size > tokens and ranks.rank() == rank and found.tokens.requires_grad:

            def fail(grad: torch.Tensor) -> None:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

            found.tokens.register_hook(fail)
        return found

    with patch.object(Scorer, "score", limited):
        yield
