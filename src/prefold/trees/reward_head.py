"""Scores of whole conversations, by a model whose head gives one number in place of logits.

The two paths are those of the log-probs, and so is the record: a score stands where the log-probs of its completion
would, as if that had one token. The head meets the last tokens of completions alone, and is told where they are: a
classifier of transformers finds them by the pad token, which a conversation may end with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from prefold.trees.head import computing_by, score_layer, weights_of
from prefold.trees.logprobs import TreeLogprobs
from prefold.trees.packing import PackedTrees
from prefold.trees.padding import padded_batches


def packed_scores(model: nn.Module, row: PackedTrees) -> TreeLogprobs:
    """Score one packed row. The model's attention implementation must be one of the engine's."""
    ends = [node.own[1] - 1 for node in row.nodes if node.above]
    with _scoring_last(model, [0] * len(ends), ends) as scored:
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
        with _scoring_last(model, range(len(batch)), [len(rows[i]) - 1 for i in batch]) as scored:
            model(input_ids=padded, attention_mask=mask, use_cache=False)
        for i, score in zip(batch, scored.pop(), strict=True):
            scores[i] = score
    return torch.stack(scores)


@contextmanager
def _scoring_last(model: nn.Module, rows: Sequence[int], columns: Sequence[int]) -> Iterator[list[Tensor]]:
    """While open, the head takes the hidden states at these rows and columns and leaves their scores `[N]`, float32 or
    better, in the yielded list.

    The model's `forward` gets a stand-in for the logits that carries no information.
    """
    layer = score_layer(model)
    assert layer is not None
    scored: list[Tensor] = []

    def score(hidden: Tensor) -> Tensor:
        head = weights_of(layer)
        assert isinstance(head, nn.Linear)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        bias = head.bias if head.bias is None else head.bias.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            last = hidden[list(rows), list(columns)].to(dtype)
            scored.append(linear(last, head.weight.to(dtype), bias).squeeze(-1))
        return hidden[..., :1].detach()

    with computing_by(score, layer):
        yield scored


def _as_logprobs(scores: Tensor) -> TreeLogprobs:
    indices = torch.arange(len(scores), device=scores.device)
    return TreeLogprobs(scores, indices, torch.ones_like(indices))
