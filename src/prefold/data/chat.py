"""Messages -> token ids by the model's chat template, and what happens to records that are too long.

The ids are the template's own. The prompt is the longest prefix that the conversations share with the prompt rendered
with `add_generation_prompt=True`; everything after it is the completion, including the end token and what the template
writes after that. No id is added, and none is dropped except by `truncate_prompt`.

With `data.template: none` a prompt is the tokenizer's ids of the bare text (with its BOS token, if it adds one), and a
completion continues it and ends with the EOS token.

Data in: a `Record`; data out: a `TokenTree` with a completion for each of its answers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from prefold.data.preference import REASONING, Message, Problem, Record, RowId, Unfit, call_texts, short, texts_of
from prefold.data.spans import EMPTY_THOUGHT, THOUGHT, Vocabulary, common, context_of, is_written
from prefold.data.templates import REFUSALS, Reads, reads
from prefold.errors import UserError
from prefold.recipe import Data
from prefold.trees.packing import TokenTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["chat", "none"]


@dataclass(frozen=True)
class Tokenized:
    """A record as token ids. `oddities`: kinds of findings, empty if nothing is odd. `details`: what exactly is
    odd, for some of these kinds."""

    tree: TokenTree
    oddities: tuple[str, ...]
    origin: RowId
    details: dict[str, str] = field(default_factory=dict, compare=False)


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError: the tokenizer has no chat template."""
    try:
        tokenizer.get_chat_template()
    except ValueError:
        what, where = "the tokenizer has no chat template, so messages cannot become text", tokenizer.name_or_path
        expected = "a chat (instruct) model, whose tokenizer brings its template"
        advice = "name the instruct model of the same family in `model.name`, or teach this one a chat format: "
        advice += "`model.chat_template: chatml`"
        raise UserError(what, where=where or "model", expected=expected, advice=advice) from None


def tokenize_all(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, template: Template = "chat"
) -> list[Tokenized | Problem]:
    """Tokenize records, in order. The tokenizer is called once for all texts, so that it uses all cores.

    A `Problem` replaces a record if the template refuses its messages (some take no system message, or require
    alternating turns), does not write all of them, or leaves nothing to train on.
    """
    writer = Writer(tokenizer, template)
    written = [writer.written(record) for record in records]
    texts = [text for rendered in written if not isinstance(rendered, Problem) for text in rendered.texts]
    ids, vocabulary = iter(encode(texts, tokenizer, template)), Vocabulary(tokenizer)
    eos = cast(int, tokenizer.eos_token_id) if template == "none" else None
    return [
        rendered
        if isinstance(rendered, Problem)
        else _tokenized(record, rendered, [next(ids) for _ in rendered.texts], vocabulary, tokenizer.bos_token_id, eos)
        for record, rendered in zip(records, written, strict=True)
    ]


@dataclass(frozen=True)
class _Rendered:
    """A record as rendered texts: the prompt, with its generation prompt; the conversation with each of the answers;
    and for each answer of several turns, two texts for each turn of the assistant (see `spans`)."""

    prompt: str
    conversations: list[str]
    steps: list[list[tuple[str, str]]]
    details: dict[str, str]

    @property
    def texts(self) -> list[str]:
        return [self.prompt, *self.conversations, *(text for steps in self.steps for step in steps for text in step)]


class Writer:
    """Renders messages as text, and notices what the template leaves out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template = "chat"):
        self._tokenizer, self._template = tokenizer, template
        self._reads = reads(tokenizer) if template == "chat" else Reads(frozenset(), frozenset())
        self._reads_reasoning = not self._reads.fields.isdisjoint(REASONING)
        self._ignores_generation_prompt: dict[str, bool] = {}

    def written(self, record: Record) -> _Rendered | Problem:
        try:
            prompt = self.text(record.prompt, record.template_kwargs, asks=True)
            conversations = [self.text(record.prompt + answer, record.template_kwargs) for answer in record.answers]
            steps = [self._steps(record, answer) if len(answer) > 1 else [] for answer in record.answers]
            details = self._unread(record)
            if self._template == "chat":
                details |= self._text_oddities(record, prompt, conversations)
            return _Rendered(prompt, conversations, steps, details)
        except Unfit as unfit:
            return unfit.at(record.origin)
        except REFUSALS as error:
            return Problem("template_refused", f"the chat template refuses it: {error}", record.origin)

    def text(self, messages: Sequence[Message], given: dict[str, Any], asks: bool = False) -> str:
        """Render messages. Raises one of `REFUSALS`, or Unfit: the template cannot write them."""
        if self._template == "none":
            roles = [message["role"] for message in messages]
            if roles != ["user", "assistant"][: 1 if asks else 2]:
                what = f"`data.template: none` takes one text and its answer, not {', '.join(roles)}"
                raise Unfit("template_refused", what)
            return "".join(message["content"] for message in messages)
        turns = [self._renamed(message) if len(message) > 2 else message for message in messages]
        calls = [call["function"]["arguments"] for turn in turns for call in turn.get("tool_calls", ())]
        refusal: Exception = TypeError("it writes the arguments of tool calls as Python does")
        try:
            text = self._apply(turns, given, asks)
            as_python = [str(arguments) for arguments in calls if str(arguments) != json.dumps(arguments)]
            if not any(arguments in text for arguments in as_python):
                return text
        except REFUSALS as error:
            if not calls:
                raise
            refusal = error
        try:  # some templates expect arguments as text
            return self._apply(list(map(_with_text_arguments, turns)), given, asks)
        except REFUSALS:
            raise refusal from None

    def _apply(self, turns: Sequence[Message], given: dict[str, Any], asks: bool) -> str:
        settings: dict[str, Any] = {"add_generation_prompt": asks, "tokenize": False}
        given = {name: value for name, value in given.items() if name in self._reads.variables}
        return cast(str, self._tokenizer.apply_chat_template(list(turns), **{**given, **settings}))

    def _steps(self, record: Record, answer: Sequence[Message]) -> list[tuple[str, str]]:
        given = record.template_kwargs
        ends = [len(record.prompt) + number for number, turn in enumerate(answer) if turn["role"] == "assistant"]
        turns = [*record.prompt, *answer]
        return [(self.text(turns[:end], given, asks=True), self.text(turns[: end + 1], given)) for end in ends]

    def _renamed(self, message: Message) -> Message:
        """The message with its reasoning under a name that the template reads."""
        unread = [name for name in REASONING if name in message and name not in self._reads.fields]
        readable = [name for name in REASONING if name in self._reads.fields and name not in message]
        if not (unread and readable):
            return message
        return {readable[0] if name == unread[0] else name: value for name, value in message.items()}

    def _unread(self, record: Record) -> dict[str, str]:
        """The fields and keywords that the template does not read, as the detail of an oddity."""
        parts = (record.prompt, *record.answers)
        names = dict.fromkeys(name for part in parts for message in part if len(message) > 2 for name in message)
        if self._reads_reasoning:
            names = {name: None for name in names if name not in REASONING}
        unread = [name for name in names if name not in ("role", "content", "weight", *self._reads.fields)]
        unread += [name for name in record.template_kwargs if name not in self._reads.variables]
        return {"unread_field": ", ".join(f"`{short(name)}`" for name in unread)} if unread else {}

    def _text_oddities(self, record: Record, prompt: str, conversations: Sequence[str]) -> dict[str, str]:
        """What is odd about the texts, as details of oddities. Raises Unfit: a tool call or what a tool returned is not
        written whole, or the prompt is written differently once an answer follows."""
        details = _dropped([turn for turn in record.prompt if turn["role"] != "assistant"], prompt)
        _require_calls(record.prompt, prompt)
        for answer, conversation in zip(record.answers, conversations, strict=True):
            if conversation.startswith(prompt):
                rest = conversation[len(prompt) :]
                if header := self._header(record, answer[0], rest, prompt):
                    details["header_trained"] = quoted(header)
                written = EMPTY_THOUGHT.match(rest)
                if written and not EMPTY_THOUGHT.match(answer[0]["content"]):
                    details["empty_thought"] = quoted(written[0])
            else:
                rest = conversation
                self._require_same_prompt(record, prompt, conversation)
            details |= _dropped(answer, rest, REASONING if self._reads_reasoning else ())
            _require_calls(answer, rest)
        return details

    def _header(self, record: Record, turn: Message, rest: str, prompt: str) -> str:
        """What the template writes before the answer if it ignores `add_generation_prompt`; else empty."""
        own = [words[:20] for text in texts_of(turn) for words in THOUGHT.split(text.strip()) if words]
        header = rest[: min((rest.find(words) for words in own if words in rest), default=0)]
        if not header.strip():
            return ""
        role = record.prompt[-1]["role"]
        if role not in self._ignores_generation_prompt:
            self._ignores_generation_prompt[role] = self.text(record.prompt, record.template_kwargs) == prompt
        return header if self._ignores_generation_prompt[role] and not turn.get("tool_calls") else ""

    def _require_same_prompt(self, record: Record, prompt: str, conversation: str) -> None:
        """Raises Unfit: the conversation does not begin with the prompt, even without a generation prompt."""
        alone = self.text(record.prompt, record.template_kwargs)
        left = alone[common(alone, conversation) :]
        for token in self._tokenizer.all_special_tokens:
            left = left.replace(token, "")
        if left.strip():
            words = quoted(conversation[common(prompt, conversation) :])
            what = "the chat template writes the prompt differently once an answer follows, so it would be trained on"
            raise Unfit("template_refused", f"{what}: {words}")


def _with_text_arguments(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": text}})
    return {**message, "tool_calls": calls}


def _dropped(turns: Sequence[Message], text: str, reasoning: Sequence[str] = ()) -> dict[str, str]:
    """The detail of an oddity if a text lacks words of the messages. Raises Unfit: it lacks what a tool returned."""
    details = {}
    for turn in turns:
        for name in ("content", *reasoning):
            words = turn.get(name, "")
            if words.strip() in text or is_written(words, text):
                continue
            if turn["role"] == "tool":
                what = f"the chat template does not write what a tool returned: {quoted(words)}"
                raise Unfit("template_refused", what)
            details["text_dropped"] = f"`{name}` of the {turn['role']}, such as {quoted(words)}"
    return details


def _require_calls(turns: Sequence[Message], text: str) -> None:
    for words in [words for turn in turns for call in turn.get("tool_calls", ()) for words in call_texts(call)]:
        if not is_written(words, text):
            what = f"the chat template does not write a tool call whole: {quoted(words)} is not there"
            raise Unfit("template_refused", what)


def _tokenized(
    record: Record,
    written: _Rendered,
    ids_of_all: Sequence[list[int]],
    vocabulary: Vocabulary,
    bos: int | None,
    eos: int | None,
) -> Tokenized | Problem:
    """`eos` ends the answers if no template does."""
    number = len(record.answers)
    prompt, conversations = ids_of_all[0], list(ids_of_all[1 : number + 1])
    step_ids = iter(ids_of_all[number + 1 :])
    if eos is not None:
        conversations = [[*ids, eos] if ids[-1:] != [eos] else ids for ids in conversations]
    # All completions share one prompt: whatever follows the shortest common prefix belongs to them.
    cut = min((common(prompt, ids) for ids in conversations), default=len(prompt))
    completions = tuple(tuple(ids[cut:]) for ids in conversations)
    try:
        if cut == 0:
            raise Unfit("template_refused", "prompt and conversation have no token in common at their start")
        if not all(completions):
            raise Unfit("template_refused", "the chat template writes nothing for an answer")
        if len(set(completions)) < len(completions):
            raise Unfit("identical", "`chosen` and `rejected` become the same tokens")
        context = [
            context_of(answer, ids, cut, [(next(step_ids), next(step_ids)) for _ in steps], vocabulary) if steps else ()
            for answer, ids, steps in zip(record.answers, conversations, written.steps, strict=True)
        ]
        tree = TokenTree(tuple(prompt[:cut]), completions, tuple(context) if any(context) else ())
        if tree.context:
            scored_ids = {tuple(ids[i] for i in scored) for ids, scored in zip(completions, tree.scored, strict=True)}
            if len(scored_ids) < len(completions):
                what = "the assistant says the same in `chosen` and `rejected`, and what others say in between differs"
                raise Unfit("identical", what)
    except Unfit as unfit:
        return unfit.at(record.origin)
    endings = list(map(vocabulary.ending, completions))
    details = dict(written.details)
    if cut < len(prompt):
        details["prompt_not_prefix"] = _differing(prompt[cut:], completions[0], record.answers[0][0], vocabulary)
    oddities = {
        "prompt_not_prefix": cut < len(prompt),
        "no_end_token": not all(endings),
        "double_end_token": any(len(set(ends[:2])) < len(ends[:2]) for ends in endings),
        "double_bos": prompt[:2] == [bos] * 2,
        **dict.fromkeys(written.details, True),
    }
    return Tokenized(tree, tuple(name for name, is_odd in oddities.items() if is_odd), record.origin, details)


def _differing(asked: Sequence[int], completion: Sequence[int], turn: Message, vocabulary: Vocabulary) -> str:
    """How generation and training differ if the prompt is not a prefix of the conversation."""
    asks, trained = vocabulary.text(asked), vocabulary.text(completion[:200])
    words = turn["content"].strip()[:20]
    header = trained.partition(words)[0] if words and words in trained else trained[:20]
    return f"generation reads {quoted(asks)} where training writes {quoted(header)} before the answer"


def fit(tokenized: Tokenized, data: Data) -> TokenTree | Problem:
    """Fit the prompt and the longest completion into `data.max_length` tokens, by the policy `data.overlong`.

    A completion is never cut, so even truncating the prompt may leave a `Problem`.
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


def render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    template: Template = "chat",
    given: dict[str, Any] | None = None,
) -> list[int]:
    """Token ids of messages and a generation prompt; `given`: the row's `template_kwargs`."""
    text = Writer(tokenizer, template).text(messages, given or {}, asks=True)
    return encode([text], tokenizer, template)[0]


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, template: Template = "chat") -> list[list[int]]:
    """Token ids of each text; the tokenizer adds its special tokens only if no template writes them."""
    if not texts:
        return []
    # verbose=False: no warning about long sequences, which `fit` deals with.
    ids = tokenizer(list(texts), add_special_tokens=template == "none", verbose=False)["input_ids"]
    return cast("list[list[int]]", ids)


def quoted(text: str) -> str:
    """A text as messages show it, on one line."""
    return json.dumps(text if len(text) <= 60 else text[:60] + "...", ensure_ascii=False)
