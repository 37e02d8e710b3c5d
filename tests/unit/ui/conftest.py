"""A client of `prefold ui` without a server: the app is called."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from prefold.ui.server import make_app
from prefold.ui.site import Site

FAKE_RUN = runpy.run_path(str(Path(__file__).parents[1] / "reports" / "fake_run.py"))
HOSTILE = [text.encode("utf-8", "replace").decode() for text in FAKE_RUN["HOSTILE"]]
HOSTILE += [f"{quote}{text}{end}" for quote, end in (('">', ""), ("'}", "{'")) for text in HOSTILE[:30]]
ORIGIN = {"origin": "http://127.0.0.1:8000"}


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


def require_harmless(text: str) -> None:
    """No element, and no attribute that runs anything, came from a hostile text."""
    from html.parser import HTMLParser

    class Elements(HTMLParser):
        found: list[str]

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            names = {name for name, _ in attributes}
            assert tag not in ("img", "iframe", "object", "base", "body!", "math", "style"), (tag, attributes)
            assert not {name for name in names if name.startswith("on")} and "srcdoc" not in names, attributes
            assert tag != "script" or dict(attributes).get("src", "").startswith("/static/"), attributes  # type: ignore[union-attr]
            for name in ("href", "src", "action"):
                target = dict(attributes).get(name) or "/"
                assert target.startswith(("/", "?", "#", "data:,")) and not target.startswith("//"), attributes

    Elements().feed(text)
