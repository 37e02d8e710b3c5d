"""Token budgets: rows that fit, and what happens when memory runs out.

A row that runs out of memory is divided by a smaller budget and computed again. Nothing is lost, and the log says so.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from prefold import ranks
from prefold.errors import StageError
from prefold.trees.memory import free_memory, is_out_of_memory

T = TypeVar("T")
Rows = Sequence[list[int]]
"""Indices of the items of each row."""

logger = logging.getLogger("prefold")


def split_by_budget(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Distribute items over as few rows of at most `max_tokens` as first-fit-decreasing finds.

    An item larger than the budget gets a row of its own. Returns the item indices of each row, ascending in each row;
    the result depends on nothing but the arguments.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        row = next((row for row, tokens in enumerate(free) if tokens >= sizes[item]), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(max_tokens)
        rows[row].append(item)
        free[row] -= sizes[item]
    return [sorted(row) for row in rows]


def split_by_length(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Items of similar size together, so that a padded batch (longest x items) stays within `max_tokens`."""
    batches: list[list[int]] = []
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if batches and sizes[batches[-1][0]] * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches


def padded_batches(
    rows: Sequence[Sequence[int]], max_tokens: int, device: torch.device
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Batches of at most `max_tokens`, or of one row: the indices of their rows, their ids and their mask."""
    for batch in split_by_length([len(row) for row in rows], max_tokens):
        yield batch, *pad([rows[i] for i in batch], device)


def pad(rows: Sequence[Sequence[int]], device: torch.device, padding: int = 0) -> tuple[Tensor, Tensor]:
    """`[rows, longest]` token ids, padded on the right, and their mask: 1 for tokens, 0 for padding."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows], device=device)
    return ids, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)


def from_all(results: Iterator[T]) -> Iterator[T]:
    """The results of this process as they are computed, then those of the other processes."""
    own = []
    for result in results:
        if ranks.processes() > 1:
            own.append(result)
        yield result
    for process, share in enumerate(ranks.gather(own)):
        if process != ranks.rank():
            yield from share


# ---- out of memory ----------------------------------------------------------------------------------------------


def attempt(perform: Callable[[], T], fatal: str = "", together: bool = False) -> T | None:
    """The result of `perform`, or None if memory ran out.

    Args:
        fatal: message of a StageError to raise instead of returning None, where a retry is of no use.
        together: all processes perform this. If memory runs out in one, it fails in all.
    """
    try:
        return perform()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        elsewhere = isinstance(error, ranks.FailedElsewhere)
        if elsewhere and not together:
            raise
        if fatal and not elsewhere:
            raise StageError(fatal) from None
    # Outside the handler, whose traceback would keep the tensors of the failed attempt alive.
    if together and not elsewhere:
        ranks.tell_failure()
    return None


def row_by_row(
    rows: Rows, perform: Callable[[list[int]], T | None], smaller: Callable[[list[int], list[int]], Rows]
) -> Iterator[tuple[list[int], T]]:
    """Rows with the results of `perform`, which returns None if memory ran out.

    Args:
        smaller: lowers the budget, given the items of the failed row and all remaining items (these included), and
            returns new rows of the remaining items.
    """
    waiting = deque(rows)
    while waiting:
        row = waiting.popleft()
        result = perform(row)
        if result is None:
            waiting = deque(smaller(row, [item for remaining in (row, *waiting) for item in remaining]))
        else:
            yield row, result


def lowered(
    before: int,
    sizes: Sequence[int],
    single: str,
    split: Callable[[int], Rows] | None = None,
    what: str = "the token budget goes",
) -> int:
    """A smaller budget than `before`, after memory ran out on items of these sizes together; the log says so.

    Args:
        single: what cannot be divided, for the error message.
        split: gives the rows of these items within a budget, which is halved until there are more rows. Without it, the
            new budget is half of the items' total size.
        what: the beginning of the log message.

    Raises:
        StageError: the items cannot be divided.
    """
    free_memory()
    if split is None:
        after, divided = sum(sizes) // 2, len(sizes) > 1
    else:
        after, rows = before, len(split(before))
        while after > min(sizes, default=0) and len(split(after)) == rows:
            after //= 2
        divided = len(split(after)) != rows
    if not divided:
        raise StageError(f"out of memory with {single}")
    logger.warning("out of memory: %s from %s to %s", what, f"{before:,}", f"{after:,}")
    return after
