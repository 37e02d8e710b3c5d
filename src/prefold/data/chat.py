"""Messages -> token ids by the model's chat template, and what happens to records that are too long.

The ids are the template's own. A prompt ends where the conversation stops being what the template writes to ask for an
answer (`add_generation_prompt=True`); everything after that is the completion, with the end token and what the template
writes behind it. No id is added, and none is dropped but by `truncate_prompt`.

With `data.template: none` a prompt is the tokenizer's ids of the bare text (with its BOS token, if it adds one), and a
completion goes on from there and ends with the EOS token.

Data in: a `Record`; data out: a `TokenTree` with a completion for each of its answers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Literal, cast

from jinja2.exceptions import TemplateError

from prefold.data.preference import Message, Problem, Record, RowId, Unfit
from prefold.errors import UserError
from prefold.recipe import Data
from prefold.trees.packing import TokenTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["chat", "none"]


@dataclass(frozen=True)
class Tokenized:
    """A record as ids. `oddities` name findings; there are none where all is as it should be."""

    tree: TokenTree
    oddities: tuple[str, ...]
    origin: RowId


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that messages can become ids at all. Raises UserError: the tokenizer has no chat template."""
    try:
        tokenizer.get_chat_template()
    except ValueError:
        raise UserError(
            "the tokenizer has no chat template, so messages cannot become text",
            where=tokenizer.name_or_path or "model",
            expected="a chat (instruct) model, whose tokenizer brings its template",
            advice="name the instruct model of the same family in `model.name`, or teach this one a chat format: "
            "`model.chat_template: chatml`",
        ) from None


def tokenize_all(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, template: Template = "chat"
) -> list[Tokenized | Problem]:
    """Records as ids, in their order; all texts meet the tokenizer in one call, which uses all cores.

    A `Problem` takes the place of a record where the template refuses the messages (some know no system message, or
    want strict turns) or leaves nothing to train on.
    """
    written = [_written(record, tokenizer, template) for record in records]
    texts = [text for of_record in written if not isinstance(of_record, Problem) for text in of_record]
    ids = iter(encode(texts, tokenizer, template))
    special = {token for token, how in tokenizer.added_tokens_decoder.items() if how.special}
    special.update(tokenizer.all_special_ids)
    return [
        of_record
        if isinstance(of_record, Problem)
        else _parted(record, [next(ids) for _ in of_record], tokenizer, special, template)
        for record, of_record in zip(records, written, strict=True)
    ]


def _written(record: Record, tokenizer: PreTrainedTokenizerBase, template: Template) -> list[str] | Problem:
    """The text of the prompt, and of the conversation with each of the answers."""
    try:
        prompt = _text(record.prompt, tokenizer, template, asks=True)
        conversations = [record.prompt + answer for answer in record.answers]
        return [prompt, *(_text(messages, tokenizer, template, asks=False) for messages in conversations)]
    except (TemplateError, TypeError) as error:
        return Problem("template_refused", f"the chat template refuses it: {error}", record.origin)
    except Unfit as unfit:
        return Problem(unfit.kind, unfit.message, record.origin)


def _parted(
    record: Record,
    ids_of_all: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    special: Collection[int],
    template: Template,
) -> Tokenized | Problem:
    prompt, *conversations = ids_of_all
    if template == "none":
        eos = cast(int, tokenizer.eos_token_id)
        conversations = [[*ids, eos] if ids[-1:] != [eos] else ids for ids in conversations]
    # One prompt for all: what lies behind the shortest common beginning belongs to the completions.
    cut = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(prompt, *conversations, strict=False)))
    completions = tuple(tuple(ids[cut:]) for ids in conversations)
    if cut == 0:
        what = "prompt and conversation have no token in common at their start"
        return Problem("template_refused", what, record.origin)
    if not all(completions):
        return Problem("template_refused", "the chat template writes nothing for an answer", record.origin)
    if len(set(completions)) < len(completions):
        return Problem("identical", "`chosen` and `rejected` become the same tokens", record.origin)
    tree = TokenTree(tuple(prompt[:cut]), completions)
    endings = [_ending(ids, tokenizer, special) for ids in completions]
    oddities = {
        "prompt_not_prefix": cut < len(prompt),
        "no_end_token": not all(endings),
        "double_end_token": any(len(set(ending[:2])) < len(ending[:2]) for ending in endings),
        "double_bos": prompt[:2] == [tokenizer.bos_token_id] * 2,
    }
    return Tokenized(tree, tuple(name for name, is_odd in oddities.items() if is_odd), record.origin)


def fit(tokenized: Tokenized, data: Data) -> TokenTree | Problem:
    """The tree within `data.max_length` tokens of prompt and longer completion, by the policy `data.overlong`.

    A completion is never cut, so what cannot fit is a `Problem` also where prompts are truncated.
    """
    tree = tokenized.tree
    completion = max(map(len, tree.completions), default=0)
    length = len(tree.prompt) + completion
    if length <= data.max_length:
        return tree
    message = f"{length} tokens, more than `max_length` {data.max_length}"
    if data.overlong == "truncate_prompt":
        left = data.max_length - completion
        if left > 0:
            kept = min(left, data.max_prompt_length or left)
            return replace(tree, prompt=tree.prompt[-kept:])
        message = f"a completion of {completion} tokens leaves no room for a prompt in `max_length` {data.max_length}"
    return Problem("overlong", message, tokenized.origin)


def render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: Template = "chat") -> list[int]:
    """Token ids of a conversation up to where the model's answer begins."""
    return encode([_text(messages, tokenizer, template, asks=True)], tokenizer, template)[0]


def _text(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: Template, asks: bool) -> str:
    if template == "chat":
        turns = [{"role": message["role"], "content": message["content"]} for message in messages]
        return cast(str, tokenizer.apply_chat_template(turns, add_generation_prompt=asks, tokenize=False))
    roles = [message["role"] for message in messages]
    if roles != ["user", "assistant"][: 1 if asks else 2]:
        raise Unfit("template_refused", f"`data.template: none` takes one text and its answer, not {', '.join(roles)}")
    return "".join(message["content"] for message in messages)


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, template: Template = "chat") -> list[list[int]]:
    """Ids of each text; with special tokens of the tokenizer's own only where no template writes any."""
    if not texts:
        return []
    # verbose=False: transformers' remark on long sequences; `fit` sees to those.
    ids = tokenizer(list(texts), add_special_tokens=template == "none", verbose=False)["input_ids"]
    return cast("list[list[int]]", ids)


def _ending(completion: Sequence[int], tokenizer: PreTrainedTokenizerBase, special: Collection[int]) -> list[int]:
    """The special tokens that a completion ends with, white space between them left out; the last comes first."""
    ending = []
    for token in reversed(completion):
        if token in special:
            ending.append(token)
        elif cast(str, tokenizer.decode([token])).strip():
            break
    return ending
