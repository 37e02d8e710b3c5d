"""The pages of runs."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from prefold.ui.site import Page, page, route

PAGE = Page("/runs", "Runs")


def _runs(request: Request) -> Response:
    return page(request, "runs.html.j2")


ROUTES = [route("/runs", _runs)]
