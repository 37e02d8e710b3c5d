"""A model hub that takes uploads, small enough for tests: repositories in memory, by the routes of huggingface_hub.

Large files go by the LFS protocol (batch, PUT, verify), small ones inside the commit, as on the real Hub without Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

import pytest
from huggingface_hub import constants
from json_server import running

TOKEN = "hf_atokenthatmayappearnowhere"
LARGE = 4000
"""Bytes from which a file goes by LFS."""


@dataclass
class Repository:
    """`branches[revision][path]` are the files; pull requests are revisions too, `open` those that are open."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[dict[str, Any]] = field(default_factory=list)
    open: list[int] = field(default_factory=list)


class UploadHub(ThreadingHTTPServer):
    """`breaks`: so many of the next large files lose their connection half-way. `refuses`: the status of every answer.
    `sent` are the large files that arrived, by their SHA-256."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.sent: list[str] = []
        self.broken: list[str] = []
        self.breaks = 0
        self.refuses: int | None = None
        self.heads: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: UploadHub

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        if self.refused():
            return
        repository, what, rest = self.parts()
        found = self.server.repositories.get(repository)
        if found is None:
            return self.answer({}, 404, "RepoNotFound")
        if what == "tree":
            files = found.branches.get(rest, {}).items()
            self.answer([{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files])
        elif what == "discussions":
            shown = [self.discussion(repository, number) for number in found.open]
            self.answer({"count": len(shown), "start": 0, "discussions": shown})
        else:
            sha = str(len(found.commits)).zfill(40)
            self.answer({"id": repository, "private": found.private, "sha": sha, "siblings": []})

    def do_POST(self) -> None:
        body = self.body()
        if self.refused():
            return
        path = urlparse(self.path).path
        if path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.server.heads.append(json.loads(body)["content"])
            self.answer({"errors": [], "warnings": []})
        elif path.endswith("/info/lfs/objects/batch"):
            self.batch(json.loads(body))
        elif path.startswith("/verify/"):
            self.answer({}, 200 if json.loads(body)["oid"] in self.server.large else 404)
        else:
            repository, what, rest = self.parts()
            if repository not in self.server.repositories:
                return self.answer({}, 404, "RepoNotFound")
            getattr(self, what)(self.server.repositories[repository], rest, body)

    def do_PUT(self) -> None:
        """A large file, to an address that needs no token, as storage gives them out."""
        oid = self.path.rpartition("/")[2]
        if self.server.breaks:
            self.server.breaks -= 1
            self.server.broken.append(oid)
            self.rfile.read(100)
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        data = self.body()
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.large[oid] = data
        self.server.sent.append(oid)
        self.answer({})

    # ---- routes

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        known = name in self.server.repositories
        if not known:
            self.server.repositories[name] = Repository(wanted.get("visibility") == "private")
        self.answer({"url": f"{self.server.address}/{name}"}, 409 if known else 200)

    def branch(self, repository: Repository, name: str, _: bytes) -> None:
        if name in repository.branches:
            return self.answer({}, 409)
        repository.branches[name] = dict(repository.branches["main"])
        self.answer({})

    def preupload(self, repository: Repository, revision: str, body: bytes) -> None:
        there = repository.branches[revision]
        files = []
        for file in json.loads(body)["files"]:
            large = file["size"] >= LARGE
            oid = identity(there[file["path"]], large) if file["path"] in there else None
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": files})

    def batch(self, wanted: dict[str, Any]) -> None:
        objects = []
        for one in wanted["objects"]:
            actions = {
                "upload": {"href": f"{self.server.address}/storage/{one['oid']}"},
                "verify": {"href": f"{self.server.address}/verify/{one['oid']}"},
            }
            objects.append({**one, **({} if one["oid"] in self.server.large else {"actions": actions})})
        self.answer({"transfer": "basic", "objects": objects})

    def commit(self, repository: Repository, revision: str, body: bytes) -> None:
        query = parse_qs(urlparse(self.path).query)
        if query.get("create_pr"):
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.branches)
            repository.branches[f"refs/pr/{number}"] = dict(repository.branches[revision])
            repository.open.append(number)
            revision = f"refs/pr/{number}"
        files, [header, *operations] = repository.branches[revision], [json.loads(line) for line in body.splitlines()]
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            else:
                del files[value["path"]]
        paths = {operation["key"]: operation["value"]["path"] for operation in operations}
        repository.commits.append({"revision": revision, **header["value"], "changed": len(operations), "kinds": paths})
        url = f"{self.server.address}/{self.parts()[0]}"
        number = revision.rpartition("/")[2]
        pull = f"{url}/discussions/{number}" if query.get("create_pr") else None
        oid = str(len(repository.commits)).zfill(40)
        self.answer({"commitUrl": f"{url}/commit/{oid}", "commitOid": oid, "pullRequestUrl": pull})

    def discussion(self, repository: str, number: int) -> dict[str, Any]:
        return {
            "num": number,
            "title": "t",
            "status": "draft",
            "isPullRequest": True,
            "createdAt": "2026-01-01T00:00:00.000Z",
            "author": {"name": "somebody"},
            "repo": {"name": repository, "type": "model"},
        }

    # ---- the protocol

    def parts(self) -> tuple[str, str, str]:
        """Repository, route and what is behind it, of `/api/models/ORG/NAME/ROUTE/REST`."""
        _, _, _, organisation, name, *rest = urlparse(self.path).path.split("/")
        return f"{organisation}/{name}", rest[0] if rest else "", unquote("/".join(rest[1:]))

    def refused(self) -> bool:
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if status := self.server.refuses or (None if allowed else 401):
            self.answer({"error": "no"}, status)
        return bool(status)

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def answer(self, value: Any, status: int = 200, code: str = "") -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def identity(data: bytes, large: bool) -> str:
    """What the Hub calls the content of a file: that of git for small ones."""
    if large:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def uploads_to(monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    """A hub that the client is pointed at, logged in there."""
    hub = UploadHub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # Between tries the client waits for seconds.
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with running(hub):
        yield hub
