"""A byte-level tokenizer with any chat template, and a tiny random model with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

DEFAULT_SYSTEM = "You help."
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|start|>{{ message.role }}<|end_header|>\n\n{{ message.content | trim }}<|eot|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end_header|>\n\n{% endif %}"
)
# Asks for an answer with an opened thought, which the finished conversation does not have.
THINKING = CHATML.replace("<|im_start|>assistant\n{%", "<|im_start|>assistant\n<think>\n{%")
NO_END = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
STRICT = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('no system message, please') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|begin|>", "<|start|>", "<|end_header|>", "<|eot|>", "<|text_end|>"]


def make_tokenizer(
    template: str | None, eos: str = "<|im_end|>", bos: str | None = None, adds_bos: bool = False
) -> PreTrainedTokenizerFast:
    """One token per byte, but for two newlines in a row, which are one token, as in many real vocabularies."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: place for place, piece in enumerate([*alphabet, "ĊĊ"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, backend.token_to_id(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=bos, chat_template=template)


def save_chat_model(folder: Path, template: str = CHATML, ends: tuple[int, ...] = (), **changes: Any) -> Path:
    """`ends`: tokens that end an answer too, so that random ones come to an end of their own."""
    tokenizer = make_tokenizer(template, bos="<|im_start|>")
    end = tokenizer.eos_token_id
    settings = {"initializer_range": 0.05, "eos_token_id": end, "pad_token_id": end, "bos_token_id": None}
    model = tiny_llama(vocab_size=len(tokenizer), **{**settings, **changes})
    if ends:
        model.generation_config.eos_token_id = [end, *ends]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
