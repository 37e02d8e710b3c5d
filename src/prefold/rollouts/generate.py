"""Answers to prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from prefold.data.chat import Template, render
from prefold.data.preference import Message
from prefold.terminal import progress_bar

ROWS = 16
"""Answers that are written side by side."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off."""

    max_new_tokens: int = 256
    num_answers: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 42

    def config(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
        """Nothing of the model's own sampling defaults slips in: only its end tokens are kept."""
        sampled = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p or None,
        }
        stops = model.generation_config.eos_token_id if model.generation_config is not None else None
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            num_return_sequences=self.num_answers,
            do_sample=self.temperature > 0,
            eos_token_id=stops if stops is not None else tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            **(sampled if self.temperature > 0 else {}),
        )


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    sampling: Sampling,
    label: str = "answers",
    streamer: BaseStreamer | None = None,
    template: Template = "chat",
) -> list[list[str]]:
    """`num_answers` answers to each conversation, in the order of `prompts`.

    Args:
        streamer: for a single prompt with one answer, receives the tokens as they come.
    """
    torch.manual_seed(sampling.seed)
    model.eval()
    config = sampling.config(model, tokenizer)
    answers: list[list[str]] = []
    step = max(1, ROWS // sampling.num_answers)
    with progress_bar(label, len(prompts)) if streamer is None else _silent() as advance:
        for start in range(0, len(prompts), step):
            batch = [render(prompt, tokenizer, template) for prompt in prompts[start : start + step]]
            inputs = _left_padded(batch, int(tokenizer.pad_token_id or 0), model.device)
            tokens = cast(Any, model).generate(**inputs, generation_config=config, streamer=streamer)
            texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            texts = [text.strip() for text in texts]
            answers += [texts[i : i + sampling.num_answers] for i in range(0, len(texts), sampling.num_answers)]
            advance(len(batch), "")
    return answers


def _left_padded(rows: Sequence[list[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device),
    }


class _silent:
    """Stands in for a progress bar while tokens are streamed to the terminal."""

    def __enter__(self) -> Any:
        return lambda amount, text="": None

    def __exit__(self, *error: object) -> None:
        return None
