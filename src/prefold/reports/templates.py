"""The templates of pages and cards, with the functions of `numbers.py` and `tasks.py` as filters.

On a page every value is escaped, and each number is shown in full when the pointer rests on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from prefold.reports import numbers, tasks
from prefold.reports.run_files import as_list, objects, section, turns

NUMBERS = (
    *(numbers.percent, numbers.points, numbers.signed, numbers.decimal, numbers.scientific, numbers.count),
    *(numbers.duration, numbers.memory, numbers.score, numbers.change, numbers.written),
)
TEXTS = (
    *(tasks.note, tasks.in_training_data, tasks.in_words, tasks.whisker, tasks.decimals_of, tasks.smallest),
    *(tasks.outcome_of, tasks.are_shares, numbers.p_value, numbers.ends, numbers.counted),
    *(as_list, objects, section, turns),
)


def page_template(name: str) -> Callable[..., str]:
    """The function that renders a page."""
    return pages().get_template(name).render


@cache
def pages(*folders: Path) -> Environment:
    """The templates of pages: those of this folder, and of further ones."""
    return _environment({write.__name__: _in_span(write) for write in NUMBERS}, folders, autoescape=True)


def card_template(name: str, finalize: Callable[[Any], Any], *filters: Callable[..., Any]) -> Callable[..., str]:
    """The function that renders a card. Every value goes through `finalize`; `filters` are added to the usual ones."""
    own = {function.__name__: function for function in (*NUMBERS, *filters)}
    settings: dict[str, Any] = {"autoescape": False, "finalize": finalize, "keep_trailing_newline": True}
    return _environment(own, **settings).get_template(name).render


def _environment(filters: dict[str, Any], folders: Sequence[Path] = (), **settings: Any) -> Environment:
    settings |= {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=FileSystemLoader([*folders, Path(__file__).parent]), **settings)
    environment.filters |= filters | {function.__name__: function for function in TEXTS}
    environment.globals |= {write.__name__: write for write in NUMBERS} | {"script_hashes": ()}
    environment.tests["finite"] = lambda value: numbers.finite(value) is not None
    return environment


def _in_span(write: Callable[..., str]) -> Callable[..., Markup]:
    def shown(value: Any, *settings: Any) -> Markup:
        full = numbers.exact(value)
        title = Markup(' title="{}"').format(full) if full else ""
        return Markup('<span class="number"{}>{}</span>').format(title, write(value, *settings))

    return shown
