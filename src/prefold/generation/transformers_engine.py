"""Completions by transformers' own `generate`, for models that the shared prompts cannot serve.

Tokens are chosen as everywhere else: `generate` is handed the choice as the only possible token.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, StoppingCriteria

from prefold.errors import StageError
from prefold.generation.sampling import Completion
from prefold.generation.sequences import Row, Writing
from prefold.trees.memory import free_memory, is_out_of_memory

logger = logging.getLogger("prefold")


def write_plainly(
    model: PreTrainedModel, writing: Writing, rows_at_once: int
) -> Iterator[tuple[int, list[Completion]]]:
    """Prompts with their completions. Only prompts of one length share a batch: nothing is padded, which not all of
    these models can bear. Where memory runs out, half of the batch is tried.

    Raises:
        StageError: out of memory with a single prompt.
    """
    prompts, answers = writing.prompts, writing.settings.num_answers
    at_once = max(1, rows_at_once // answers)
    by_length = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    for _, places in groupby(by_length, key=lambda place: len(prompts[place])):
        same = list(places)
        while same:
            rows = [row for place in same[:at_once] for row in writing.begin(place)]
            if _has_room(model, rows, writing):
                same = same[at_once:]
                yield from writing.finished(rows)
            else:
                at_once = _halved(min(at_once, len(same)))


def _has_room(model: PreTrainedModel, rows: Sequence[Row], writing: Writing) -> bool:
    """Write the completions of all rows; False if memory ran out."""
    try:
        _generate(model, torch.tensor([list(writing.prompts[row.prompt]) for row in rows]), rows, writing)
        return True
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    free_memory()
    return False


def _halved(prompts: int) -> int:
    if prompts == 1:
        raise StageError(
            "out of memory with a single prompt and its completions; ask for fewer or shorter completions, or take a "
            "smaller model"
        )
    logger.warning("out of memory: completions of %s prompts at a time, not of %s", prompts // 2, prompts)
    return prompts // 2


@torch.no_grad()
def _generate(model: PreTrainedModel, input_ids: Tensor, rows: Sequence[Row], writing: Writing) -> None:
    input_ids = input_ids.to(model.device)
    with _no_defaults(model):
        cast(Any, model).generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=GenerationConfig(max_new_tokens=writing.settings.max_new_tokens, do_sample=False),
            logits_processor=[_Choice(rows, writing)],
            stopping_criteria=[_Over(rows)],
        )


class _Choice(LogitsProcessor):
    def __init__(self, rows: Sequence[Row], writing: Writing):
        self._rows, self._writing = rows, writing

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        live = [place for place, row in enumerate(self._rows) if not row.over]
        self._writing.extend([self._rows[place] for place in live], scores[live])
        chosen = torch.tensor([row.tokens[-1] for row in self._rows], device=scores.device)[:, None]
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen, 0.0)


class _Over(StoppingCriteria):
    def __init__(self, rows: Sequence[Row]):
        self._rows = rows

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.tensor([row.over for row in self._rows], device=input_ids.device)


@contextmanager
def _no_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Nothing of the model's own settings slips in."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
