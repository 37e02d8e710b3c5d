"""Log-probs of the scored tokens alone.

Two paths give the same numbers. Packed: one row of trees, each prompt encoded once, the head applied in chunks to the
predictors alone. Plain: one padded row per prompt and completion, through the model as it comes. Both score inside the
model's own `forward`, where PEFT and distributed wrappers hook in. A model with a score head scores whole
conversations, by the same two paths.
Data in: `PackedTrees`; data out: `TreeLogprobs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from prefold.trees.attention import unwrapped, widened
from prefold.trees.budget import padded_batches
from prefold.trees.head import (
    Statistics,
    distribution_statistics,
    head_computes,
    head_logprobs,
    head_of,
    score_layer,
    weights_of,
)
from prefold.trees.packing import PackedTrees


@dataclass(frozen=True)
class TreeLogprobs:
    """Log-probs in nats: `tokens` of every scored token, float32 or better; `completion`, the index of the completion
    that each belongs to; `lengths`, scored tokens per completion. On request: `statistics` of the scored positions, and
    `prompts`, each tree's summed log-prob of its prompt from the second token on, of `prompt_lengths` tokens.

    `auxiliary` is the weighted load-balancing loss of a mixture of experts. `extras`, by name, are further tensors that
    a method needs; nothing here reads them.

    A model that scores conversations gives one score per completion in place of log-probs, as if it had one token.
    """

    tokens: Float[Tensor, " S"]
    completion: Int[Tensor, " S"]
    lengths: Int[Tensor, " N"]
    statistics: Statistics | None = None
    auxiliary: Float[Tensor, ""] | None = None
    prompts: Float[Tensor, " trees"] | None = None
    prompt_lengths: Int[Tensor, " trees"] | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def sums(self) -> Tensor:
        """`[N]`: log-prob of each completion's scored tokens given all before them."""
        return sums_by(self.completion, self.tokens, len(self.lengths))

    def means(self) -> Tensor:
        """`[N]`: log-prob per scored token of each completion."""
        return self.sums() / self.lengths

    def pairs(self) -> tuple[Tensor, Tensor]:
        """`[B]`, `[B]`: sums of the first and second completion of trees that have two."""
        chosen, rejected = self.sums().view(-1, 2).unbind(1)
        return chosen, rejected

    def as_leaf(self) -> TreeLogprobs:
        """The same numbers as leaves of a new graph, in which a loss leaves its gradients."""
        prompts = None if self.prompts is None else self.prompts.detach().requires_grad_()
        return replace(self, tokens=self.tokens.detach().requires_grad_(), prompts=prompts)

    def gradients_of(self, parts: Sequence[TreeLogprobs]) -> list[TreeLogprobs]:
        """Of a leaf after its backward pass: the gradients with respect to the parts that it was concatenated from."""
        tokens = _gradient(self.tokens).split([len(part.tokens) for part in parts])
        prompts: Sequence[Tensor | None] = [None] * len(parts)
        if self.prompts is not None:
            prompts = _gradient(self.prompts).split([len(part.prompts) for part in parts if part.prompts is not None])
        return [
            replace(part, tokens=of_tokens, prompts=of_prompts)
            for part, of_tokens, of_prompts in zip(parts, tokens, prompts, strict=True)
        ]

    def dot(self, gradient: TreeLogprobs) -> Tensor:
        """Scalar whose backward pass propagates `gradient` to what these log-probs were computed from."""
        total = (self.tokens * gradient.tokens).sum()
        if self.prompts is None or gradient.prompts is None:
            return total
        return total + (self.prompts * gradient.prompts).sum()


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def concatenated(parts: Sequence[TreeLogprobs]) -> TreeLogprobs:
    """The log-probs of several rows as those of one."""
    starts = accumulate((len(part.lengths) for part in parts[:-1]), initial=0)
    statistics = [part.statistics for part in parts if part.statistics is not None]
    return TreeLogprobs(
        tokens=torch.cat([part.tokens for part in parts]),
        completion=torch.cat([part.completion + start for part, start in zip(parts, starts, strict=True)]),
        lengths=torch.cat([part.lengths for part in parts]),
        statistics=Statistics(*map(torch.cat, zip(*statistics, strict=True))) if statistics else None,
        prompts=_cat_or_none([part.prompts for part in parts]),
        prompt_lengths=_cat_or_none([part.prompt_lengths for part in parts]),
    )


def _cat_or_none(parts: Sequence[Tensor | None]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    return torch.cat(given) if given else None


def sums_by(owner: Tensor, values: Tensor, owners: int) -> Tensor:
    """`[owners]`: sums of the values of each owner.

    Added up in float64 where the device has it. Added one after another in float32, 2,000 tokens lose 4e-3 nats.
    """
    wide = values.dtype if values.device.type == "mps" else torch.float64
    return values.new_zeros(owners, dtype=wide).index_add(0, owner, values.to(wide)).to(values.dtype)


def packed_logprobs(
    model: nn.Module, row: PackedTrees, statistics: bool = False, temperature: float = 1.0
) -> TreeLogprobs:
    """Score one packed row. The model's attention implementation must be one of the engine's."""
    if score_layer(model) is not None:
        return packed_scores(model, row)
    head = head_of(model, temperature)
    # The hidden states may be on another device than the row, to which accelerate would move every tensor.
    spread = len({*getattr(unwrapped(model), "hf_device_map", {}).values()}) > 1
    with head_computes(head.layer, lambda hidden: head_logprobs(hidden[0], head, row.targets, statistics)) as scored:
        model(
            input_ids=row.input_ids,
            position_ids=row.positions,
            logits_to_keep=row.predictors.tolist() if spread else row.predictors,
            use_cache=False,
            trees=row,
        )
    tokens, distribution = scored.pop()
    if row.owner is None:
        return TreeLogprobs(tokens, row.completion, row.lengths, distribution)
    tokens, of_prompts = tokens.split([len(row.completion), len(row.owner)])
    if distribution is not None:
        distribution = Statistics(*(values[: len(tokens)] for values in distribution))
    prompts = sums_by(row.owner, of_prompts, len(row.trees))
    return TreeLogprobs(tokens, row.completion, row.lengths, distribution, None, prompts, prompt_lengths(row))


def plain_logprobs(
    model: nn.Module,
    row: PackedTrees,
    max_tokens: int,
    statistics: bool = False,
    temperature: float = 1.0,
) -> TreeLogprobs:
    """Score the same completions without packing: rows of prompt + completion, padded on the right, in batches of at
    most `max_tokens`. With 0 each row is a batch, for models in which a row depends on the others of its batch."""
    rows = [tree.prompt + ids for tree in row.trees for ids in tree.completions]
    if score_layer(model) is not None:
        return _as_logprobs(scores_of(model, rows, row.input_ids.device, max_tokens))
    starts = [len(tree.prompt) for tree in row.trees for _ in tree.completions]
    scored = [indices for tree in row.trees for indices in tree.scored]
    tokens: list[Tensor] = [torch.empty(0)] * len(rows)
    distributions: list[tuple[Tensor, ...]] = [()] * len(rows)
    # A prompt is scored in the row of its first completion.
    firsts = accumulate((len(tree.completions) for tree in row.trees[:-1]), initial=0)
    tree_of = {first: tree for tree, first in enumerate(firsts)}
    prompts: list[Tensor] = [torch.empty(0)] * len(row.trees)
    auxiliary: list[Tensor] = []
    can_keep = "logits_to_keep" in signature(type(unwrapped(model)).forward).parameters and row.owner is None
    for batch, padded, mask in padded_batches(rows, max_tokens, row.input_ids.device):
        # Logits are large, and those before the first completion of the batch are not needed.
        kept = {"logits_to_keep": padded.shape[1] + 1 - min(starts[i] for i in batch)} if can_keep else {}
        output = model(input_ids=padded, attention_mask=mask, use_cache=False, **kept)
        dropped = padded.shape[1] - output.logits.shape[1]
        if getattr(output, "aux_loss", None) is not None:
            auxiliary.append(output.aux_loss * router_coefficient(model) * (len(batch) / len(rows)))
        for i, ids, logits in zip(batch, padded, output.logits, strict=True):
            start, stop = starts[i], len(rows[i])
            # A slice copies nothing, and logits are large.
            selected = slice(None) if len(scored[i]) == stop - start else [*scored[i]]
            own = widened(logits[start - 1 - dropped : stop - 1 - dropped][selected])
            own = own / temperature if temperature != 1.0 else own
            targets = ids[start:stop][selected, None]
            tokens[i] = own.log_softmax(-1).gather(-1, targets).squeeze(-1)
            distributions[i] = distribution_statistics(own.detach(), targets) if statistics else ()
            if row.owner is not None and i in tree_of:
                before = (logits[: start - 1].to(own.dtype) / temperature).log_softmax(-1)
                prompts[tree_of[i]] = before.gather(-1, ids[1:start, None]).sum()
    return TreeLogprobs(
        torch.cat(tokens),
        row.completion,
        row.lengths,
        Statistics(*map(torch.cat, zip(*distributions, strict=True))) if statistics else None,
        torch.stack(auxiliary).sum() if auxiliary else None,
        torch.stack(prompts) if row.owner is not None else None,
        prompt_lengths(row),
    )


def prompt_lengths(row: PackedTrees) -> Tensor | None:
    """`[trees]`: scored tokens of each prompt, where prompts are scored."""
    return None if row.owner is None else torch.bincount(row.owner, minlength=len(row.trees))


def router_coefficient(model: Any) -> float:
    """Coefficient of a mixture of experts' load-balancing loss; 0 if its configuration asks for none."""
    config = getattr(model, "module", model).config.get_text_config()
    return float(config.router_aux_loss_coef) if getattr(config, "output_router_logits", False) else 0.0


# ---- scores of whole conversations -----------------------------------------------------------------------------
# The head is applied to the last tokens of completions alone, by their indices: a classifier of transformers finds them
# by the pad token, with which a conversation may end.


def packed_scores(model: nn.Module, row: PackedTrees) -> TreeLogprobs:
    ends = [node.own[1] - 1 for node in row.nodes if node.above]
    with _scoring(model, [0] * len(ends), ends) as scored:
        model(input_ids=row.input_ids, position_ids=row.positions, use_cache=False, trees=row)
    return _as_logprobs(scored.pop())


def scores_of(model: nn.Module, rows: Sequence[Sequence[int]], device: torch.device, max_tokens: int = 0) -> Tensor:
    """`[rows]`: scores of conversations without packing, padded on the right, in batches of at most `max_tokens`; with
    0 one by one."""
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
        last = hidden[list(rows), list(columns)].to(head.weight.device, dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            return linear(last, head.weight.to(dtype), bias).squeeze(-1)

    return head_computes(layer, score)


def _as_logprobs(scores: Tensor) -> TreeLogprobs:
    indices = torch.arange(len(scores), device=scores.device)
    return TreeLogprobs(scores, indices, torch.ones_like(indices))
