"""Kernels of CUDA as far as a CPU can tell: what they compute, and what they refuse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest

from prefold.trees import attention


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    most_queries: int,
    most_keys: int,
    *,
    return_aux: AuxRequest | None = None,
    scale: float,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool | None = None,
) -> Any:
    """What torch documents of `varlen_attn`, written out: each segment bottom-right within its window, where -1 is no
    limit. A query that sees nothing gets zeros, and an infinite normaliser. Refuses what the kernel of flash attention
    does, but for its dtypes."""
    assert query_starts.dtype == key_starts.dtype == torch.int32 and query_starts.shape == key_starts.shape
    assert query_starts.is_contiguous() and key_starts.is_contiguous()
    assert all(states.stride(-1) == 1 and states.dim() == 3 for states in (query, key, value))
    assert query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    if attention.NAMES_GROUPED_HEADS:
        assert bool(enable_gqa) == (query.shape[1] != key.shape[1])
    else:
        assert enable_gqa is None, "torch 2.11 has no such keyword"
    queries, keys_at = query_starts.tolist(), key_starts.tolist()
    assert queries[0] == 0 and queries[-1] == len(query) and queries == sorted(queries)
    assert keys_at[0] >= 0 and keys_at[-1] <= len(key) and keys_at == sorted(keys_at)
    out, normaliser = torch.zeros_like(query), query.new_full(query.shape[1::-1], float("inf"), dtype=torch.float32)
    back, ahead = (float("inf") if size < 0 else size for size in window_size)
    for i in range(len(queries) - 1):
        own, seen = slice(*queries[i : i + 2]), slice(*keys_at[i : i + 2])
        rows, columns = own.stop - own.start, seen.stop - seen.start
        if not rows:
            continue
        assert rows <= most_queries and columns <= most_keys
        if not columns:
            continue
        group = query.shape[1] // key.shape[1]
        keys, values = (states[seen].repeat_interleave(group, dim=1).transpose(0, 1) for states in (key, value))
        distance = torch.arange(columns - rows, columns)[:, None] - torch.arange(columns)[None]
        hidden = ((distance < -ahead) | (distance > back)).to(query.device)
        scores = (query[own].transpose(0, 1) @ keys.transpose(1, 2) * scale).masked_fill(hidden, float("-inf"))
        out[own] = (scores.softmax(-1) @ values).transpose(0, 1)
        normaliser[:, own] = scores.logsumexp(-1).to(torch.float32)
    return (out, normaliser) if return_aux and return_aux.lse else out
