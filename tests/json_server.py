"""A server on this machine that answers JSON with JSON, and fails as it is told to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar


@dataclass
class Failure:
    """A reply that is no answer. `seconds`: how long it takes to come."""

    status: int = 200
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


class JsonServer(ThreadingHTTPServer):
    """`failures` come first, one for each request for completions. `keys`: of all requests, the authorization."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.failures: list[Failure] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_: Any) -> None:
        """Nothing on stderr where a client has gone away."""

    def reply(self, path: str, body: Any) -> Failure | dict[str, Any] | str:
        """What a request is answered with; `body` is None for GET."""
        raise NotImplementedError


class Handler(BaseHTTPRequestHandler):
    server: JsonServer

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        self.answer(None)

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body: Any) -> None:
        server = self.server
        reply: Failure | dict[str, Any] | str
        with server.lock:
            server.requests.append({"path": self.path, **(body or {})})
            server.keys.append(self.headers.get("Authorization"))
            fails = self.path.endswith("/completions") and server.failures
            reply = server.failures.pop(0) if fails else server.reply(self.path, body)
        if not isinstance(reply, Failure):
            reply = Failure(body=reply if isinstance(reply, str) else json.dumps(reply))
        time.sleep(reply.seconds)
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body.encode())))
        self.end_headers()
        self.wfile.write(reply.body.encode())


AnyServer = TypeVar("AnyServer", bound=ThreadingHTTPServer)


@contextmanager
def running(server: AnyServer) -> Iterator[AnyServer]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
