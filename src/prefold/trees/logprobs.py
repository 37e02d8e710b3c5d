"""Log-probs of the scored positions, and of nothing else.

Two paths give the same numbers. Packed: one row of trees, each prompt encoded once, the head applied in chunks to the
predictors alone. Plain: one padded row per prompt and completion through the model as it comes. Both score inside the
model's own `forward`, where PEFT and distributed wrappers hook in.
Data in: `PackedTrees`; data out: `TreeLogprobs`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefold.trees.packing import PackedTrees

CHUNK = 256
"""Rows of hidden states that meet the vocabulary matrix at once: 256 x 49,152 float32 logits are 50 MB."""


@dataclass(frozen=True)
class TreeLogprobs:
    """Log-probs in nats: `tokens` `[S]` of every scored token, float32 or better; `completion` `[S]`, the completion of
    the batch that it belongs to; `lengths` `[N]`, tokens per completion."""

    tokens: Tensor
    completion: Tensor
    lengths: Tensor

    def sums(self) -> Tensor:
        """`[N]`: log-prob of each completion given its prompt."""
        return self.tokens.new_zeros(len(self.lengths)).index_add(0, self.completion, self.tokens)

    def means(self) -> Tensor:
        """`[N]`: log-prob per token of each completion."""
        return self.sums() / self.lengths

    def pairs(self) -> tuple[Tensor, Tensor]:
        """`[B]`, `[B]`: sums of the first and second completion of trees that have two."""
        chosen, rejected = self.sums().view(-1, 2).unbind(1)
        return chosen, rejected

    def detach(self) -> TreeLogprobs:
        return TreeLogprobs(self.tokens.detach(), self.completion, self.lengths)


def packed_logprobs(model: nn.Module, row: PackedTrees) -> TreeLogprobs:
    """Score one packed row. The model's attention implementation must be the tree attention."""
    with _scoring_head(model, row.targets) as scored:
        model(
            input_ids=row.input_ids,
            position_ids=row.positions,
            logits_to_keep=row.predictors,
            use_cache=False,
            trees=row,
        )
    return TreeLogprobs(scored.pop(), row.completion, row.lengths)


def plain_logprobs(model: nn.Module, row: PackedTrees, max_tokens: int) -> TreeLogprobs:
    """Score the same completions one by one: rows of prompt + completion, padded on the right, `max_tokens` at a
    time."""
    device = row.input_ids.device
    rows = [tree.prompt + ids for tree in row.trees for ids in tree.completions]
    lengths = [len(ids) for tree in row.trees for ids in tree.completions]
    scored: list[Tensor] = [torch.empty(0)] * len(rows)
    for batch in _equal_batches([len(ids) for ids in rows], max_tokens):
        longest = max(len(rows[i]) for i in batch)
        padded = torch.tensor([[*rows[i], *[0] * (longest - len(rows[i]))] for i in batch], device=device)
        mask = torch.tensor([[1] * len(rows[i]) + [0] * (longest - len(rows[i])) for i in batch], device=device)
        logits = model(input_ids=padded, attention_mask=mask, use_cache=False).logits
        for place, i in enumerate(batch):
            start = len(rows[i]) - lengths[i]
            own = logits[place, start - 1 : len(rows[i]) - 1]
            own = own.float() if own.dtype in (torch.float16, torch.bfloat16) else own
            targets = padded[place, start : len(rows[i])]
            scored[i] = own.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    return TreeLogprobs(torch.cat(scored), row.completion, row.lengths)


def _equal_batches(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Items of similar size together, so that a padded batch (longest x items) stays within `max_tokens`."""
    batches: list[list[int]] = []
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if batches and sizes[batches[-1][0]] * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches


# ---- the head ---------------------------------------------------------------------------------------------------


def output_head(model: nn.Module) -> nn.Module:
    """The module that turns hidden states into logits."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    assert isinstance(head, nn.Module)
    return head


def head_obstacle(model: nn.Module) -> str | None:
    """Why the head of this model cannot be applied in chunks, or None if it can."""
    head = output_head(model)
    if type(head) is not nn.Linear:
        return f"its output head is a {type(head).__name__}, not a plain linear layer"
    config: Any = model.config
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name, neutral in (("final_logit_softcapping", None), ("logit_scale", 1.0), ("logits_scaling", 1.0)):
        if getattr(text_config, name, neutral) not in (neutral, None):
            return f"its logits are changed after the head (`{name}`)"
    return None


@contextmanager
def _scoring_head(model: nn.Module, targets: Tensor) -> Iterator[list[Tensor]]:
    """While open, the head takes the hidden states of the predictors and leaves the targets' log-probs in the yielded
    list.

    The model's `forward` gets a stand-in for the logits that carries no information.
    """
    head = output_head(model)
    scored: list[Tensor] = []

    def score(hidden: Tensor) -> Tensor:
        assert isinstance(head, nn.Linear)
        scored.append(linear_logprobs(hidden[0], head.weight, head.bias, targets))
        return hidden[..., :1].detach()

    head.forward = score
    try:
        yield scored
    finally:
        del head.forward


def linear_logprobs(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """log softmax(hidden @ weight.T + bias) at `targets`, without `[S, V]` logits.

    Args:
        hidden: `[S, D]`.
        weight: `[V, D]`; bias: `[V]` or None.
        targets: `[S]` token ids.

    Returns:
        `[S]` log-probs, float32 (float64 for float64 inputs).
    """
    with torch.autocast(hidden.device.type, enabled=False):
        logprobs: Tensor = _LinearLogprobs.apply(hidden.to(weight.dtype), weight, bias, targets)
        return logprobs


class _LinearLogprobs(torch.autograd.Function):
    """Chunked log-probs with their own backward.

    A token's log-prob is one number, so its gradient by the hidden state is a single row, `W[target] - softmax @ W`. It
    is computed while the chunk's softmax is at hand and only scaled in the backward pass: frozen heads (LoRA) need no
    second product with the vocabulary matrix. Trained heads recompute the softmax chunk by chunk.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logprobs = torch.empty(len(targets), dtype=accumulate, device=hidden.device)
        jacobian = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            logits = _logits(hidden[part], weight, bias)
            normaliser = logits.logsumexp(-1)
            logprobs[part] = logits.gather(-1, targets[part, None]).squeeze(-1) - normaliser
            if jacobian is not None:
                probabilities = logits.sub_(normaliser[:, None]).exp_().to(weight.dtype)
                torch.sub(weight[targets[part]], probabilities @ weight, out=jacobian[part])
        head_is_trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(jacobian, *((hidden, weight, bias, targets, logprobs) if head_is_trained else ()))
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        grad = grad_outputs[0]
        jacobian, *head = ctx.saved_tensors
        grad_hidden = jacobian * grad[:, None].to(jacobian.dtype) if jacobian is not None else None
        grad_weight, grad_bias = _head_gradients(grad, *head) if head else (None, None)
        return grad_hidden, grad_weight, grad_bias, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = nn.functional.linear(hidden, weight, bias)
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _head_gradients(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, logprobs: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients by the head: sum over tokens of grad * (onehot(target) - softmax) times the hidden state."""
    grad_weight = torch.zeros_like(weight, dtype=logprobs.dtype)
    grad_bias = torch.zeros_like(bias, dtype=logprobs.dtype) if bias is not None else None
    for start in range(0, len(targets), CHUNK):
        part = slice(start, start + CHUNK)
        logits = _logits(hidden[part], weight, bias)
        by_logits = logits.softmax(-1).mul_(-grad[part, None])
        by_logits.scatter_add_(-1, targets[part, None], grad[part, None].to(by_logits.dtype))
        grad_weight.addmm_(by_logits.T.to(grad_weight.dtype), hidden[part].to(grad_weight.dtype))
        if grad_bias is not None:
            grad_bias += by_logits.sum(0)
    return grad_weight.to(weight.dtype), grad_bias.to(weight.dtype) if grad_bias is not None else None
