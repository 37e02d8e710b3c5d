"""A reward model: a sequence classifier whose single logit says how good an answer is.

It is loaded when the first completion is scored. Nothing here imports torch before that: recipes name this reward.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar

from prefold.data.preference import Message
from prefold.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AT_ONCE = 8
"""Conversations of a forward pass."""
_ONE_LOGIT = "a sequence classifier with one label"


@dataclass(frozen=True)
class RewardModel:
    """The logit of a sequence classifier with one label, read after prompt and completion in its chat template.

    None where that is more than the model's longest input: nothing is cut off.
    """

    model: str
    """Hub id or folder of the reward model."""

    __pydantic_config__: ClassVar[Any] = {"use_attribute_docstrings": True}

    @cached_property
    def _opened(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return _open_reward_model(self.model)

    def __call__(self, prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[float | None]:
        model, tokenizer = self._opened
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        turns = [
            [*prompt, Message(role="assistant", content=completion)]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        texts: list[str] = [tokenizer.apply_chat_template(one, tokenize=False) for one in turns]  # type: ignore[misc, arg-type]
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        found: list[float | None] = [None] * len(ids)
        short = [place for place, row in enumerate(ids) if len(row) <= longest]
        for start in range(0, len(short), AT_ONCE):
            places = short[start : start + AT_ONCE]
            for place, logit in zip(places, _logits(model, [ids[place] for place in places]), strict=True):
                found[place] = logit
        return found


def _open_reward_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    # The recipe imports this module, and these import the recipe.
    from transformers import AutoModelForSequenceClassification

    from prefold.data.chat import require_chat_template
    from prefold.models.device import choose_device, choose_dtype
    from prefold.models.fetch import fetch
    from prefold.models.load import load_tokenizer
    from prefold.models.messages import UNREADABLE, quiet

    folder, device = fetch(name), choose_device()
    tokenizer = load_tokenizer(folder)
    require_chat_template(tokenizer)
    try:
        with quiet():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder,
                dtype=choose_dtype("auto", device),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot be loaded as a reward model: {reason}", where=name) from None
    if missing := sorted(report["missing_keys"]):
        # A head that is not in the files would be a random one.
        raise UserError(f"is not a reward model: its weights lack {missing[0]}", where=name, expected=_ONE_LOGIT)
    if model.config.num_labels != 1:
        raise UserError(f"has {model.config.num_labels} labels, not one", where=name, expected=_ONE_LOGIT)
    return model.to(device).eval(), tokenizer


def _logits(model: PreTrainedModel, rows: list[list[int]]) -> list[float]:
    import torch

    # Decoders read the score at the last token that is not the pad token. Where that is the end token too, they would
    # read it one token early; a token that is in no row is safe.
    pad, longest = next(token for token in count() if not any(token in row for row in rows)), max(map(len, rows))
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = pad
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    values: list[float] = logits[:, 0].float().tolist()
    return values
