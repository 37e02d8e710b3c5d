"""Chat models behind an HTTP endpoint that speaks the chat-completions protocol: llama.cpp, vLLM, Ollama, OpenAI, ...

The key is read from the environment variable OPENAI_API_KEY alone. HTTP 408, 429 and 5xx are retried.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

from prefold.data.preference import Message, Prompt
from prefold.errors import UserError
from prefold.generation.http import Connection, Passing, Refused, in_parallel
from prefold.generation.journal import Journal, key_of
from prefold.generation.samplers import Answer, Answers
from prefold.generation.sampling import Sampling
from prefold.generation.sequences import seed_of

KEY = "OPENAI_API_KEY"
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each retry."""
_COUNTED = ("calls", "prompt_tokens", "completion_tokens")
_counting = Lock()


def may_pass(status: int) -> bool:
    return status >= 500 or status in (408, 429)


@dataclass(frozen=True)
class Endpoint:
    """One model at one address. `usage` counts calls so far, and tokens as the server reports them, which most do.

    Args:
        url: the base, e.g. `http://localhost:8000/v1`, or the whole address of the chat completions.
        timeout: seconds that an answer may take.

    Raises:
        UserError: the address is invalid, or the key cannot be sent.
    """

    url: str
    model: str
    timeout: float = 300.0
    usage: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_COUNTED, 0), repr=False, compare=False)

    def __post_init__(self) -> None:
        assert self._connection

    @cached_property
    def _connection(self) -> Connection:
        return Connection(self.url, KEY, self.timeout, may_pass)

    @property
    def _address(self) -> str:
        base = self.url.rstrip("/")
        return base if base.endswith("/chat/completions") else f"{base}/chat/completions"

    def replies(self, folder: Path) -> Journal:
        """The file of its replies in a folder, which is created."""
        folder.mkdir(parents=True, exist_ok=True)
        return Journal(folder / f"{key_of(self.url, self.model)}.jsonl")

    def ask(self, messages: Sequence[Message], **settings: Any) -> Answer:
        """The model's answer; see `ask_counting`."""
        return self.ask_counting(messages, **settings)[0]

    def ask_counting(self, messages: Sequence[Message], **settings: Any) -> tuple[Answer, dict[str, int]]:
        """The model's answer, and what it adds to `usage`.

        Args:
            settings: of the request, by the protocol's names (`temperature`, `max_tokens`, `seed`, ...).

        Raises:
            UserError: the endpoint cannot be reached, refuses, or does not speak the protocol.
        """
        body = {"model": self.model, "messages": list(messages), **settings}
        advice = "start again when it is back: what was done is kept"
        return self._connection.exchange(self._address, body, WAITS, self._answer, advice)

    def _answer(self, reply: Any, shown: str) -> tuple[Answer, dict[str, int]]:
        if isinstance(reply, str):
            raise Passing(f"its reply is not JSON: {shown}")
        usage = reply.get("usage") if isinstance(reply, dict) else None
        reported = {**(usage if isinstance(usage, dict) else {}), "calls": 1}
        counts = {name: max(reported[name], 0) if isinstance(reported.get(name), int) else 0 for name in _COUNTED}
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
                f"its reply holds no answer: {shown}",
                where=self.url,
                expected='the chat-completions protocol, {"choices": [{"message": {"content": "..."}}]}',
            )
        # Half a character (a lone surrogate) could not be written to any file.
        return Answer((content or "").encode("utf-8", "replace").decode("utf-8").strip(), finished), counts


def as_text(messages: Sequence[Message]) -> str:
    """A conversation, to be quoted in a question."""
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)


@dataclass(frozen=True)
class RemoteModel:
    """A model behind an endpoint as a sampler. It sends one request per answer: many servers give only one at a
    time."""

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
            **beside_messages(prompt),
        )


def beside_messages(prompt: Prompt) -> dict[str, Any]:
    """What a prompt gives the chat template, as fields of a request or a row: `tools` as in the protocol, other
    keywords as in vLLM and SGLang."""
    keywords = dict(prompt.template_kwargs)
    fields = {"tools": keywords.pop("tools", None), "chat_template_kwargs": keywords}
    return {name: value for name, value in fields.items() if value}
