"""What tests of pages have in common: texts that would like to run, and what must not have come of them."""

from __future__ import annotations

import runpy
from html.parser import HTMLParser
from pathlib import Path

FAKE_RUN = runpy.run_path(str(Path(__file__).parents[1] / "reports" / "fake_run.py"))
HOSTILE = [text.encode("utf-8", "replace").decode() for text in FAKE_RUN["HOSTILE"]]
HOSTILE += [f"{quote}{text}{end}" for quote, end in (('">', ""), ("'}", "{'")) for text in HOSTILE[:30]]
ORIGIN = {"origin": "http://127.0.0.1:8000"}


class Elements(HTMLParser):
    """Refuses an element, or an attribute that runs anything, that came from a text."""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        assert tag not in ("img", "iframe", "object", "base", "math", "style"), (tag, given)
        assert not [name for name in given if name.startswith("on") or name == "srcdoc"], given
        assert tag != "script" or given.get("src", "").startswith("/static/"), given
        for name in ("href", "src", "action"):
            target = given.get(name, "/")
            assert target.startswith(("/", "?", "#", "data:,")) and not target.startswith("//"), given


def require_harmless(text: str) -> None:
    Elements().feed(text)
