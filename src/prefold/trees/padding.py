"""Rows of token ids side by side, padded on the right: what the plain passes read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from prefold.trees.budget import split_by_length


def padded_batches(
    rows: Sequence[Sequence[int]], max_tokens: int, device: torch.device
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Batches of at most `max_tokens`, or of one row: the indices of their rows, their ids and their mask."""
    for batch in split_by_length([len(row) for row in rows], max_tokens):
        yield batch, *pad([rows[i] for i in batch], device)


def pad(rows: Sequence[Sequence[int]], device: torch.device, padding: int = 0) -> tuple[Tensor, Tensor]:
    """`[rows, longest]` token ids, padded on the right, and the mask that tells padding from them."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows], device=device)
    return ids, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
