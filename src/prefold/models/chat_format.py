"""A chat format for a base model: the template, the tokens that it writes, and their rows in the embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor

from prefold.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]

MULTIPLE = 64
"""A matrix that has to grow gets a multiple of this many rows, for which matrix products on GPUs are fastest."""
NOISE = 0.01
"""Standard deviation of new rows around the mean of the old ones, as a share of that of the old ones."""

ANSWER = "answer"
SAMPLE = [{"role": "user", "content": "question"}, {"role": "assistant", "content": ANSWER}]


def set_chat_format(tokenizer: PreTrainedTokenizerBase, setting: str) -> list[int]:
    """Give a base model's tokenizer the chat template of `model.chat_template`, in memory, and make the token that ends
    a turn its end token. The pad token stays, or becomes the token that ended texts: it must not end a turn.

    Returns:
        The ids whose rows are to be trained: the special tokens that the template writes, except those with which the
        base model has learnt to begin and end a text.

    Raises:
        UserError: the template cannot be read or used.
    """
    learnt = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    padding = tokenizer.pad_token or tokenizer.eos_token
    if setting == "chatml":
        begins = cast("list[int]", tokenizer("")["input_ids"])[:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + CHATML
        tokenizer.add_special_tokens({"extra_special_tokens": CHATML_TOKENS}, replace_extra_special_tokens=False)
    else:
        try:
            tokenizer.chat_template = Path(setting).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            what = f"the template cannot be read ({getattr(error, 'strerror', None) or error})"
            raise UserError(what, where=setting, expected="a Jinja file, UTF-8") from None
    try:
        text = cast(str, tokenizer.apply_chat_template(SAMPLE, tokenize=False))
    except (TemplateError, TypeError) as error:
        raise UserError(f"the chat template cannot write a conversation: {error}", where=setting) from None
    if behind := _special_ids(text.rpartition(ANSWER)[2], tokenizer):
        tokenizer.eos_token = cast(str, tokenizer.convert_ids_to_tokens(behind[0]))
    tokenizer.pad_token = padding or tokenizer.eos_token
    return sorted(set(_special_ids(text, tokenizer)) - learnt)


def _special_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens in a text, in order."""
    special = {token for token, how in tokenizer.added_tokens_decoder.items() if how.special}
    special |= set(tokenizer.all_special_ids)
    ids = cast("list[int]", tokenizer(text, add_special_tokens=False)["input_ids"])
    return [token for token in ids if token in special]


def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, known: int) -> None:
    """Add rows for the tokens of a chat format, and set the model's end and pad tokens.

    Rows of new tokens, and padding rows of a grown matrix, begin near the mean of the old ones, where they take no
    probability from them. They are the same every time, so that base and adapter fit wherever they are loaded.

    Args:
        known: number of tokens before the chat format was added.
    """
    rows = vocabulary_rows(model)
    if len(tokenizer) > rows:
        with torch.random.fork_rng(range(torch.cuda.device_count()), device_type="cuda"):
            model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=MULTIPLE, mean_resizing=False)
    new = new_rows(tokenizer, known, rows)
    head: Any = model.get_output_embeddings()
    for values in {model.get_input_embeddings().weight, getattr(head, "weight", None), getattr(head, "bias", None)}:
        if values is not None:
            _begin_near_the_mean(cast(Tensor, values), new)
    _set_end(model, tokenizer)


def new_rows(tokenizer: PreTrainedTokenizerBase, known: int, rows: int) -> slice:
    """The new rows for the tokens of a chat format, in a matrix that had `rows`; see `fit_vocabulary`."""
    return slice(min(known, rows), None if len(tokenizer) > rows else len(tokenizer))


def grown(values: Tensor, rows: int, new: slice) -> Tensor:
    """A copy of a stored matrix or bias, extended as by `fit_vocabulary`."""
    fitted = values.new_empty((rows, *values.shape[1:]))
    fitted[: len(values)] = values
    _begin_near_the_mean(fitted, new)
    return fitted


def vocabulary_rows(model: PreTrainedModel) -> int:
    """Rows of the embeddings, those that pad the matrix included."""
    return len(cast(Tensor, model.get_input_embeddings().weight))


@torch.no_grad()
def _begin_near_the_mean(values: Tensor, new: slice) -> None:
    old = values[: new.start].float()
    noise = torch.randn(values[new].shape, generator=torch.Generator().manual_seed(0)).to(old.device)
    values[new] = (old.mean(0) + NOISE * old.std(0) * noise).to(values.dtype)


def _set_end(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Have generation stop at the end of a turn, and where the base model ended a text."""
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:  # a model that scores conversations writes none
        before = generation.eos_token_id if generation.eos_token_id is not None else model.config.eos_token_id
        stops = [tokenizer.eos_token_id, *(before if isinstance(before, list) else [before])]
        generation.eos_token_id = list(dict.fromkeys(stop for stop in stops if stop is not None))
        generation.pad_token_id = tokenizer.pad_token_id
    for config in (model.config, model.config.get_text_config()):
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
