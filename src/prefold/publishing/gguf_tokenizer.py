"""A tokenizer as the metadata of a GGUF file: tokens, their types, merges or scores, special ids, chat template.

llama.cpp knows pre-tokenizers, which split text before the merges, by name only; a tokenizer whose pre-tokenizer has no
name there is refused. Supported are byte-level BPE (Llama 3, Qwen, Mistral's Tekken, SmolLM2) and sentencepiece BPE
(Llama 2, Mistral 7B).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from prefold.errors import UserError

SPLITS = {GGUF_PRE_TOKENIZER_SPLITS[name]: name for name in ("llama-bpe", "qwen2", "tekken", "gpt-4o", "qwen35")}
"""llama.cpp's names of pre-tokenizers by their regular expressions; transformers reads files by the same table."""
GPT2, DIGITS = "gpt-2", "smollm"
"""llama.cpp's names of GPT-2's pre-tokenizer, and of the one that splits off every digit first."""
SPACE = "\u2581"
"""What sentencepiece writes for a space."""
LOWEST = -1e4
"""Score of tokens that no merge makes; they are looked up whole."""


@dataclass(frozen=True)
class Vocabulary:
    """`pieces`: ids by token; `special`: added tokens by id; `cuts`: llama.cpp's name of the pre-tokenizer, None for
    sentencepiece, which has none."""

    pieces: dict[str, int]
    merges: list[tuple[str, str]]
    special: dict[int, dict[str, Any]]
    cuts: str | None


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, where: str) -> Vocabulary:
    """The vocabulary of a tokenizer. Raises UserError: llama.cpp has no such tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = json.loads(backend.to_str()) if backend is not None else {}
    model = described.get("model", {})
    if model.get("type") != "BPE":
        kind = model.get("type") or type(tokenizer).__name__
        raise _unknown(f"its tokenizer is of the kind {kind}", where)
    halves = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merges = [(left, right) for left, right in halves]
    special = {token["id"]: token for token in described["added_tokens"]}
    sentencepiece = bool(model.get("byte_fallback"))
    return Vocabulary(model["vocab"], merges, special, None if sentencepiece else _cuts(described, where))


def _cuts(described: dict[str, Any], where: str) -> str:
    steps = described.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds, level = [step.get("type") for step in steps], steps[-1]
    if kinds[-1] == "ByteLevel" and not level["add_prefix_space"]:
        if level["use_regex"] and kinds == ["ByteLevel"]:
            return GPT2
        if level["use_regex"] and kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
            return DIGITS
        expression = steps[0].get("pattern", {}).get("Regex") if kinds == ["Split", "ByteLevel"] else None
        if not level["use_regex"] and expression in SPLITS and steps[0]["behavior"] == "Isolated":
            return SPLITS[expression]
    raise _unknown("its tokenizer cuts text in a way that has no name there", where)


def _unknown(what: str, where: str) -> UserError:
    expected = "byte-level BPE cut as in Llama 3, Qwen, Mistral, GPT-2 or SmolLM2, or sentencepiece BPE"
    return UserError(f"cannot become GGUF: {what}", where=where, expected=expected, advice="leave `gguf` out")


def add_vocabulary(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int, where: str) -> None:
    """Write a tokenizer to a file. `rows`: how many the embeddings have; those without a token get an unused one.
    Raises UserError: see `read_vocabulary`, or a token has no row."""
    vocabulary = read_vocabulary(tokenizer, where)
    if max(*vocabulary.pieces.values(), *vocabulary.special, 0) >= rows:
        what = f"cannot become GGUF: its tokenizer has tokens that its {rows} embeddings do not"
        raise UserError(what, where=where, advice="leave `gguf` out")
    tokens, kinds = _tokens(vocabulary, rows)
    writer.add_tokenizer_model("gpt2" if vocabulary.cuts else "llama")
    writer.add_tokenizer_pre(vocabulary.cuts or "default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if vocabulary.cuts:
        writer.add_token_merges([" ".join(merge) for merge in vocabulary.merges])
    else:
        writer.add_token_scores(_scores(vocabulary, tokens))
        writer.add_add_space_prefix(tokenizer.tokenize("a")[0].startswith(SPACE))
    for name in ("bos", "eos", "unk", "pad"):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    ids: Any = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(len(ids) > 1 and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(ids) > 1 and ids[-1] == tokenizer.eos_token_id)
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _tokens(vocabulary: Vocabulary, rows: int) -> tuple[list[str], list[TokenType]]:
    tokens, kinds = [f"[PAD{row}]" for row in range(rows)], [TokenType.UNUSED] * rows
    for piece, row in vocabulary.pieces.items():
        tokens[row], kinds[row] = piece, TokenType.NORMAL
        if vocabulary.cuts is None and len(piece) == 6 and piece.startswith("<0x"):
            kinds[row] = TokenType.BYTE
    for row, token in vocabulary.special.items():
        tokens[row] = token["content"]
        kinds[row] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        if vocabulary.cuts is None and token["content"] == "<unk>":
            kinds[row] = TokenType.UNKNOWN
    return tokens, kinds


def _scores(vocabulary: Vocabulary, tokens: list[str]) -> list[float]:
    """The order of the merges as sentencepiece has it: as scores of the tokens that they make."""
    made: dict[str, float] = {}
    for left, right in vocabulary.merges:
        made.setdefault(left + right, -float(len(made)))
    lowest = min(LOWEST, -float(len(made)))
    return [made.get(token, lowest) for token in tokens]
