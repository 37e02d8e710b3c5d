"""The records that rows become, and the checks of single cells: texts, messages, prompts, answers.

Only `shapes` knows which columns contain what.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from prefold.errors import json_type

Message = dict[str, Any]
"""`role`, `content` (text), and a turn's other fields in the file, such as `reasoning_content` and `tool_calls`."""


@dataclass(frozen=True)
class RowId:
    """Where a row came from: the source as the recipe names it, and its 1-based row (for JSON lines: its line)."""

    source: str
    row: int

    def __str__(self) -> str:
        return f"{self.source}, row {self.row}"


Messages = tuple[Message, ...]


@dataclass(frozen=True)
class Preference:
    """One pair: a prompt (messages, the last one not the assistant's) and two answers (messages that follow it).

    `ratings` are the numbers that the row gives to chosen and rejected, if any.
    """

    prompt: Messages
    chosen: Messages
    rejected: Messages
    origin: RowId
    ratings: tuple[float, float] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """The keywords that the row passes to the chat template: `tools`, and its `chat_template_kwargs`."""

    @property
    def answers(self) -> tuple[Messages, ...]:
        return self.chosen, self.rejected


@dataclass(frozen=True)
class Unpaired:
    """One answer and whether it is wanted (`label`)."""

    prompt: Messages
    completion: Messages
    label: bool
    origin: RowId
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def answers(self) -> tuple[Messages, ...]:
        return (self.completion,)


@dataclass(frozen=True)
class Prompt:
    """A prompt without an answer. `columns` are the other columns of its row, as they were read."""

    prompt: Messages
    columns: dict[str, Any]
    origin: RowId
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def answers(self) -> tuple[Messages, ...]:
        return ()


Record = Preference | Unpaired | Prompt


def whole_prompt(record: Record) -> Messages:
    """The prompt, and the keywords for the template as one more message: with other tools it is another prompt."""
    given = record.template_kwargs
    as_message = ({"role": "template", "content": json.dumps(given, sort_keys=True, default=str)},) if given else ()
    return record.prompt + as_message


def messages_key(*parts: Sequence[Message]) -> str:
    """A text that is the same exactly for equal messages, whatever the order of their fields."""
    return json.dumps([list(map(_message_key, part)) for part in parts], sort_keys=True, default=str)


def _message_key(message: Message) -> tuple[Any, ...]:
    """This must not change for a message without further fields: it decides which prompts are held out."""
    further = {name: value for name, value in message.items() if name not in ("role", "content")}
    return (message["role"], message["content"], *([further] if further else []))


def texts_of(message: Message) -> list[str]:
    """Every text of a message: its content, its reasoning, and the names and arguments of its tool calls."""
    calls = [text for call in message.get("tool_calls", ()) for text in call_texts(call)]
    return [message[name] for name in ("content", *REASONING) if name in message] + calls


def call_texts(call: dict[str, Any]) -> list[str]:
    """The name of a tool that is called, and the strings and numbers of its arguments."""
    return [call["function"]["name"], *_leaves(call["function"]["arguments"])]


def _leaves(value: Any) -> list[str]:
    if isinstance(value, dict | list):
        return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in _leaves(item)]
    # Templates write true, false and null in several ways.
    return [str(value)] if isinstance(value, str | int | float) and not isinstance(value, bool) else []


@dataclass(frozen=True)
class Problem:
    """Why a row cannot be used, or what is odd about one that is used. `kind` is that of the finding that counts it."""

    kind: str
    message: str
    origin: RowId


ROLES = ("system", "user", "assistant")
_ROLE_NAMES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatgpt"),
    "tool": ("tool", "function", "observation", "ipython", "tool_response"),
}
_ROLE_OF = {name: role for role, names in _ROLE_NAMES.items() for name in names}
_CALL_TURNS = ("function_call", "tool_call")
"""Roles that some files give to a turn of the assistant that is only a tool call, written as JSON text."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields for the assistant's reasoning before its answer; a template reads one or two of them."""
_SAID = ("role", "content", *REASONING, "tool_calls")
_WEIGHTS = ("weight", "train", "loss")
"""Fields that say in files whether a turn is trained on; a `Message` has only the first, and only with the value 0."""
_MEDIA = re.compile(r"(?:input_)?(?:image|video|audio)(?:s|_url)?")

Writing = Literal["plain", "ShareGPT", "ChatML", "transcripts"]
"""How turns are written: {role, content} and bare text; {from, value}; or strings that hold whole dialogues."""


class Unfit(Exception):
    """Ends the conversion of a row that cannot be used; `kind` is that of the `Problem`. `advice`: what to do if many
    rows of a source are like that, so that it is refused."""

    def __init__(self, kind: str, message: str, advice: str = ""):
        self.kind, self.message, self.advice = kind, message, advice

    def at(self, origin: RowId) -> Problem:
        return Problem(self.kind, self.message, origin)


def role_of(name: Any) -> str | None:
    """The role for a file's name of a speaker; None if the name is not known."""
    return "assistant" if name in _CALL_TURNS else _ROLE_OF.get(name.lower()) if isinstance(name, str) else None


def messages(value: Any, where: str, writing: Writing = "plain") -> list[Message]:
    """A list of turns as messages. Raises Unfit: it is no list, has no turns, or a turn cannot be used."""
    if not isinstance(value, list):
        raise Unfit("bad_message", f"{where} is {json_type(value)}, not a list of messages")
    if not value:
        raise Unfit("empty_text", f"{where} has no messages")
    return [_turn(item, f"{where}, message {number}", writing) for number, item in enumerate(value, start=1)]


def message(role: str, text: Any, where: str, may_be_empty: bool = False) -> Message:
    """A message with this text. Raises Unfit: it is not text, is empty, or cannot be encoded as UTF-8."""
    if not isinstance(text, str):
        raise Unfit("not_text", f"{where} is {json_type(text)}, not text")
    if not text.strip() and not may_be_empty:
        raise Unfit("empty_text", f"{where} is empty")
    _check_characters(text, where)
    return {"role": role, "content": text}


def _check_characters(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Unfit("not_text", f"{where} has half a character (a lone surrogate)") from None


def _turn(item: Any, where: str, writing: Writing) -> Message:
    speaker, words = ("from", "value") if writing == "ShareGPT" else ("role", "content")
    if not isinstance(item, dict):
        raise Unfit("bad_message", f"{where} is {json_type(item)}, not {{{speaker}, {words}}}")
    if speaker not in item:
        raise Unfit("bad_message", f"{where} has no `{speaker}`")
    name = item[speaker]
    if (role := role_of(name)) is None:
        raise Unfit("bad_message", f"{where} has the role `{short(name)}`, not one of {', '.join(_ROLE_NAMES)}")
    if len(item) == 2 and isinstance(item.get(words), str) and name not in _CALL_TURNS:
        # An empty system message has a meaning: it keeps the chat template from writing its default text.
        return message(role, item[words], where, may_be_empty=role in ("system", "tool"))
    return _with_all_fields(item, role, (speaker, words), where)


def _with_all_fields(item: dict[str, Any], role: str, names: tuple[str, str], where: str) -> Message:
    """A turn with more than the two fields `names`, or with content that is not text."""
    speaker, words = names
    more = {name: value for name, value in item.items() if name not in names and value is not None}
    if item[speaker] in _CALL_TURNS:
        calls, text = item.get(words), ""
    else:
        calls = [call] if (call := more.pop("function_call", None)) else more.pop("tool_calls", None)
        text = _joined(item.get(words), more, where)
    if media := [name for name, value in more.items() if _MEDIA.fullmatch(name) and value]:
        raise Unfit("media", f"{where} has `{media[0]}`")
    if calls:
        more["tool_calls"] = _tool_calls(calls, where)
        text = "" if text is None else text
    if words not in item and not calls:
        raise Unfit("bad_message", f"{where} has no `{words}`")
    if text is None:
        raise Unfit("null_field", f"{where}: `{words}` is null")
    if odd := [name for name in REASONING if not isinstance(more.get(name, ""), str)]:
        raise Unfit("not_text", f"{where}: `{odd[0]}` is {json_type(more[odd[0]])}, not text")
    if role == "assistant":
        _read_weight(more, where)
    else:  # nobody else's turns are trained on, so a weight of 0 says nothing
        more = {name: value for name, value in more.items() if value or name not in _WEIGHTS}
    if more:
        _check_characters(json.dumps(more, ensure_ascii=False, default=str), where)
    return message(role, text, where, role in ("system", "tool") or "tool_calls" in more) | more


def _read_weight(more: dict[str, Any], where: str) -> None:
    """Replace a turn's weights by `weight: 0` if it is only read, else by none. Raises Unfit: one is not 0 or 1."""
    weights = {name: more.pop(name) for name in _WEIGHTS if name in more}
    for name, weight in weights.items():
        if weight not in (0, 1):
            given = short(json.dumps(weight, default=str))
            what = f"{where} has the `{name}` {given}; a turn is trained on (1, true) or only read (0, false)"
            raise Unfit("bad_message", what)
    if not all(weights.values()):
        more["weight"] = 0


def _joined(content: Any, more: dict[str, Any], where: str) -> Any:
    """Content in parts as one text; parts with reasoning go to `reasoning_content` in `more`."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, dict):
            raise Unfit("bad_message", f"{where} has a part that is {json_type(part)}, not {{type, text}}")
        kind = part.get("type", "text")
        filled = [field for field, value in part.items() if value is not None]
        if any(map(_MEDIA.fullmatch, (str(kind), *filled))):
            raise Unfit("media", f"{where} has a part of the type `{short(kind)}`")
        if kind in ("thinking", "reasoning") and isinstance(part.get(kind, part.get("text")), str):
            more["reasoning_content"] = more.get("reasoning_content", "") + part.get(kind, part.get("text"))
        elif kind not in ("text", "input_text", "output_text"):
            raise Unfit("bad_message", f"{where} has a part of the type `{short(kind)}`, not text")
        elif not isinstance(part.get("text"), str):
            raise Unfit("not_text", f"{where} has a part whose `text` is {json_type(part.get('text'))}, not text")
        else:
            texts.append(part["text"])
    return "".join(texts)


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Calls as templates read them: `{"type": "function", "function": {"name", "arguments"}}`. Arguments that are text
    become an object if they can be parsed."""
    if isinstance(value, str):
        value = _from_json(value)
    calls = []
    for call in value if isinstance(value, list) else [value]:
        wrapped = isinstance(call, dict) and isinstance(call.get("function"), dict)
        function = call["function"] if wrapped else call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise Unfit("bad_message", f"{where} calls a tool, but not as {{name, arguments}}")
        arguments = function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str):
            parsed = _from_json(arguments) if arguments.strip() else {}
            arguments = parsed if isinstance(parsed, dict) else arguments
        arguments = {} if arguments is None else arguments
        # Fields keep their order, because some templates write the object as it is.
        named = {name: item for name, item in function.items() if item is not None and name != "parameters"}
        outer = {name: item for name, item in call.items() if item is not None} if wrapped else {}
        if not wrapped and "id" in named:
            outer["id"] = named.pop("id")
        calls.append({"type": "function", **outer, "function": {**named, "arguments": arguments}})
    return calls


def _from_json(text: str) -> Any:
    """The parsed JSON; None if the text is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def without_nulls(value: Any) -> Any:
    """A cell without the nulls that Arrow writes for fields that only other rows have; texts that are null stay."""
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    text = "content" if "role" in value else "value" if "from" in value else ""
    return {name: without_nulls(item) for name, item in value.items() if item is not None or name == text}


def with_system(system: Any, prompt: list[Message], where: str) -> list[Message]:
    """Put a system message first; an empty text is the same as none. Raises Unfit: the prompt has another one."""
    if system is None or system == "":
        return prompt
    first = message("system", system, where, may_be_empty=True)
    if not first["content"].strip() or prompt[:1] == [first]:
        return prompt
    if any(other["role"] == "system" for other in prompt):
        raise Unfit("bad_message", f"the prompt has a system message of its own beside {where}")
    return [first, *prompt]


def check_prompt(prompt: list[Message], where: str) -> None:
    if not prompt:
        raise Unfit("bad_message", f"there is no prompt before the answer in {where}")
    if prompt[-1]["role"] == "assistant":
        raise Unfit("bad_message", f"the last message of {where} is the assistant's")


def check_answer(answer: list[Message], where: str) -> None:
    """Raises Unfit unless an answer begins and ends with the assistant and has a turn to train on. Turns of tools and
    users may come between."""
    if not answer:
        raise Unfit("empty_text", f"{where} has no answer")
    for turn in (answer[0], answer[-1]):
        if turn["role"] != "assistant":
            side = "start" if turn is answer[0] else "end"
            raise Unfit("bad_message", f"the answer in {where} has a message of the role {turn['role']} at its {side}")
    if any(turn["role"] == "system" for turn in answer):
        raise Unfit("bad_message", f"the answer in {where} has a message of the role system")
    if all("weight" in turn for turn in answer if turn["role"] == "assistant"):
        raise Unfit("bad_message", f"the answer in {where} has no turn to train on: each has the weight 0")


def check_pair(answers: Sequence[list[Message]], where: Sequence[str]) -> None:
    """Raises Unfit unless two answers are valid and differ, and the user says the same within them."""
    stripped = [[[x.strip() if isinstance(x, str) else x for x in said(turn)] for turn in answer] for answer in answers]
    if stripped[0] == stripped[1]:
        raise Unfit("identical", f"{where[0]} and {where[1]} are the same")
    for answer, name in zip(answers, where, strict=False):
        check_answer(answer, name)
    users = [[turn["content"] for turn in answer if turn["role"] == "user"] for answer in answers]
    if users[0] != users[1]:
        raise Unfit("prompts_differ", f"within {where[0]} and {where[1]} the user says different things")


def said(turn: Message) -> list[Any]:
    """What decides whether two turns are the same; ids, times and the like do not."""
    return [turn.get(name) for name in _SAID]


def short(value: Any) -> str:
    """`value` as at most 30 printable characters."""
    text = repr(value[:40] if isinstance(value, str) else reprlib.repr(value))[1:-1]
    return text if len(text) <= 30 else text[:27] + "..."
