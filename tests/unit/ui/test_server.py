"""Who is answered, and what a page may do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from prefold.errors import UserError
from prefold.ui.server import serve

Client = Callable[..., TestClient]


def test_without_a_token_nothing_is_answered(ui_client: Client, tmp_path: Path) -> None:
    client = ui_client(tmp_path, token="")
    for path in ("/", "/runs", "/static/ui.js", "/nowhere"):
        answer = client.get(path)
        assert answer.status_code == 403 and "token" in answer.text
    assert client.get("/?token=wrong").status_code == 403
    assert client.get("/?token=%F0%9F%98%80").status_code == 403
    client.cookies.set("prefold-8000", "wrong")
    assert client.get("/runs").status_code == 403


def test_the_token_leaves_the_address_at_once(ui_client: Client, tmp_path: Path) -> None:
    client = ui_client(tmp_path, token="")
    answer = client.get("/runs?token=secret&x=1", follow_redirects=False)
    assert answer.status_code == 303 and answer.headers["location"] == "/runs?x=1"
    assert "HttpOnly" in answer.headers["set-cookie"] and "SameSite=lax" in answer.headers["set-cookie"]
    assert client.get("/").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example:8000"},
        {"host": "127.0.0.1"},
        {"host": "127.0.0.1:8001"},
        {"host": ""},
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:8001"},
        {"origin": "http://localhost:8000"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"},
    ],
)
def test_another_host_or_origin_is_refused(ui_client: Client, tmp_path: Path, headers: dict[str, str]) -> None:
    assert ui_client(tmp_path).get("/runs", headers=headers).status_code == 403


def test_a_link_from_elsewhere_may_lead_here_and_a_form_may_not(ui_client: Client, tmp_path: Path) -> None:
    client = ui_client(tmp_path)
    elsewhere = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client.get("/runs", headers=elsewhere).status_code == 200
    assert client.post("/runs", headers=elsewhere).status_code == 403
    assert client.post("/runs").status_code == 403  # no origin at all
    assert client.post("/runs", headers={"origin": "http://127.0.0.1:8000"}).status_code == 405


def test_every_answer_has_the_policy(ui_client: Client, tmp_path: Path) -> None:
    for answer in (ui_client(tmp_path).get("/runs"), ui_client(tmp_path, token="").get("/runs")):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy
        assert "unsafe-inline" not in policy.replace("style-src-attr 'unsafe-inline'", "")
        assert answer.headers["x-frame-options"] == "DENY"


def test_files_of_the_pages_alone_are_static(ui_client: Client, tmp_path: Path) -> None:
    client = ui_client(tmp_path)
    assert client.get("/static/page.css").text.startswith(":root")
    for path in ("/static/server.py", "/static/..%2Fserver.py", "/static/%2e%2e/server.py", "/static/page.html.j2"):
        assert client.get(path).status_code == 404


def test_a_folder_or_port_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        serve([tmp_path / "missing"])


def test_an_error_of_ours_is_a_page_and_shows_in_the_terminal(
    ui_client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = ui_client(tmp_path)
    client = TestClient(client.app, client.base_url, raise_server_exceptions=False, cookies=client.cookies)
    monkeypatch.setattr("prefold.ui.runs.index_of", None)
    answer = client.get("/runs")
    assert answer.status_code == 500 and "This failed (TypeError)" in answer.text and "NoneType" not in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "'NoneType' object is not callable" in capsys.readouterr().err
