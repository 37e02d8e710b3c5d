"""A draft as a commented recipe, and the account of what became of the file's keys."""

from __future__ import annotations

import textwrap
from typing import Any

import yaml

from prefold.importing.draft import Draft, Group, Note
from prefold.recipe import Recipe
from prefold.recipe.section import section_fields

WIDTH = 80
LINE_WIDTH = 120
_COMMENT_WIDTH = 100
_BLOCKS = ("data.train", "data.eval", "rewards", "mixed.losses")
"""Lists that are written with a line for each entry."""


def nested(draft: Draft) -> dict[str, Any]:
    """The values of the recipe by section, in the order of a recipe's fields."""
    values: dict[str, Any] = {}
    for section in section_fields(Recipe):
        if draft.values.get(section) is not None:
            values[section] = draft.values[section]
        known = section_fields(Recipe, [section])
        given = [field for field, value in draft.values.items() if value is not None]
        own = [field.rpartition(".")[2] for field in given if field.startswith(f"{section}.")]
        if own:
            names = [*(name for name in known if name in own), *(name for name in own if name not in known)]
            values[section] = {name: draft.values[f"{section}.{name}"] for name in names}
    return values


def recipe_text(draft: Draft, heading: list[str]) -> str:
    """The recipe as YAML, each comment beside its field, or above it if it is long."""
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
    comment, name = draft.comments.get(dotted, ""), dotted.rpartition(".")[2]
    if dotted in _BLOCKS:
        lines = [f"{indent}{name}:", *(line for entry in value for line in _entry_lines(entry, f"{indent}  "))]
    else:
        lines = [f"{indent}{name}: {_plain(value)}"]
    if not comment:
        return lines
    if len(lines[0]) + len(comment) + 3 <= _COMMENT_WIDTH:
        return [f"{lines[0]} # {comment}", *lines[1:]]
    prefix = f"{indent}# "
    return [*textwrap.wrap(comment, _COMMENT_WIDTH, initial_indent=prefix, subsequent_indent=prefix), *lines]


def _entry_lines(entry: Any, indent: str) -> list[str]:
    """An entry of a list, on one line if that is not too long."""
    line = f"{indent}- {_plain(entry)}"
    if len(line) <= LINE_WIDTH or not isinstance(entry, dict):
        return [line]
    fields = [f"{name}: {_plain(value)}" for name, value in entry.items()]
    return [f"{indent}{'  ' if number else '- '}{field}" for number, field in enumerate(fields)]


def _plain(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


# ---- the account ------------------------------------------------------------------------------------------------

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
    given = list(draft.given)

    def position(note: Note) -> int:
        """The position of the note's first key in the file."""
        outer = note.keys[0].partition(".")[0]
        return given.index(outer if outer in given else note.keys[0])

    blocks = []
    for group, title in _TITLES.items():
        by_text: dict[str, list[str]] = {}
        for note in sorted((note for note in draft.notes if note.group == group), key=position):
            by_text.setdefault(note.text, []).extend(note.keys)
        if by_text:
            entries = [_entry(keys, text) for text, keys in by_text.items()]
            blocks.append("\n".join([*textwrap.wrap(title, WIDTH - 1), *entries]))
    if draft.silent:
        title = f"Written as {draft.tool}'s defaults, since the file says nothing of them"
        blocks.append(f"{title}\n{_entry(draft.silent)}")
    return "\n\n".join(blocks)


def _entry(keys: list[str], text: str = "") -> str:
    names = ", ".join(dict.fromkeys(keys))
    if text and len(names) + len(text) + 6 < WIDTH:
        return f"  {names}: {text}"
    return "\n".join([_wrapped(names, "  "), *([_wrapped(text, "      ")] if text else [])])


def _wrapped(text: str, indent: str) -> str:
    return textwrap.fill(text, WIDTH - 1, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
