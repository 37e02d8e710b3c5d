"""A draft as a commented recipe, and what became of the file's keys, for people."""

from __future__ import annotations

import textwrap
from typing import Any

import yaml

from prefold.importing.draft import Draft, Group, Note
from prefold.recipe import Recipe
from prefold.recipe.explain import section_fields

WIDTH = 80
_COMMENT_WIDTH = 100
_BLOCKS = ("data.train", "data.eval", "rewards", "mixed.losses")
"""Lists that have a line for each entry."""


def nested(draft: Draft) -> dict[str, Any]:
    """The values of the recipe, in the order in which a recipe has its fields."""
    values: dict[str, Any] = {}
    for section in section_fields(Recipe):
        if draft.values.get(section) is not None:
            values[section] = draft.values[section]
        order = list(section_fields(Recipe, [section]))
        own = {_last(field): value for field, value in draft.values.items() if field.startswith(f"{section}.")}
        if own := {name: value for name, value in own.items() if value is not None}:
            values[section] = {name: own[name] for name in sorted(own, key=lambda name: [*order, name].index(name))}
    return values


def recipe_text(draft: Draft, heading: list[str]) -> str:
    """The recipe as YAML, each comment beside its field, or above it where it is long."""
    lines = [f"# {line}" for paragraph in heading for line in textwrap.wrap(paragraph, _COMMENT_WIDTH)]
    for section, value in nested(draft).items():
        if isinstance(value, dict):
            lines.append(f"{section}:")
            for field, inner in value.items():
                lines += _field(f"{section}.{field}", inner, draft, "  ")
        else:
            lines += _field(section, value, draft, "")
    return "\n".join(lines) + "\n"


def _field(dotted: str, value: Any, draft: Draft, indent: str) -> list[str]:
    comment, name = draft.comments.get(dotted, ""), _last(dotted)
    if dotted in _BLOCKS:
        lines = [f"{indent}{name}:", *(f"{indent}  - {_plain(entry)}" for entry in value)]
    else:
        lines = [f"{indent}{name}: {_plain(value)}"]
    if not comment:
        return lines
    if len(lines[0]) + len(comment) + 3 <= _COMMENT_WIDTH:
        return [f"{lines[0]} # {comment}", *lines[1:]]
    prefix = f"{indent}# "
    return [*textwrap.wrap(comment, _COMMENT_WIDTH, initial_indent=prefix, subsequent_indent=prefix), *lines]


def _plain(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _last(dotted: str) -> str:
    return dotted.rpartition(".")[2]


# ---- what is said -----------------------------------------------------------------------------------------------

_TITLES: dict[Group, str] = {
    "same": "Carried over under the same name",
    "renamed": "Carried over under another name",
    "decided": "Needs no setting in prefold",
    "missing": "Has no counterpart",
    "unknown": "Not known, and not carried over; compare with the fields that `prefold schema` lists",
    "off": "Off, empty or without effect in the file",
}


def account(draft: Draft) -> str:
    """What became of every key, by group, at most 80 columns wide."""
    blocks: list[str] = []
    for group, title in _TITLES.items():
        notes = sorted((note for note in draft.notes if note.group == group), key=lambda note: _place(draft, note))
        if not notes:
            continue
        body = [_names([key for note in notes for key in note.keys])]
        if any(note.text for note in notes):
            by_text: dict[str, list[str]] = {}
            for note in notes:
                by_text.setdefault(note.text, []).extend(note.keys)
            body = [_entry(keys, text) for text, keys in by_text.items()]
        blocks.append("\n".join([*textwrap.wrap(title, WIDTH - 1), *body]))
    if draft.silent:
        title = f"Written as {draft.tool}'s defaults, since the file says nothing of them"
        blocks.append("\n".join([title, _names(draft.silent)]))
    return "\n\n".join(blocks)


def _place(draft: Draft, note: Note) -> int:
    """Where in the file the note's first key is."""
    given, key = list(draft.given), note.keys[0]
    outer = key.partition(".")[0]
    return given.index(outer if outer in given else key)


def _names(names: list[str]) -> str:
    return _wrapped(", ".join(dict.fromkeys(names)), "  ")


def _entry(keys: list[str], text: str) -> str:
    names = ", ".join(dict.fromkeys(keys))
    if text and len(names) + len(text) + 6 < WIDTH:
        return f"  {names}: {text}"
    return "\n".join([_wrapped(names, "  "), *([_wrapped(text, "      ")] if text else [])])


def _wrapped(text: str, indent: str) -> str:
    return textwrap.fill(text, WIDTH - 1, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
