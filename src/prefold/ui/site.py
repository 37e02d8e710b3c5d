"""What the pages of `prefold ui` share: the folders that they may access, rendering, and the declaration of routes.

A module of pages has `ROUTES`: `route(path, function)` for GET, `action(path, function)` for POST, which may change
something; and `PAGE`, its entry in the navigation, if it has one. Functions are called in threads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from jinja2 import Environment
from markupsafe import Markup
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from prefold.errors import UserError
from prefold.files import locked
from prefold.reports.run_files import readable
from prefold.reports.templates import pages

HERE = Path(__file__).parent
MOST_SENT = 4 * 2**20
"""Bytes of the largest form that is accepted."""

Fields = Mapping[str, str]


class Page(NamedTuple):
    """An entry of the navigation."""

    path: str
    title: str


@dataclass(frozen=True)
class Site:
    """`folders`: what may be read and written, with links resolved. `start`: the folder that relative paths start from,
    in recipes too. `navigation`: the entries of all modules."""

    folders: tuple[Path, ...]
    start: Path
    port: int
    token: str
    navigation: tuple[Page, ...] = ()

    def inside(self, path: str) -> Path:
        """A path with its links resolved. Raises HTTPException: it is in none of the folders, or cannot exist."""
        try:
            resolved = (self.start / Path(path).expanduser()).resolve()
            with suppress(FileNotFoundError, NotADirectoryError):
                resolved.stat()
        except (OSError, RuntimeError, ValueError):  # a circle of links, a name too long, a null byte, no such user
            raise HTTPException(404, "There is no such path.") from None
        if not any(resolved.is_relative_to(folder) for folder in self.folders):
            raise HTTPException(
                403, "This path is in none of the folders that `prefold ui` was started with: name its folder as well."
            )
        return resolved

    def name_of(self, path: Path) -> str:
        """A path as it is shown: relative to its folder, with the folder's name in front if there are several."""
        for folder in self.folders:
            if path.is_relative_to(folder):
                return readable(str(path.relative_to(folder if len(self.folders) == 1 else folder.parent)))
        return readable(str(path))

    @contextmanager
    def writing(self, folder: Path) -> Iterator[None]:
        """Lock a folder, created if it is missing, to write in it. Raises UserError: another process holds the lock."""
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, self.name_of(folder)):
            yield


def site_of(request: Request) -> Site:
    site: Site = request.app.state.site
    return site


def whole_number(given: Fields, name: str, default: int = 0) -> int:
    """A field as a whole number, if it is one of at most 11 digits."""
    text = given.get(name, "")
    return int(text) if text.isdecimal() and len(text) < 12 else default


def page(request: Request, template: str, **values: Any) -> HTMLResponse:
    """A page, or a part of one, with which `ui.js` replaces an earlier version."""
    site = site_of(request)
    text = (
        templates()
        .get_template(template)
        .render(site=site, path=request.url.path, query=request.query_params, **values)
    )
    return HTMLResponse(text)


@cache
def templates() -> Environment:
    environment = pages(HERE)
    environment.filters |= {
        "moment": _moment,
        "as_json": partial(json.dumps, ensure_ascii=False, default=str, indent=1),
    }
    return environment


def _moment(seconds: float) -> Markup:
    """Seconds of the epoch as the local time if it is today, else the date."""
    at = datetime.fromtimestamp(seconds).astimezone()
    text = at.strftime("%H:%M" if at.date() == datetime.now().date() else "%d %b %Y")
    return Markup('<time datetime="{}" title="{}">{}</time>').format(
        at.isoformat(), at.strftime("%d %b %Y, %H:%M"), text
    )


def route(path: str, function: Callable[[Request], Response]) -> Route:
    """A GET route."""
    return Route(path, function, methods=["GET"])


def action(path: str, function: Callable[[Request, Fields], Response]) -> Route:
    """A POST route: `function` gets the fields of the form that was sent."""

    async def respond(request: Request) -> Response:
        sent = b""
        async for part in request.stream():
            sent += part
            if len(sent) > MOST_SENT:
                raise HTTPException(413, "That is too long.")
        try:
            fields = dict(parse_qsl(sent.decode(), keep_blank_values=True, max_num_fields=1000))
        except ValueError:
            raise HTTPException(400, "This is not a form.") from None
        return await run_in_threadpool(function, request, fields)

    return Route(path, respond, methods=["POST"])


def go_to(address: str) -> RedirectResponse:
    """Redirect the browser to a page."""
    return RedirectResponse(address, status_code=303)


def explained(request: Request, error: Exception) -> Response:
    """An error as a page, or as a part of one if `ui.js` asks."""
    if isinstance(error, HTTPException):
        status, what, lines = error.status_code, error.detail, []
    else:
        assert isinstance(error, UserError)
        status, what = 400, readable(f"{error.where}: {error.what}" if error.where else error.what)
        lines = [("Expected", readable(error.expected)), ("To do", readable(error.advice))]
    part = "part" in request.headers.get("accept", "")
    response = page(
        request,
        "error_part.html.j2" if part else "error.html.j2",
        what=what,
        lines=[(label, text) for label, text in lines if text],
    )
    response.status_code = status
    return response
