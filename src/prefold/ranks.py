"""The processes that train one model together: their ranks, their shares of the work, their communication.

In a single process every function here is the identity: its share is everything, and it gathers what it gave. So the
code that calls them is the same for one process and for sixteen.

Whoever started the processes ends all of them when one fails (`launch.py`, torchrun), so that none waits for another
that has ended.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import transformers
from torch import distributed, nn
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from prefold.errors import StageError, UserError, first_line
from prefold.launch import LIFELINE, launched

T = TypeVar("T")

PATIENCE = timedelta(days=3)
"""How long a process waits for the others: the first may be merging and evaluating models for more than a night."""
_store: Any = None
_alone = False


class FailedElsewhere(MemoryError):
    """Memory ran out in another process."""


# ---- the process group ------------------------------------------------------------------------------------------


def join() -> None:
    """Join the group of the other processes, if there are any. All but the first one are silent from then on.

    Raises:
        UserError: there are more of them than GPUs, or the environment does not say how they reach one another.
    """
    global _store
    if launched() == 1 or distributed.is_initialized():
        return
    if unknown := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        what = f"WORLD_SIZE is {launched()}, and {unknown[0]} is not set"
        raise UserError(what, where="environment", advice="start them by `--nproc` or torchrun, or unset WORLD_SIZE")
    _hold_lifeline()
    _store, rank, number = next(rendezvous("env://"))
    if rank > 0:
        _be_silent()
    backend = "gloo"
    if torch.cuda.is_available():
        backend, local = "cpu:gloo,cuda:nccl", int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            what = f"process {local + 1} of this machine has no GPU: there are {torch.cuda.device_count()}"
            raise UserError(what, advice="start as many processes as there are GPUs")
        torch.cuda.set_device(local)
    distributed.init_process_group(backend, store=_store, rank=rank, world_size=number, timeout=PATIENCE)


def leave() -> None:
    """Leave the group when all is done."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def processes() -> int:
    return distributed.get_world_size() if distributed.is_initialized() and not _alone else 1


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() and not _alone else 0


def is_first() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


@contextmanager
def alone() -> Iterator[None]:
    """While open, this process acts as if it were the only one."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def speaks() -> bool:
    """Whether this process is to report its failure: the first one that fails does, the others fail because of it."""
    if _store is None:
        return True
    try:
        return bool(_store.add("prefold/failed", 1) == 1)
    except RuntimeError:  # the process that kept the count has failed before
        return False


def _be_silent() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("prefold").setLevel(logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends


def _hold_lifeline() -> None:
    """Have this process end with the one that started it, even if that is killed."""
    descriptor = os.environ.pop(LIFELINE, None)
    if descriptor is None:
        return

    def wait() -> None:
        os.read(int(descriptor), 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


# ---- communication ----------------------------------------------------------------------------------------------


def gather(value: T) -> list[T]:
    """The values of all processes, by rank; tensors come to this process's device.

    Raises:
        FailedElsewhere: another process called `tell_failure` instead.
    """
    return [value] if processes() == 1 else _exchanged(value, failed=False)


def tell_failure() -> None:
    """To be called instead of the next `gather` if memory ran out here: the others' `gather` fails."""
    if processes() > 1:
        _exchanged(None, failed=True)


def _exchanged(value: T, failed: bool) -> list[T]:
    own = io.BytesIO()
    torch.save((failed, value), own)
    contents: list[bytes] = [b""] * processes()
    with _explained():
        distributed.all_gather_object(contents, own.getvalue())
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    # Safe to unpickle: the processes of this run have written them.
    results = [torch.load(io.BytesIO(content), map_location=device, weights_only=False) for content in contents]
    if not failed and any(elsewhere for elsewhere, _ in results):
        raise FailedElsewhere("out of memory in another process")
    return [result for _, result in results]


def from_first(make: Callable[[], T]) -> T:
    """The result of `make` in the first process, in all of them. Tensors must be on the CPU."""
    if processes() == 1:
        return make()
    box = [make() if is_first() else None]
    with _explained():
        distributed.broadcast_object_list(box, src=0)
    return cast(T, box[0])


@contextmanager
def _explained() -> Iterator[None]:
    """Raises StageError if another process has ended or cannot be reached."""
    try:
        yield
    except RuntimeError as error:
        raise StageError(f"another process has ended, or cannot be reached ({first_line(error)})") from None


def wait() -> None:
    """Wait until all processes have called this."""
    gather(None)


@contextmanager
def first_ahead() -> Iterator[None]:
    """The first process runs the body before the others, so that they find its results in the cache. On another
    machine, which may have a cache of its own, one process goes before the rest."""
    turn = 0 if is_first() else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
    for _ in range(turn):
        wait()
    yield
    for _ in range(2 - turn):
        wait()


def merged(results: dict[int, T]) -> dict[int, T]:
    """The results of all processes."""
    return {index: value for part in gather(results) for index, value in part.items()}


# ---- sharing work -----------------------------------------------------------------------------------------------


def share(sizes: Sequence[int]) -> list[int]:
    """Indices of the items that are this process's share, in ascending order.

    Items are assigned in descending order of size, each to the process that has the least so far. The shares depend on
    the sizes and the number of processes alone.
    """
    if processes() == 1:
        return list(range(len(sizes)))
    loads = [0] * processes()
    own: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = loads.index(min(loads))
        loads[least] += sizes[item]
        if least == rank():
            own.append(item)
    return sorted(own)


def missing(number: int) -> int:
    """By how much the largest number of all processes exceeds this one's."""
    return max(gather(number)) - number


@torch.no_grad()
def copy_from_first(model: nn.Module) -> None:
    """Copy the first process's trained weights to all; sharded ones are left alone."""
    if processes() > 1:
        for weight in model.parameters():
            if weight.requires_grad and not isinstance(weight, DTensor):
                distributed.broadcast(weight.data, src=0)


@torch.no_grad()
def sum_gradients(model: nn.Module) -> None:
    """Sum the gradients of all processes, in each of them. A weight that has no gradient in any of them keeps none.

    This happens once in a step, after all backward passes have succeeded: running out of memory in the midst of an
    exchange could not be recovered from.
    """
    if processes() == 1:
        return
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    used = [any(by_all) for by_all in zip(*gather([weight.grad is not None for weight in trained]), strict=True)]
    waiting = []
    for weight in (weight for weight, wanted in zip(trained, used, strict=True) if wanted):
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        if isinstance(weight, DTensor):
            # The backward pass has averaged the gradients of sharded weights.
            cast(DTensor, weight.grad).to_local().mul_(processes())
        else:
            waiting.append(distributed.all_reduce(weight.grad, async_op=True))
    for work in waiting:
        work.wait()
