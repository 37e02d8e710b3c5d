"""What a chat template reads, and the keywords that are passed to every call of it (`model.chat_template_kwargs`)."""

from __future__ import annotations

import inspect
import re
import string
from collections.abc import Mapping
from datetime import date
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
from jinja2 import meta, nodes

from prefold.data.spans import common
from prefold.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATE = "strftime_now"
"""The function that templates call for today's date; transformers provides it."""
REFUSALS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What a template raises if it cannot write the messages."""
_OWN = {"messages", "add_generation_prompt", "raise_exception"}
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
_CODES = [f"%{flag}{letter}" for letter in string.ascii_letters for flag in ("-", "")]


class Reads(NamedTuple):
    """`variables`: the keywords that a template reads and that can be passed to it; `fields`: every attribute and
    string in it, among them the fields of messages and tools that it reads."""

    variables: frozenset[str]
    fields: frozenset[str]


def reads(tokenizer: PreTrainedTokenizerBase) -> Reads:
    """What the tokenizer's template reads; of several templates, what any of them reads."""
    return _reads(source_of(tokenizer))


def source_of(tokenizer: PreTrainedTokenizerBase) -> str:
    template: Any = tokenizer.chat_template
    return "\n".join(template.values()) if isinstance(template, dict) else template or ""


@lru_cache
def _reads(source: str) -> Reads:
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", source))
    except jinja2.TemplateSyntaxError:  # every call of the template says so
        return Reads(frozenset(), frozenset())
    # A variable that a template sets itself is no keyword, unless it first tests whether the variable is defined.
    set_inside = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "store"}
    tests = [*tree.find_all(nodes.Test), *tree.find_all(nodes.Filter)]
    tested = {
        test.node.name
        for test in tests
        if isinstance(test.node, nodes.Name) and test.name in ("defined", "undefined", "default", "d")
    }
    variables = meta.find_undeclared_variables(tree) - (set_inside - tested) - _OWN
    attributes = {node.attr for node in tree.find_all(nodes.Getattr)}
    constants = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return Reads(frozenset(variables), frozenset(attributes | constants))


def give_keywords(tokenizer: PreTrainedTokenizerBase, keywords: Mapping[str, Any]) -> None:
    """Pass these keywords to every later call of the template; those of the call itself take precedence. The template
    that is saved stays as it is.

    Raises UserError: the template does not read one of them, or it is an argument of `apply_chat_template`.
    """
    taken = {*_OWN, *inspect.signature(type(tokenizer).apply_chat_template).parameters} - {"tools", "documents"}
    known = reads(tokenizer).variables - taken
    for name in keywords:
        if name not in known:
            what = f"`{name}` is " + ("what prefold itself gives" if name in taken else "not read by the chat template")
            expected = f"one of {', '.join(sorted(known))}" if known else "no keywords: the template reads none"
            advice = did_you_mean(name, known)
            raise UserError(what, where="model.chat_template_kwargs", expected=expected, advice=advice)
    if keywords:
        tokenizer.apply_chat_template = partial(_apply, tokenizer, **keywords)  # type: ignore[method-assign]


def keywords_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The keywords set by `give_keywords`."""
    return dict(getattr(tokenizer.apply_chat_template, "keywords", {}))


def _apply(tokenizer: PreTrainedTokenizerBase, conversation: Any, strftime_now: str | None = None, **given: Any) -> Any:
    if strftime_now:
        template = tokenizer.get_chat_template(given.get("chat_template"), given.get("tools"))
        given["chat_template"] = dated(template, date.fromisoformat(strftime_now))
    return type(tokenizer).apply_chat_template(tokenizer, conversation, **given)


def dated(template: str, day: date) -> str:
    """A template for which today is `day`. transformers passes no functions on, so a macro replaces `strftime_now`."""
    written = "".join(f"|replace({code!r},{day.strftime(code)!r})" for code in _CODES if day.strftime(code) != code)
    return f"{{% macro {DATE}(form) %}}{{{{ form{written} }}}}{{% endmacro %}}{{{{ '' }}}}{template}"


def moving_date(tokenizer: PreTrainedTokenizerBase, conversation: Any, **given: Any) -> str | None:
    """The line of a conversation in which the template writes today's date; None if it writes none."""
    if DATE in keywords_of(tokenizer) or DATE not in source_of(tokenizer):
        return None
    template = tokenizer.get_chat_template(tools=given.get("tools"))
    # Two days that have no part in common, so that the whole date differs.
    days = [dated(template, day) for day in (date.today(), date(1987, 11, 23))]
    now, then = (
        str(tokenizer.apply_chat_template(conversation, chat_template=day, tokenize=False, **given)) for day in days
    )
    if now == then:
        return None
    start = now.rfind("\n", 0, common(now, then)) + 1
    stop = now.find("\n", len(now) - common(now[::-1], then[::-1]))
    return now[start : stop if stop >= 0 else None].strip()[:80]
