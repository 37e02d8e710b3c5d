"""Completions by transformers' own `generate`, for models that cannot share prompts.

Tokens are chosen as everywhere else: `generate` gets the choice as the only possible token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from prefold.generation.sampling import Completion
from prefold.generation.sequences import GenerationRequest, PartialCompletion
from prefold.trees.budget import attempt, lowered, row_by_row

SINGLE_PROMPT = "a single prompt and its completions"
ASK_FOR_LESS = "ask for fewer or shorter completions, or take a smaller model"


def generate_plainly(
    model: PreTrainedModel, request: GenerationRequest, sequences_at_once: int
) -> Iterator[tuple[int, list[Completion]]]:
    """Prompts with their completions. Only prompts of one length share a batch: nothing is padded, which not all of
    these models support. If memory runs out, half of the batch is tried.

    Raises:
        StageError: out of memory with a single prompt.
    """
    prompts, at_once = request.prompts, max(1, sequences_at_once // request.settings.num_answers)

    def batches(indices: Sequence[int]) -> list[list[int]]:
        by_length = [list(same) for _, same in groupby(indices, key=lambda i: len(prompts[i]))]
        return [same[start : start + at_once] for same in by_length for start in range(0, len(same), at_once)]

    def smaller(batch: list[int], left: list[int]) -> list[list[int]]:
        nonlocal at_once
        what = "the prompts that are answered at a time go"
        at_once = lowered(len(batch), [1] * len(batch), f"{SINGLE_PROMPT}; {ASK_FOR_LESS}", what=what)
        return batches(left)

    first = batches(sorted(range(len(prompts)), key=lambda i: len(prompts[i])))
    for _, sequences in row_by_row(first, lambda batch: attempt(partial(_generate, model, batch, request)), smaller):
        yield from request.finished(sequences)


@torch.no_grad()
def _generate(model: PreTrainedModel, batch: Sequence[int], request: GenerationRequest) -> list[PartialCompletion]:
    """All completions of the prompts of a batch."""
    drawing = request.begin(batch)
    sequences = drawing.completions

    def choose(input_ids: Tensor, scores: Tensor) -> Tensor:
        unfinished = [i for i, sequence in enumerate(sequences) if not sequence.over]
        drawing.draw(scores[unfinished])
        kept = request.read(drawing)
        if len(kept) < len(drawing.completions):
            drawing.keep(kept)
        chosen = torch.tensor([sequence.tokens[-1] for sequence in sequences], device=scores.device)[:, None]
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen, 0.0)

    def are_over(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.tensor([sequence.over for sequence in sequences], device=input_ids.device)

    input_ids = torch.tensor([list(request.prompts[sequence.prompt]) for sequence in sequences], device=model.device)
    # The model's own generation settings must have no effect.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        cast(Any, model).generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=GenerationConfig(max_new_tokens=request.settings.max_new_tokens, do_sample=False),
            logits_processor=[choose],
            stopping_criteria=[are_over],
        )
    finally:
        model.generation_config = own
    return sequences
