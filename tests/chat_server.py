"""A server on this machine that speaks the chat-completions protocol, and fails as it is told to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from prefold.generation import endpoint


@dataclass
class Failure:
    """A reply that is no answer. `seconds`: how long it takes to come."""

    status: int = 200
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def words(body: dict[str, Any]) -> str:
    """An answer that depends on the seed alone: `w` so many times."""
    return " ".join(["w"] * (1 + body.get("seed", 0) % 7))


class ChatServer(ThreadingHTTPServer):
    """`answer` makes of a request's body the text of the answer; `failures` come first, one for each request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer: Callable[[dict[str, Any]], str | Failure | None] = words
        self.failures: list[Failure] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_: Any) -> None:
        """Nothing on stderr where a client has gone away."""


class Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            self.server.keys.append(self.headers.get("Authorization"))
            reply = self.server.failures.pop(0) if self.server.failures else self.server.answer(body)
        if self.path != "/v1/chat/completions":
            reply = Failure(404, '{"error": {"message": "no such path"}}')
        if not isinstance(reply, Failure):
            message = {"role": "assistant", "content": reply}
            reply = Failure(body=json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}))
        time.sleep(reply.seconds)
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body.encode())))
        self.end_headers()
        self.wfile.write(reply.body.encode())


@contextmanager
def serving() -> Iterator[ChatServer]:
    server = ChatServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def own_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def chat_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    """With waits that are short enough for tests."""
    monkeypatch.setattr(endpoint, "WAITS", (0.01,) * len(endpoint.WAITS))
    with serving() as server:
        yield server
