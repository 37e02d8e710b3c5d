"""Scores of whole conversations, by a model whose head gives one number in place of logits.

The two paths are those of the log-probs, and so is the record: a score stands where the log-probs of its completion
would, as if that had one token. The head meets the last tokens of completions alone, and is told where they are: a
classifier of transformers finds them by the pad token, which a conversation may end with.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from prefold.trees.head import head_computes, score_layer, weights_of
from prefold.trees.logprobs import TreeLogprobs
from prefold.trees.packing import PackedTrees
from prefold.trees.padding import padded_batches


def packed_scores(model: nn.Module, row: PackedTrees) -> TreeLogprobs:
    """Score one packed row. The model's attention implementation must be one of the engine's."""
    ends = [node.own[1] - 1 for node in row.nodes if node.above]
    with _scoring(model, [0] * len(ends), ends) as scored:
        model(input_ids=row.input_ids, position_ids=row.positions, use_cache=False, trees=row)
    return _as_logprobs(scored.pop())


def plain_scores(model: nn.Module, row: PackedTrees, max_tokens: int) -> TreeLogprobs:
    """Score the same completions by themselves; see `plain_logprobs`."""
    rows = [tree.prompt + ids for tree in row.trees for ids in tree.completions]
    return _as_logprobs(scores_of(model, rows, row.input_ids.device, max_tokens))


def scores_of(model: nn.Module, rows: Sequence[Sequence[int]], device: torch.device, max_tokens: int = 0) -> Tensor:
    """`[rows]`: scores of conversations by themselves, padded on the right, `max_tokens` at a time or else one."""
    scores: list[Tensor] = [torch.empty(0)] * len(rows)
    for batch, padded, mask in padded_batches(rows, max_tokens, device):
        with _scoring(model, range(len(batch)), [len(rows[i]) - 1 for i in batch]) as scored:
            model(input_ids=padded, attention_mask=mask, use_cache=False)
        for i, score in zip(batch, scored.pop(), strict=True):
            scores[i] = score
    return torch.stack(scores)


def _scoring(model: nn.Module, rows: Sequence[int], columns: Sequence[int]) -> AbstractContextManager[list[Tensor]]:
    """While open, the head computes the scores `[N]`, float32 or better, of the hidden states at these rows and
    columns."""
    layer = score_layer(model)
    assert layer is not None

    def score(hidden: Tensor) -> Tensor:
        head = weights_of(layer)
        assert isinstance(head, nn.Linear)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        bias = head.bias if head.bias is None else head.bias.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            return linear(hidden[list(rows), list(columns)].to(dtype), head.weight.to(dtype), bias).squeeze(-1)

    return head_computes(layer, score)


def _as_logprobs(scores: Tensor) -> TreeLogprobs:
    indices = torch.arange(len(scores), device=scores.device)
    return TreeLogprobs(scores, indices, torch.ones_like(indices))
