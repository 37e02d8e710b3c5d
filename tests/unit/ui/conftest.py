"""A client of `prefold ui` without a server: the app is called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from prefold.ui.server import make_app
from prefold.ui.site import Site


@pytest.fixture
def ui_client() -> Callable[..., TestClient]:
    """`ui_client(folder, ...)`: as the browser that was given the token; `token`: another cookie, empty for none."""

    def make(*folders: Path, token: str = "secret") -> TestClient:
        app = make_app(Site(tuple(folder.resolve() for folder in folders), folders[0].resolve(), 8000, "secret"))
        cookies = {"prefold-8000": token} if token else None
        return TestClient(app, base_url="http://127.0.0.1:8000", cookies=cookies)

    return make
