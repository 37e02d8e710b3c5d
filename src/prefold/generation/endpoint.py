"""Chat models behind an HTTP endpoint that speaks the chat-completions protocol: llama.cpp, vLLM, Ollama, OpenAI, ...

The key is read from the environment variable OPENAI_API_KEY alone, and is in no message and no file. What may be gone
at the next try (no connection, no answer in time, HTTP 408, 429 and 5xx, a reply that is no JSON) is tried again after
longer and longer waits, or the one that the server asks for; whatever is left ends with one message.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, TypeVar

import httpx2

from prefold.data.preference import Message, Prompt
from prefold.errors import UserError
from prefold.generation.samplers import Answer, Answers
from prefold.generation.sampling import Sampling
from prefold.generation.sequences import seed_of

KEY = "OPENAI_API_KEY"
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each further try."""
LONGEST_WAIT = 120.0
"""Seconds; a server that asks for more is waited for so long."""
_TRY_AGAIN = (408, 429)
_ABOUT_THE_REQUEST = (400, 413, 422)
_SHOWN_CHARACTERS = 200
Item = TypeVar("Item")
Result = TypeVar("Result")


class Refused(UserError):
    """The endpoint does not take this request, but may take others: a prompt that is too long, or filtered."""


class _Passing(Exception):
    """A failure that may be gone at the next try; `wait`: the seconds that the server asks for."""

    def __init__(self, what: str, wait: float = 0.0):
        self.wait = wait
        super().__init__(what)


_COUNTED = ("calls", "prompt_tokens", "completion_tokens")
_counting = Lock()


@dataclass(frozen=True)
class Endpoint:
    """One model at one address. `usage` counts what was asked of it so far; tokens are those that it tells of, and few
    servers tell none.

    Args:
        url: the base, e.g. `http://localhost:8000/v1`, or the whole address of the chat completions.
        timeout: seconds that an answer may take.

    Raises:
        UserError: the address is none, or the key cannot be sent.
    """

    url: str
    model: str
    timeout: float = 300.0
    usage: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_COUNTED, 0), repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            parsed = httpx2.URL(self.url)
        except httpx2.InvalidURL:
            parsed = httpx2.URL("")
        if parsed.userinfo:
            raise UserError("the address of an endpoint holds a password", advice=f"put the key in {KEY}")
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise UserError("is not the address of an endpoint", where=self.url, expected="http://localhost:8000/v1")
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(f"{KEY} holds characters that no key has", advice="look for a stray space or new line")

    @property
    def _key(self) -> str:
        return os.environ.get(KEY, "").strip()

    @property
    def _address(self) -> str:
        base = self.url.rstrip("/")
        return base if base.endswith("/chat/completions") else f"{base}/chat/completions"

    @cached_property
    def _client(self) -> httpx2.Client:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        return httpx2.Client(headers=headers, timeout=self.timeout)

    def ask(self, messages: Sequence[Message], **settings: Any) -> Answer:
        """The model's answer, as `ask_counting` has it."""
        return self.ask_counting(messages, **settings)[0]

    def ask_counting(self, messages: Sequence[Message], **settings: Any) -> tuple[Answer, dict[str, int]]:
        """The model's answer, and what it counts for in `usage`.

        Args:
            settings: of the request, by the protocol's names (`temperature`, `max_tokens`, `seed`, ...).

        Raises:
            UserError: the endpoint cannot be reached, refuses, or does not speak the protocol.
        """
        body = {"model": self.model, "messages": list(messages), **settings}
        for number in range(len(WAITS) + 1):
            try:
                return self._reply(body)
            except _Passing as passing:
                if number == len(WAITS):
                    raise UserError(
                        f"{passing} ({number + 1} tries)",
                        where=self.url,
                        advice="start again when it is back: what was done is kept",
                    ) from None
                time.sleep(min(max(WAITS[number], passing.wait), LONGEST_WAIT))
        raise AssertionError

    def _reply(self, body: dict[str, Any]) -> tuple[Answer, dict[str, int]]:
        try:
            response = self._client.post(self._address, json=body)
        except httpx2.TimeoutException:
            raise _Passing(f"no answer within {self.timeout:g} s") from None
        except httpx2.RequestError as error:
            raise _Passing(f"cannot be reached: {self._safe(error) or type(error).__name__}") from None
        status = response.status_code
        if status >= 500 or status in _TRY_AGAIN:
            raise _Passing(f"HTTP {status}: {self._complaint(response)}", _retry_after(response))
        if not response.is_success:
            kind = Refused if status in _ABOUT_THE_REQUEST else UserError
            raise kind(f"HTTP {status}: {self._complaint(response)}", where=self.url, advice=_ADVICE.get(status, ""))
        return self._answer(response)

    def _answer(self, response: httpx2.Response) -> tuple[Answer, dict[str, int]]:
        try:
            reply = response.json()
        except ValueError:
            raise _Passing(f"its reply is not JSON: {self._safe(response.text)}") from None
        usage = reply.get("usage") if isinstance(reply, dict) else None
        told = {**(usage if isinstance(usage, dict) else {}), "calls": 1}
        counts = {name: max(told[name], 0) if isinstance(told.get(name), int) else 0 for name in _COUNTED}
        with _counting:
            for name, count in counts.items():
                self.usage[name] += count
        try:
            choice = reply["choices"][0]
            content, finished = choice["message"]["content"], choice.get("finish_reason") != "length"
        except (LookupError, TypeError):
            content, finished = reply, False
        # A model that refuses, or calls a tool, leaves its content empty.
        if content is not None and not isinstance(content, str):
            raise UserError(
                f"its reply holds no answer: {self._safe(response.text)}",
                where=self.url,
                expected='the chat-completions protocol, {"choices": [{"message": {"content": "..."}}]}',
            )
        # Half a character (a lone surrogate) could not be written to any file.
        return Answer((content or "").encode("utf-8", "replace").decode("utf-8").strip(), finished), counts

    def _complaint(self, response: httpx2.Response) -> str:
        """What the server says about its refusal."""
        try:
            reply = response.json()
            error = reply.get("error") or reply.get("detail") or reply.get("message")
            text = error.get("message") if isinstance(error, dict) else error
        except (ValueError, AttributeError):
            text = response.text
        return self._safe(text or response.reason_phrase)

    def _safe(self, text: object) -> str:
        """One short line without the key."""
        shown = str(text).replace(self._key, "***") if self._key else str(text)
        line = " ".join(shown.split())
        return line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 3] + "..."


_ADVICE = {
    401: f"set the environment variable {KEY}",
    403: f"set the environment variable {KEY} to a key that may use this model",
    404: "check the address (most end in /v1) and the name of the model",
}


def _retry_after(response: httpx2.Response) -> float:
    """Seconds of the header Retry-After, which are a number or a date."""
    wait = response.headers.get("Retry-After", "")
    with suppress(ValueError):
        return float(wait)
    with suppress(ValueError, TypeError):
        return (parsedate_to_datetime(wait) - datetime.now(UTC)).total_seconds()
    return 0.0


@dataclass(frozen=True)
class RemoteModel:
    """A model behind an endpoint as a sampler. One request for each answer: many servers give only one at a time."""

    endpoint: Endpoint
    sampling: Sampling
    concurrency: int

    @property
    def name(self) -> str:
        return self.endpoint.model

    @property
    def identity(self) -> Any:
        return self.endpoint.url, self.endpoint.model, asdict(self.sampling)

    def sample(self, prompts: Sequence[Prompt], wanted: Sequence[int]) -> Iterator[tuple[int, Answers]]:
        def answers(index: int) -> Answers:
            try:
                return [self._answer(prompts[index], index, number) for number in range(self.sampling.num_answers)]
            except Refused as refused:
                return refused

        return in_parallel(answers, wanted, self.concurrency)

    def token_ids(self, texts: Sequence[str]) -> list[list[int]] | None:
        return None

    def _answer(self, prompt: Prompt, index: int, number: int) -> Answer:
        sampling = self.sampling
        # Few servers know the other fields, and some refuse those that they do not know.
        optional = {"top_p": (sampling.top_p, 1.0), "top_k": (sampling.top_k, 0), "min_p": (sampling.min_p, 0.0)}
        return self.endpoint.ask(
            prompt.prompt,
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            seed=seed_of(sampling.seed, index, number),
            **{name: value for name, (value, default) in optional.items() if value != default},
            **_beside_messages(prompt),
        )


def _beside_messages(prompt: Prompt) -> dict[str, Any]:
    """What a server's chat template is given: `tools` are of the protocol, other keywords what vLLM and SGLang take."""
    keywords = dict(prompt.template_kwargs)
    fields = {"tools": keywords.pop("tools", None), "chat_template_kwargs": keywords}
    return {name: value for name, value in fields.items() if value}


def in_parallel(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Iterator[tuple[Item, Result]]:
    """Items and what the function makes of them, as they come.

    The threads are daemons: neither an error nor Ctrl-C waits for the answers that are under way.
    """
    waiting = deque(items)
    results: SimpleQueue[tuple[Item, Result] | BaseException] = SimpleQueue()

    def work() -> None:
        while True:
            try:
                item = waiting.popleft()
            except IndexError:
                return
            try:
                results.put((item, function(item)))
            except BaseException as error:
                results.put(error)
                return

    for _ in range(min(workers, len(items))):
        Thread(target=work, daemon=True).start()
    try:
        for _ in items:
            result = results.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        waiting.clear()
