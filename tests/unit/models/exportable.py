"""Tiny models of the families that become GGUF, with tokenizers as those families have them, in folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import SHAPE
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TEXTS = [
    "<|im_start|>user\nIt's 1234  apples, na\u00efve \u4f60\u597d!<|im_end|>\n",
    "<|im_start|>assistant\n\n  They'll do:\n12 + 3.<|im_end|>\n",
]
PLAIN_TEXTS = ["the then  hat", "He ate 12 na\u00efve tents.\nthe end"]

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def byte_level(cuts: str, bos: str | None = None) -> PreTrainedTokenizerFast:
    """Bytes and a few merges; `cuts` is llama.cpp's name for how text is cut."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("\u0120", "\u0120"), ("1", "2"), ("12", "3"), ("'", "s"), ("\u010a", "\u010a")]
    pieces = dict.fromkeys([*alphabet, *("".join(merge) for merge in merges)])
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cuts in ("gpt-2", "smollm"))
    first: list[Any] = []
    if cuts == "smollm":
        first = [pre_tokenizers.Digits(individual_digits=True)]
    elif cuts != "gpt-2":
        first = [pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[cuts]), behavior="isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*first, level]) if first else level
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    if bos:
        backend.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, backend.token_to_id(bos))])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", bos_token=bos, pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def sentencepiece() -> PreTrainedTokenizerFast:
    """As in Llama 2: a space before the first word, pieces by merges, bytes for what has no piece."""
    letters = ["\u2581", *"abdehinstHN.12"]
    made = ["th", "\u2581th", "the", "\u2581the", "en", "\u2581then", "at"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *made, *letters]
    splits = [(piece[:place], piece[place:]) for piece in made for place in range(1, len(piece))]
    merges = [(left, right) for left, right in splits if left in pieces and right in pieces]
    backend = Tokenizer(
        models.BPE(
            vocab={piece: place for place, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )


def save_model(
    folder: Path,
    family: str = "llama",
    tokenizer: PreTrainedTokenizerFast | None = None,
    rows: int | None = None,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> PreTrainedModel:
    """A random model with biases that are not zero, saved with its tokenizer; `rows` of embeddings."""
    tokenizer = tokenizer or byte_level("smollm")
    config, model_class = CLASSES[family]
    shape = {**SHAPE, "vocab_size": rows or len(tokenizer), "initializer_range": 0.1, **changes}
    if family == "qwen3":
        shape.setdefault("head_dim", 8)
    torch.manual_seed(0)
    model: PreTrainedModel = model_class(config(**shape, eos_token_id=tokenizer.eos_token_id)).to(dtype)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.data += 0.3 * torch.randn_like(weight)
            assert name
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()
