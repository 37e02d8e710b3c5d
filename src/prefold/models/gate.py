"""Models that cannot be trained or sampled from, and why: from configuration, tokenizer and the headers of files.

No weight is read. `load_model` checks this before it loads any; what depends on the model's class (missing, unexpected
and mismatched tensors, layers to adapt) is checked on torch's meta device, by the same calls that load the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from prefold.errors import UserError
from prefold.models.chat_format import SAMPLE
from prefold.models.fetch import weight_files

HEADS = {
    "ForSequenceClassification": "is a sequence classifier: it scores texts and writes none",
    "ForTokenClassification": "is a token classifier: it labels tokens and writes none",
    "ForQuestionAnswering": "marks answers in a text and writes none",
    "ForMultipleChoice": "chooses among answers and writes none",
    "ForMaskedLM": "is a masked language model: every token sees those after it",
}
"""What a model is, by the end of its class's name."""
ENCODERS = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation"}
"""Model types whose attention is bidirectional, unless their configuration says `is_decoder`."""
NEVER_CAUSAL = {"cpmant", "xlm", "xlnet"}
"""Model types with a class "for causal language modelling" whose attention is bidirectional all the same."""
SPECIAL = ("bos", "eos", "pad")
PARTS = re.compile("vision|audio|image|video|speech|vq")
CAUSAL = "a language model that writes from left to right"
STORED_QUANTISED = re.compile(r"F8_|F4|I8$|U8$|I32$")
"""safetensors' names of dtypes that only quantised weights are stored in."""


def require_usable(config: Any, folder: Path, name: str, scores: bool = False) -> None:
    """Refuse a model that cannot be used.

    Args:
        config: of transformers, as read from `folder`.
        scores: whether the model is to score conversations, and not to write.

    Raises:
        UserError: the model is of a kind that is not supported, its weights are stored quantised, or one of its files
            is truncated.
    """
    stored = [each for file in weight_files(folder) for each in stored_tensors(file, name).items()]
    # Masks and positions, which older files contain as well, are no weights.
    types = [str(facts["dtype"]) for tensor, facts in stored if "weight" in tensor]
    for what, expected, advice in _obstacles(config, folder, types, scores):
        raise UserError(what, where=name, expected=expected, advice=advice)


def _obstacles(config: Any, folder: Path, types: Sequence[str], scores: bool) -> Iterator[tuple[str, str, str]]:
    """What is wrong, what was expected, what to do; the most certain first."""
    kind, classes = config.model_type, getattr(config, "architectures", None) or [""]
    if config.is_encoder_decoder:
        yield f"is an encoder-decoder ({kind}): a prompt and its answer are read by two models", CAUSAL, ""
    others = [part for part in config.sub_configs if PARTS.search(part) and getattr(config, part, None) is not None]
    if parts := sorted(part.removesuffix("_config") for part in others):
        what = f"holds more than a text model ({', '.join(parts)}), and what is not text would be lost"
        yield what, "a model of text alone", "take the text model of its family, or save its text part as a model"
    if (kind in ENCODERS and not getattr(config, "is_decoder", False)) or kind in NEVER_CAUSAL or _looks_ahead(config):
        yield f"is no causal language model ({kind}): every token sees those after it", CAUSAL, ""
    quantised = getattr(config, "quantization_config", None) or next(filter(STORED_QUANTISED.match, types), "")
    if quantised:
        what = f"its weights are stored quantised ({_method(quantised)}), and an adapter cannot be merged into them"
        advice = "name that one; `model.load_in_4bit: true` quantises it for training"
        yield what, "the unquantised model", advice
    end = next((end for end in HEADS if classes[0].endswith(end)), "")
    if end and not (scores and end == "ForSequenceClassification"):
        yield HEADS[end], "a model with a score head" if scores else CAUSAL, ""
    if (folder / "modules.json").is_file() and not scores:
        yield "is a model for embeddings of texts (sentence-transformers): it writes none", CAUSAL, ""
    if not scores and re.search("(?<!Head)(?<!Heads)Model$", classes[0]):
        yield f"has no head that writes tokens ({classes[0]})", CAUSAL, "take the model with its head"
    known = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING if scores else MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in known:
        what = "transformers has no classifier for it" if scores else "it is none that writes text"
        yield f"is a model of type {kind}, and {what}", CAUSAL, ""


def _looks_ahead(config: Any) -> bool:
    """Whether a family that exists with causal and with bidirectional attention is configured as the latter."""
    text = config.get_text_config()
    both_ways = getattr(text, "use_bidirectional_attention", None)
    return both_ways in (True, "all") or getattr(text, "is_causal", None) is False


def stored_tensors(file: Path, name: str) -> dict[str, Any]:
    """`dtype`, `shape` and `data_offsets` of each tensor in a safetensors file of the model `name`, from its header.

    Raises:
        UserError: the file is truncated or invalid.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            header = json.loads(opened.read(min(length, size)))
            tensors = {tensor: entry for tensor, entry in header.items() if tensor != "__metadata__"}
            wanted = 8 + length + max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
            what = f"{file.name} has {size:,} bytes, its header calls for {wanted:,}"
        except (ValueError, LookupError, TypeError, AttributeError):
            wanted, what = None, f"{file.name} is no file of safetensors, or its header is cut off"
    if wanted != size:
        raise UserError(what, where=name, advice="fetch it again; the copy or download may have been cut short")
    return tensors


def _method(quantised: Any) -> str:
    if isinstance(quantised, str):
        return quantised
    settings = quantised if isinstance(quantised, dict) else quantised.to_dict()
    method = settings.get("quant_method") or "in a way of its own"
    return str(getattr(method, "value", method))


# ---- vocabulary and positions -----------------------------------------------------------------------------------


def require_known_tokens(config: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, name: str) -> None:
    """Check that the special tokens, and those that a conversation is written with, have rows in the embeddings.

    Raises:
        UserError: names the first that has none.
    """
    rows = config.get_text_config().vocab_size
    named: dict[str, Any] = {f"{token}_token": getattr(tokenizer, f"{token}_token_id") for token in SPECIAL}
    for file in ("config.json", "generation_config.json"):
        # Defaults of the family's configuration were not chosen for this vocabulary.
        special = _special_ids(folder / file).items()
        named |= {f"`{key}` of {file}": value for key, value in special if value != getattr(type(config), key, None)}
    named["chat template"] = _conversation_ids(tokenizer)
    for what, ids in named.items():
        for token in ids if isinstance(ids, list) else [ids]:
            if isinstance(token, int) and token >= rows:
                raise beyond_rows(token, tokenizer, rows, f"{name}, {what}")


def beyond_rows(token: int, tokenizer: PreTrainedTokenizerBase, rows: int, where: str) -> UserError:
    text = tokenizer.convert_ids_to_tokens(token)
    named = f"the token {text!r}" if text else "a token"
    what = f"{named} has the id {token:,}, and the model's embeddings have {rows:,} rows"
    advice = "take the tokenizer that the model was saved with, or save the model with its embeddings resized"
    return UserError(what, where=where, expected=f"ids below {rows:,}", advice=advice)


def _special_ids(file: Path) -> dict[str, Any]:
    """Ids of special tokens as in the file: transformers drops or replaces some when it reads it."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: values[key] for key in map("{}_token_id".format, SPECIAL) if values.get(key) is not None}


def _conversation_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not tokenizer.chat_template:
        return []
    try:
        text = tokenizer.apply_chat_template(SAMPLE, tokenize=False)
    except Exception:  # a template may raise anything; reading the data will report what it cannot write
        return []
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def learned_positions(model: nn.Module) -> int | None:
    """Tokens that a model's table of positions has rows for; None if positions are computed."""
    for name, table in model.named_modules():
        if isinstance(table, nn.Embedding) and re.search(r"wpe|position|embed_pos", name):
            offset = getattr(table, "offset", None)
            reserved = offset if offset is not None else 0 if table.padding_idx is None else table.padding_idx + 1
            return int(table.num_embeddings - reserved)
    stored = [buffer for name, buffer in model.named_buffers() if name.endswith("embed_positions")]
    return len(stored[0]) if stored else None


def require_positions(model: nn.Module, length: int, where: str, advice: str) -> None:
    """Raises UserError: `length` tokens in a row have no positions in the model."""
    known = learned_positions(model)
    if known is not None and length > known:
        what = f"{length:,} tokens in a row, and the model's table of positions has {known:,} rows"
        raise UserError(what, where=where, expected=f"{known:,} tokens at most", advice=advice)


def require_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], new_tokens: int
) -> None:
    """Raises UserError: a prompt contains a token that the embeddings lack, or leaves no positions for its answer."""
    if not prompts:
        return
    rows = model.config.get_text_config().vocab_size
    for number, prompt in enumerate(prompts, 1):
        if max(prompt, default=0) >= rows:
            raise beyond_rows(max(prompt), tokenizer, rows, f"prompt {number}")
    longest = max(range(len(prompts)), key=lambda index: len(prompts[index]))
    where = f"prompt {longest + 1} and {new_tokens:,} new tokens"
    require_positions(model, len(prompts[longest]) + new_tokens, where, "shorten the prompt, or ask for fewer tokens")


def rotary_positions(config: Any) -> int | None:
    """Tokens that a model with rotary positions was made for, scaling included; None if it does not say."""
    text = config.get_text_config()
    trained, rope = getattr(text, "max_position_embeddings", None), getattr(text, "rope_parameters", None)
    if not rope or not trained:
        return None
    scaled = [trained]
    for settings in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if settings.get("rope_type", "default") != "default" and settings.get("factor"):
            scaled.append(int((settings.get("original_max_position_embeddings") or trained) * settings["factor"]))
    return int(max(scaled))
