"""Which tokens of an answer of several turns are scored: those that the assistant writes, in turns without `weight: 0`.

The template is rendered twice for each of the assistant's turns: for the conversation before it, with a generation
prompt, and for the conversation that ends with it. Both are located in the ids of the whole conversation. If the
template writes a turn differently once others follow, its end is located by its end token and its own words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Any, cast

from prefold.data.preference import Message, Messages, Unfit, call_texts
from prefold.trees.packing import Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THOUGHT = re.compile(r"</?think(?:ing)?>|\[/?THINK\]")
EMPTY_THOUGHT = re.compile(r"\s*<think(ing)?>\s*</think(?(1)ing)>\s*")


def is_written(words: str, text: str) -> bool:
    """Whether a text contains some words: as they are, as JSON, or with other white space, also around thoughts."""
    if words.strip() in text or any(json.dumps(words, ensure_ascii=how)[1:-1] in text for how in (False, True)):
        return True
    squeezed = "".join(text.split())
    return all("".join(piece.split()) in squeezed for piece in THOUGHT.split(words))


def common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """The length of the common prefix of two sequences."""
    if second[: len(first)] == first:
        return len(first)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


class Vocabulary:
    """What the ids of a tokenizer stand for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self.special = {*tokenizer.all_special_ids, *(token for token, how in added if how.special)}

    def text(self, ids: Sequence[int]) -> str:
        return cast(str, self._tokenizer.decode(list(ids)))

    def ending(self, ids: Sequence[int]) -> list[int]:
        """The special tokens at the end of `ids`, the last one first; white space between them is skipped."""
        end = takewhile(lambda token: token in self.special or not self.text([token]).strip(), reversed(ids))
        return [token for token in end if token in self.special]


def context_of(
    answer: Messages, ids: list[int], cut: int, steps: Sequence[tuple[list[int], list[int]]], vocabulary: Vocabulary
) -> tuple[Span, ...]:
    """Spans of the tokens of an answer that are read and not scored, relative to its start.

    Args:
        ids: of the whole conversation, whose first `cut` are the prompt.
        steps: for each of the assistant's turns, the ids of the conversation before it with a generation prompt, and
            of the conversation up to its end.

    Raises:
        Unfit: the template writes turns differently once others follow, so that their tokens cannot be located.
    """
    numbers = [number for number, turn in enumerate(answer) if turn["role"] == "assistant"]
    context: list[Span] = []
    end = cut
    for position, (number, (asked, until)) in enumerate(zip(numbers, steps, strict=True)):
        start = cut
        if position:
            start = _start(ids, end, asked, steps[position - 1][1])
            between = vocabulary.text(ids[end:start])
            if not all(is_written(turn["content"], between) for turn in answer[numbers[position - 1] + 1 : number]):
                raise _unknown()
            context.append((end - cut, start - cut))
        end = len(ids)
        if position < len(numbers) - 1:
            # If the prompt of the next turn is not in `ids`, this turn may be as long as what is left.
            limit = common(ids, steps[position + 1][0])
            left = ids[start : limit if limit > start else len(ids)]
            end = start + _length(answer[number], left, until[common(asked, until) :], vocabulary)
        if "weight" in answer[number]:
            context.append((start - cut, end - cut))
    return tuple(_joined(context))


def _joined(spans: Sequence[Span]) -> list[Span]:
    """The spans without empty ones, and with adjacent ones merged."""
    joined: list[Span] = []
    for start, stop in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        elif start < stop:
            joined.append((start, stop))
    return joined


def _start(ids: Sequence[int], end: int, asked: list[int], before: list[int]) -> int:
    """The index of a turn's first token. `asked`: the ids up to it, rendered alone; `end`: where the turn before it
    ends in `ids`; `before`: the ids up to there, rendered alone."""
    if (start := common(ids, asked)) >= end:
        return start
    # The template writes something before `end` differently: only what follows the earlier turn is compared.
    if common(asked, before) < len(before) - 1:
        raise _unknown()
    return end + common(ids[end:], asked[len(before) :])


def _length(turn: Message, ids: list[int], own: list[int], vocabulary: Vocabulary) -> int:
    """How many of the first `ids` are the turn, which the template writes as `own` if nothing follows it."""
    same, special = common(ids, own), vocabulary.special
    rest = own[same:]
    if all(token in special or not vocabulary.text([token]).strip() for token in rest):
        if not rest or vocabulary.ending(own[:same]):
            return same
        if same < len(ids) and ids[same] in special:  # the end token of turns that others follow
            return same + 1
    words = [turn["content"], *(text for call in turn.get("tool_calls", ()) for text in call_texts(call))]
    trailing = list(takewhile(lambda token: token not in special, reversed(own)))[::-1]
    for length in _lengths(ids, vocabulary.ending(own), special):
        text = vocabulary.text(ids[:length])
        if all(is_written(word, text) for word in words):
            return length + len(trailing) if ids[length : length + len(trailing)] == trailing else length
    raise _unknown()


def _lengths(ids: Sequence[int], marks: Sequence[int], special: Collection[int]) -> Iterator[int]:
    """Lengths that a turn may have: up to a token that ends it alone, else up to the first of two special tokens."""
    for mark in marks:
        yield from (index + 1 for index, token in enumerate(ids) if token == mark)
    yield from (index + 1 for index, pair in enumerate(pairwise(ids)) if pair[0] in special and pair[1] in special)


def _unknown() -> Unfit:
    what = "the chat template writes a turn differently once others follow, so its tokens cannot be located"
    return Unfit("template_refused", what)
