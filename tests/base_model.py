"""A tiny random base model: a byte-level tokenizer that knows no chat, and no room for more tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

END, BEGIN = "<|text_end|>", "<|text_begin|>"


def base_tokenizer(adds_bos: bool = False) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={piece: place for place, piece in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END, BEGIN])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            f"{BEGIN} $A", None, [(BEGIN, backend.token_to_id(BEGIN))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, bos_token=BEGIN)


def save_base(folder: Path, rows: int | None = None, **changes: Any) -> Path:
    """A model of `rows` rows, as many as there are tokens by default."""
    tokenizer = base_tokenizer()
    rows = len(tokenizer) if rows is None else rows
    model = tiny_llama(vocab_size=rows, initializer_range=0.05, eos_token_id=tokenizer.eos_token_id, **changes)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
