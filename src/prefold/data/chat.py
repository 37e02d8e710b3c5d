"""Messages -> token ids by the model's chat template, and what happens to pairs that are too long.

The ids are the template's own. A prompt ends where the conversation stops being what the template writes to ask for an
answer (`add_generation_prompt=True`); everything after that is the completion, with the end token and what the template
writes behind it. No id is added, and none is dropped but by `truncate_prompt`.

Data in: `Preference`; data out: `TokenTree` with the completions `(chosen, rejected)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, cast

from jinja2.exceptions import TemplateError

from prefold.data.preference import Message, Preference, Problem, RowId
from prefold.errors import UserError
from prefold.recipe import Data
from prefold.trees.packing import TokenTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tokenized:
    """A pair as ids. `boundary` and `ending` name a finding, or are None where all is as it should be."""

    tree: TokenTree
    boundary: str | None
    ending: str | None
    origin: RowId


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that messages can become ids at all.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    try:
        tokenizer.get_chat_template()
    except ValueError:
        raise UserError(
            "the tokenizer has no chat template, so messages cannot become text",
            where=tokenizer.name_or_path or "model",
            expected="a chat (instruct) model, whose tokenizer brings its template",
            advice="name the instruct model of the same family in `model.name`",
        ) from None


def tokenize(preference: Preference, tokenizer: PreTrainedTokenizerBase) -> Tokenized | Problem:
    """Render a pair by the chat template.

    Returns a `Problem` where the template refuses the messages (some know no system message, or want strict turns) or
    leaves nothing to train on.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    require_chat_template(tokenizer)
    try:
        prompt = render(preference.prompt, tokenizer, add_generation_prompt=True)
        chosen = render(preference.prompt + preference.chosen, tokenizer)
        rejected = render(preference.prompt + preference.rejected, tokenizer)
    except (TemplateError, TypeError) as error:
        return Problem("template_refused", f"the chat template refuses it: {error}", preference.origin)
    # One prompt for both: what lies behind the shorter common beginning belongs to the completions.
    cut = min(_common_length(prompt, chosen), _common_length(prompt, rejected))
    completions = (tuple(chosen[cut:]), tuple(rejected[cut:]))
    if nothing := _nothing_to_learn(cut, completions):
        return Problem(*nothing, preference.origin)
    return Tokenized(
        tree=TokenTree(tuple(chosen[:cut]), completions),
        boundary=None if cut == len(prompt) else "prompt_not_prefix",
        ending=None if all(_has_end_token(ids, tokenizer) for ids in completions) else "no_end_token",
        origin=preference.origin,
    )


def fit(tokenized: Tokenized, data: Data) -> TokenTree | Problem:
    """The tree within `data.max_length` tokens of prompt and longer completion, by the policy `data.overlong`.

    A completion is never cut, so what cannot fit is a `Problem` also where prompts are truncated.
    """
    tree = tokenized.tree
    completion = max(map(len, tree.completions))
    length = len(tree.prompt) + completion
    if length <= data.max_length:
        return tree
    message = f"{length} tokens, more than `max_length` {data.max_length}"
    if data.overlong == "truncate_prompt":
        room = data.max_length - completion
        if room > 0:
            kept = min(room, data.max_prompt_length or room)
            return TokenTree(tree.prompt[-kept:], tree.completions)
        message = f"a completion of {completion} tokens leaves no room for a prompt in `max_length` {data.max_length}"
    return Problem("overlong", message, tokenized.origin)


def render(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False
) -> list[int]:
    """Token ids of a conversation as the chat template writes it, up to where an answer begins if one is asked for."""
    # verbose=False: transformers' remark on long sequences; `fit` sees to those.
    ids = tokenizer.apply_chat_template(
        [{"role": message["role"], "content": message["content"]} for message in messages],
        add_generation_prompt=add_generation_prompt,
        tokenize=True,
        return_dict=False,
        tokenizer_kwargs={"verbose": False},
    )
    return cast("list[int]", ids)


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _nothing_to_learn(cut: int, completions: tuple[tuple[int, ...], ...]) -> tuple[str, str] | None:
    """Kind and message of the problem of a pair whose rendering has no two different completions of a prompt."""
    if cut == 0:
        return "template_refused", "prompt and conversation have no token in common at their start"
    if not all(completions):
        return "template_refused", "the chat template writes nothing for an answer"
    if completions[0] == completions[1]:
        return "identical", "`chosen` and `rejected` become the same tokens"
    return None


def _has_end_token(completion: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the last token that is not white space is a special one, which is where generation stops."""
    for token in reversed(completion):
        text = cast(str, tokenizer.decode([token]))
        # What is shown only when special tokens are shown is one of them.
        if token == tokenizer.eos_token_id or (text and not tokenizer.decode([token], skip_special_tokens=True)):
            return True
        if text.strip():
            return False
    return False
