"""A reward model: a sequence classifier whose single logit says how good an answer is. It is loaded when it scores its
first completion."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache, partial
from itertools import count
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from prefold import memory
from prefold.data.chat import require_chat_template
from prefold.data.preference import Message
from prefold.device import choose_device, choose_dtype
from prefold.errors import UserError
from prefold.generation.opening import how_to_keep
from prefold.models.fetch import fetch
from prefold.models.messages import reading
from prefold.models.tokenizer import load_tokenizer
from prefold.plan.machine import Machine
from prefold.recipe import Model
from prefold.recipe import rewards as settings
from prefold.trees.budget import pad

AT_ONCE = 8
"""Conversations in a forward pass."""
_ONE_LOGIT = "a sequence classifier with one label"


class RewardModel:
    """The logit of a sequence classifier with one label, read after prompt and completion in its chat template.

    None where the conversation is longer than the model's context: nothing is cut off.
    """

    def __init__(self, wanted: settings.RewardModel):
        self._load = cache(partial(_load, wanted.model))
        if Path(wanted.model).expanduser().is_dir():  # any other would have to be fetched, and a check does not wait
            _load(wanted.model, contents=False)

    def __call__(self, prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[float | None]:
        model, tokenizer = self._load()
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        conversations = [
            [*prompt, Message(role="assistant", content=completion)]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        texts: list[str] = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in conversations]  # type: ignore[misc]
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        scores: list[float | None] = [None] * len(ids)
        fitting = [index for index, row in enumerate(ids) if len(row) <= longest]
        for batch in (fitting[start : start + AT_ONCE] for start in range(0, len(fitting), AT_ONCE)):
            # Decoders read the score at the last token that is not the pad token. If the pad token is the end token
            # too, that is one token early; a token that is in no row is safe.
            padding = next(token for token in count() if not any(token in ids[index] for index in batch))
            model.config.pad_token_id = model.config.get_text_config().pad_token_id = padding
            padded, mask = pad([ids[index] for index in batch], model.device, padding)
            with torch.no_grad():
                logits = model(input_ids=padded, attention_mask=mask).logits
            for index, logit in zip(batch, logits[:, 0].float().tolist(), strict=True):
                scores[index] = logit
        return scores


def _load(name: str, contents: bool = True) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer. Without `contents` no weight is read, and the model has only shapes. Raises UserError: it is
    no reward model."""
    folder, device = fetch(name), choose_device()
    tokenizer = load_tokenizer(folder)
    require_chat_template(tokenizer)
    if contents:
        machine = Machine.here(device.type)
        memory.require(f"the reward model {name}", how_to_keep(Model(name=name), machine).needed, machine.memory)
    with reading("cannot be loaded as a reward model", name):
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=choose_dtype("auto", device),
            device_map={"": device if contents else "meta"},
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    if missing := sorted(report["missing_keys"]):
        # A head that is missing from the files would be initialised at random.
        raise UserError(f"is not a reward model: its weights lack {missing[0]}", where=name, expected=_ONE_LOGIT)
    if model.config.num_labels != 1:
        raise UserError(f"has {model.config.num_labels} labels, not one", where=name, expected=_ONE_LOGIT)
    return model.eval(), tokenizer
