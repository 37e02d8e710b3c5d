"""Loading a model's tokenizer by the name that a recipe gives, without the code of models, which takes seconds to
import.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from prefold.data.templates import give_keywords
from prefold.errors import UserError
from prefold.files import read_json
from prefold.models.chat_format import set_chat_format
from prefold.models.fetch import fetch
from prefold.models.messages import reading
from prefold.recipe import Model

VOCABULARY_FILES = ("tokenizer.json", "vocab.*", "*.model*", "*.tiktoken", "tekken.json")
"""Without any of these transformers can make an empty tokenizer of the class that tokenizer_config.json names."""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; a missing pad token becomes the end token, in memory only. Raises UserError if
    there is none, or it cannot be read."""
    if not has_tokenizer(folder):
        what = "the model folder has no tokenizer"
        raise UserError(what, where=folder.name, expected=f"a file like {', '.join(VOCABULARY_FILES)}")
    if (config := folder / "config.json").is_file():
        with reading("its configuration cannot be read", folder.name):
            read_json(config)
    # The tokenizers library raises plain `Exception` for a file that it cannot read.
    with reading("its tokenizer cannot be loaded", folder.name, (Exception,)):
        settings: Any = {"config": plain} if (plain := _plain_config(folder)) else {}
        tokenizer = AutoTokenizer.from_pretrained(folder, **settings, local_files_only=True, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _plain_config(folder: Path) -> PreTrainedConfig | None:
    """The model's configuration without its own class, whose import takes two seconds and is not needed if the
    tokenizer's files name their class; None if they do not."""
    try:
        named = read_json(folder / "tokenizer_config.json")
        if not named.get("tokenizer_class") or "auto_map" in named:
            return None
        config = PreTrainedConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, AttributeError):
        return None
    config.name_or_path = str(folder)
    return config


def has_tokenizer(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in VOCABULARY_FILES)


def tokenizer_of(section: Model) -> PreTrainedTokenizerBase:
    """The tokenizer of a model in a recipe, with the chat format that the model is to learn, and the keywords of its
    template. Raises UserError: there is none, it cannot be read, or its template does not use the keywords."""
    tokenizer = load_tokenizer(fetch(section.name, section.revision, weights=False))
    if section.chat_template:
        set_chat_format(tokenizer, section.chat_template)
    give_keywords(tokenizer, section.chat_template_kwargs)
    return tokenizer


def chat_tokens(section: Model) -> list[int]:
    """Ids of the tokens of a new chat format, whose rows of the embeddings are trained."""
    if not section.chat_template:
        return []
    return set_chat_format(load_tokenizer(fetch(section.name, section.revision, weights=False)), section.chat_template)
