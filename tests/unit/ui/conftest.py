"""A client of `prefold ui` without a server: the app is called."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hostile_texts import FAKE_RUN
from starlette.testclient import TestClient

from prefold.ui.server import make_app
from prefold.ui.site import Site


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFOLD_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def ui_client() -> Callable[..., TestClient]:
    """`ui_client(folder, ...)`: as the browser that was given the token; `token`: another cookie, empty for none."""

    def make(*folders: Path, token: str = "secret") -> TestClient:
        app = make_app(Site(tuple(folder.resolve() for folder in folders), folders[0].resolve(), 8000, "secret"))
        cookies = {"prefold-8000": token} if token else None
        return TestClient(app, base_url="http://127.0.0.1:8000", cookies=cookies)

    return make


@pytest.fixture
def fake_run() -> Callable[..., Path]:
    """`fake_run(folder, ...)`: the folder of a run that is done, written by nobody."""

    def write(folder: Path, **changes: Any) -> Path:
        FAKE_RUN["write_run"](folder, **changes)
        (folder / "merged").mkdir()
        (folder / "merged" / "README.md").write_text("card")
        return folder

    return write


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, rows: Sequence[Any]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
