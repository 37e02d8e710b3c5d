"""A model hub small enough for tests: repositories in memory, served by the routes that huggingface_hub calls."""

from __future__ import annotations

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c" * 40


class FakeHub(ThreadingHTTPServer):
    """`repositories[id][file]` are the files; `refuses[id]` is (status, error code) for all of an id's files;
    `refuses_listing` the same for what lists them. `downloads` records the files that were asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.refuses: dict[str, tuple[int, str]] = {}
        self.refuses_listing: dict[str, tuple[int, str]] = {}
        self.downloads: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        if path.startswith("api/models/"):
            self.listing(path.removeprefix("api/models/"))
        else:
            repository, _, rest = path.partition("/resolve/")
            self.file(repository, rest.partition("/")[2])

    def listing(self, path: str) -> None:
        kind = "/tree/" if "/tree/" in path else "/revision/"
        repository, _, revision = path.partition(kind)
        if repository in self.server.refuses_listing:
            self.refuse(*self.server.refuses_listing[repository])
        elif repository not in self.server.repositories:
            self.refuse(404, "RepoNotFound")
        elif revision not in ("main", COMMIT):
            self.refuse(404, "RevisionNotFound")
        elif kind == "/revision/":
            self.answer(json.dumps({"id": repository, "modelId": repository, "sha": COMMIT, "siblings": []}).encode())
        else:
            files = self.server.repositories[repository].items()
            entries = [{"type": "file", "path": name, "size": len(data), "oid": etag(data)} for name, data in files]
            self.answer(json.dumps(entries).encode())

    def file(self, repository: str, name: str) -> None:
        if name not in self.server.repositories.get(repository, {}):
            return self.refuse(404, "EntryNotFound")
        if repository in self.server.refuses:
            return self.refuse(*self.server.refuses[repository])
        if self.command == "GET":
            self.server.downloads.append(name)
        data = self.server.repositories[repository][name]
        self.answer(data, {"ETag": f'"{etag(data)}"', "X-Repo-Commit": COMMIT})

    def refuse(self, status: int, code: str) -> None:
        self.answer(b"{}", {"X-Error-Code": code} if code else {}, status)

    def answer(self, body: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
