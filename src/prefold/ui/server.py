"""`prefold ui`: a server for the browser of the person at this machine, and for nobody else.

It listens on loopback alone. The token in its address becomes a cookie with the first page; requests without it, under
another host name, or from a page of another origin are refused. Pages run the scripts of this package and no others.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import sys
import traceback
import webbrowser
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import prefold.reports
from prefold.errors import UserError
from prefold.ui import ahead, data, runs, samples, talk, vote
from prefold.ui.site import HERE, Site, explained, go_to, route, templates

MODULES: tuple[ModuleType, ...] = (runs, data, samples, talk, ahead, vote)
"""The modules of pages, in the order of the navigation."""
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; style-src-attr "
    "'unsafe-inline'; img-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
"""Headers of every response that does not set them itself."""
OF_REPORTS = ("page.css", "draw_curves.js")
"""Static files that pages share with reports."""


def serve(folders: Sequence[Path], port: int = 0, browser: bool = True) -> None:
    """Serve until the process is ended; the first line on stdout is the address.

    Args:
        folders: what may be read and written; none: the working directory.
        port: 0: a free one.

    Raises:
        UserError: a folder does not exist, or the port is taken.
    """
    resolved = tuple(dict.fromkeys(folder.expanduser().resolve() for folder in folders or [Path()]))
    for folder in resolved:
        if not folder.is_dir():
            raise UserError("there is no such folder", where=str(folder), advice="name the folder that holds runs")
    listening = _listen(port)
    site = Site(resolved, Path.cwd(), listening.getsockname()[1], secrets.token_urlsafe(24))
    address = f"http://127.0.0.1:{site.port}/?token={site.token}"
    print(address, flush=True)
    Thread(target=_prepare, args=(site,), daemon=True).start()
    if browser and (sys.platform != "linux" or os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"}):
        webbrowser.open(address)  # without a display a text browser would take over the terminal
    settings = uvicorn.Config(
        make_app(site),
        log_level="critical",
        access_log=False,
        timeout_graceful_shutdown=1,
        ws="none",
        lifespan="off",
        proxy_headers=False,
        server_header=False,
    )
    uvicorn.Server(settings).run(sockets=[listening])


def _prepare(site: Site) -> None:
    """Do beforehand what would slow down the first page."""
    runs.index_of(site.folders).rows()
    for name in templates().list_templates(filter_func=lambda name: name.endswith(".html.j2")):
        templates().get_template(name)


def _listen(port: int) -> socket.socket:
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", port))
    except OSError as error:
        listening.close()
        what = f"cannot listen on port {port} ({error.strerror})"
        raise UserError(what, where="`--port`", advice="give another one, or leave it out for a free one") from None
    listening.listen(128)
    return listening


def make_app(site: Site) -> ASGIApp:
    pages = tuple(module.PAGE for module in MODULES if hasattr(module, "PAGE"))
    routes = [
        route("/", lambda request: go_to(pages[0].path)),
        route("/static/{name}", _static),
        *(declared for module in MODULES for declared in module.ROUTES),
    ]
    handlers = {HTTPException: explained, UserError: explained, Exception: _failed}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.state.site = replace(site, navigation=pages)
    return Guard(app, site)


def _failed(request: Request, error: Exception) -> Response:
    """A bug: the terminal shows the traceback."""
    traceback.print_exception(error)
    return explained(request, HTTPException(500, f"This failed ({type(error).__name__}); the terminal shows where."))


def _static(request: Request) -> Response:
    name = request.path_params["name"]
    file = (Path(prefold.reports.__file__).parent if name in OF_REPORTS else HERE / "static") / name
    if not file.is_file():
        raise HTTPException(404)
    return FileResponse(file, headers={"cache-control": "no-cache"})


class Guard:
    """Lets through the requests of the person at this machine, who has the token, and adds `HEADERS` to responses."""

    def __init__(self, app: ASGIApp, site: Site):
        self.app, self.token, self.cookie = app, site.token, f"prefold-{site.port}"
        self.hosts = {f"127.0.0.1:{site.port}", f"localhost:{site.port}"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send) if scope["type"] == "lifespan" else None

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await (self._refusal(HTTPConnection(scope)) or self.app)(scope, receive, send_with_headers)

    def _refusal(self, request: HTTPConnection) -> Response | None:
        """The response to a request that goes no further; None if it may pass."""
        headers, method = request.headers, request.scope["method"]
        host, origin, site = headers.get("host"), headers.get("origin"), headers.get("sec-fetch-site", "none")
        if host not in self.hosts:
            return PlainTextResponse("This server answers to 127.0.0.1 and localhost alone.", 403)
        is_link = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
        if (origin or method not in ("GET", "HEAD")) and origin != f"http://{host}":
            return PlainTextResponse("The request comes from another origin.", 403)
        if site not in ("none", "same-origin") and not is_link:
            return PlainTextResponse("The request comes from a page of another site.", 403)
        given = request.query_params.get("token")
        if given is not None and method == "GET" and self._is_token(given):
            rest = request.url.remove_query_params("token")
            response: Response = RedirectResponse(f"{rest.path}?{rest.query}".rstrip("?"), status_code=303)
            response.set_cookie(self.cookie, self.token, httponly=True, samesite="lax", path="/")
            return response
        if not self._is_token(request.cookies.get(self.cookie, "")):
            text = "Open the address that `prefold ui` printed: it holds a token, without which nothing is shown."
            return PlainTextResponse(text, 403)
        return None

    def _is_token(self, given: Any) -> bool:
        return hmac.compare_digest(str(given).encode(), self.token.encode())
