"""A server on this machine that speaks the chat-completions protocol, and fails as it is told to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from json_server import Failure, JsonServer, running

from prefold.generation import endpoint


def words(body: dict[str, Any]) -> str:
    """An answer that depends on the seed alone: `w` so many times."""
    return " ".join(["w"] * (1 + body.get("seed", 0) % 7))


class ChatServer(JsonServer):
    """`answer` makes of a request's body the text of the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.answer: Callable[[dict[str, Any]], str | Failure | None] = words

    def reply(self, path: str, body: Any) -> Failure | dict[str, Any] | str:
        if path != "/v1/chat/completions":
            return Failure(404, '{"error": {"message": "no such path"}}')
        text = self.answer(body)
        if isinstance(text, Failure):
            return text
        message = {"role": "assistant", "content": text}
        return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}


@pytest.fixture(autouse=True)
def own_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def chat_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    """With waits that are short enough for tests."""
    monkeypatch.setattr(endpoint, "WAITS", (0.01,) * len(endpoint.WAITS))
    with running(ChatServer()) as server:
        yield server
