"""The shape of a source, recognised by the columns of its first rows and by what is in them.

To add a layout, add a row with its reader to the table of `conversion` or of `rankings`.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, product
from typing import Any

from prefold.data import conversion, rankings
from prefold.data.cells import (
    MISSING,
    cell_at,
    end_of_path,
    has_cell,
    is_cut_off,
    is_empty,
    listed,
    read_if_text,
    written,
)
from prefold.data.dialogues import string_writing
from prefold.data.formats import RawRow
from prefold.data.forms import FORMS, Form, holds_turns, is_part_of_ranking, is_texts, is_turns, speaker_of
from prefold.data.layouts import KINDS as KINDS
from prefold.data.layouts import Columns, Layout
from prefold.data.layouts import Kind as Kind
from prefold.data.layouts import Shape as Shape
from prefold.data.preference import Writing, short
from prefold.data.sources import source_name
from prefold.data.votes import is_rating, require_decided, scale_of_labels, scale_of_votes, vote_columns
from prefold.errors import UserError, counted, did_you_mean, json_type
from prefold.recipe import Source
from prefold.recipe.values import Values

_ROWS_LOOKED_AT = 20
_REPEATED_CHARACTERS = 16
_LAYOUTS = (*conversion.LAYOUTS, *rankings.LAYOUTS)
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_ENDS = (("_1", "_2"), ("1", "2"), ("_a", "_b"), ("_A", "_B"), ("_0", "_1"))


def _couples(stems: str, *more: tuple[str, str]) -> list[tuple[str, str]]:
    """Pairs of names of columns that go together."""
    return [(stem + first, stem + second) for stem in stems.split() for first, second in _ENDS] + [*more]


_OUTPUTS = _couples(
    "output response answer completion", ("human_ref_A", "human_ref_B"), ("conversation_a", "conversation_b")
)
_SCORES = _couples("score rating reward")
_WINNERS = ("winner_model_a", "winner_model_b")
# Role -> columns that are recognised as having it; messages name the first.
_COLUMNS_OF_ROLES = {
    "prompt": "prompt question instruction input question.full_text query context history",
    "chosen": """
        chosen chosen_response chosen_answer chosen_completion chosen_messages chatgpt response_j accepted
        accepted_response preferred preferred_response preferred_output preferred_answer preferred_completion
        better_response y_w positive full_chosen""",
    "rejected": """
        rejected rejected_response rejected_answer rejected_completion rejected_messages llama2-13b-chat response_k
        dispreferred dispreferred_response dispreferred_output non_preferred non_preferred_response
        non_preferred_output non_preferred_answer non_preferred_completion worse_response y_l negative full_rejected""",
    "messages": "messages conversations conversation trajectory input.messages",
    "sentences": "source",
    "output_1": " ".join(first for first, _ in _OUTPUTS),
    "output_2": " ".join(second for _, second in _OUTPUTS),
    "vote": """
        label preference annotator1 annotator_1 winner preferred better vote choice overall_preference
        preference_strength better_response_id safer_response_id labels preferred_response preferred_answer
        preferred_output preferred_completion better_response""",
    "score_1": " ".join(first for first, _ in (*_SCORES, _WINNERS)),
    "score_2": " ".join(second for _, second in (*_SCORES, _WINNERS)),
    "completion": "completion response output",
    "label": "label kto_tag",
    "answers": """
        answers completions responses generations candidates candidates_completions summaries
        all_generated_responses""",
    "answer": "answer",
    "rating": "ratings scores rewards rating all_rm_scores",
    "rank": "ranks rank",
    "better_worse": "output",
    "best_first": "best_first",
    "choice": "choice",
    "post": "info",
    "tree": "prompt",
}
_KNOWN_COLUMNS = {role: tuple(names.split()) for role, names in _COLUMNS_OF_ROLES.items()}
# The same of roles that a row may have beside those of its layout.
_EXTRAS: dict[str, tuple[str, ...]] = {
    "system": ("system", "system_prompt"),
    "tools": ("tools", "input.tools"),
    "chat_template_kwargs": ("chat_template_kwargs",),
    "history": ("history",),
}
_WEAK_PROMPTS = ("query", "context", "history")
"""Columns that are the prompt only if no other is."""
_TOGETHER = (("output_1", "output_2"), ("score_1", "score_2"))
"""Roles whose columns go together, such as `response_a` and `response_b`."""
ROLES = (*_KNOWN_COLUMNS, *_EXTRAS, "input")
READ_IN_PAIRS = {"input", *_MEDIA}.union(
    *_EXTRAS.values(),
    *(_KNOWN_COLUMNS[role] for role in ("prompt", "chosen", "rejected", "messages", "output_1")),
)
"""Columns that change how a row is read if it has them beside `prompt`, `chosen` and `rejected`."""


FITTING: dict[Kind, tuple[Kind, ...]] = {kind: (kind,) for kind in KINDS} | {"unpaired": ("unpaired", "pairs")}
"""Kinds of sources for each kind that a method takes: each side of a pair serves as an answer with a label."""


def shape_of(rows: Sequence[RawRow], source: Source, kind: Kind) -> Shape:
    """The shape of a source by its first rows, for a method that trains on records of a kind. Raises UserError: see
    `find_shape` and `with_rule`."""
    name = source_name(source)
    shape = find_shape(rows, name, source.columns, FITTING[kind], source.values)
    return rankings.with_rule(shape, source, name, kind)


def find_shape(
    rows: Sequence[RawRow],
    source: str,
    columns: Mapping[str, str] | None = None,
    kinds: Sequence[Kind] = KINDS,
    values: Values | None = None,
) -> Shape:
    """Recognise the shape of a source by its first rows; the layout is `unknown` if none of them is an object.

    Pairs take precedence over unpaired answers, and these over prompts, so that nothing beside a prompt is overlooked.

    Args:
        rows: the first ones of the source.
        columns: role -> column of the file or path into one, for roles that are not to be recognised.
        kinds: those to consider; with `prompts` alone, the prompts of pairs are recognised too.
        values: what votes or labels mean, if the recipe says it.

    Raises:
        UserError: `columns` names a role or a column that does not exist; no shape fits, or several fit equally; it is
            uncertain what votes or labels mean; or a column holds lists as text in some rows only.
    """
    given = [row.value for row in rows if row.value is not None]
    named = dict(columns or {})
    _check_named(named, given, source)
    if not given:
        return Shape(replace(conversion.UNKNOWN, kind=kinds[0]))
    read, parsed, mixed = _with_lists_read(given, named)
    first = read[:_ROWS_LOOKED_AT]
    for kind, forgiving in product([kind for kind in KINDS if kind in kinds], (False, True)):
        layouts, ranked = (
            [layout for layout in table if layout.kind == kind and _is_candidate(layout, named, values)]
            for table in (conversion.LAYOUTS, rankings.LAYOUTS)
        )
        fitting = [_fitting(row, layouts, named, forgiving) or _fitting(row, ranked, named, forgiving) for row in first]
        if any(fitting):
            shape = _most_frequent(fitting, source)
            _require_all_written([column for _, column in shape.columns], mixed, source)
            shape = _completed(shape, given, read, parsed, named, values, source)
            if shape.layout in rankings.LAYOUTS:
                rankings.require_sure(shape, read, source)
            return shape
    rankings.require_whole_rows(list(chain.from_iterable(first)), source)
    _require_all_written(list(chain(*_KNOWN_COLUMNS.values(), named.values())), mixed, source)
    raise _no_shape(first, source, named, kinds, values)


def _is_candidate(layout: Layout, named: Mapping[str, str], values: Values | None) -> bool:
    role = values and ("vote" if values.of_votes else "label")
    is_used = role is None or role in layout.forms or (role == "label" and layout.is_rated)
    return named.keys() <= _roles(layout) and is_used


def _roles(layout: Layout) -> set[str]:
    """The roles that `columns` may name."""
    with_prompt = ("input", "history") if "prompt" in layout.forms else ()
    return {*layout.forms, *layout.aside, "system", "tools", "chat_template_kwargs", *with_prompt}


def _with_lists_read(
    rows: Sequence[dict[str, Any]], named: Mapping[str, str]
) -> tuple[list[dict[str, Any]], set[str], dict[str, str]]:
    """The rows, with lists parsed in the columns that store them as text in every row; these columns; and the columns
    that do so in some rows only, with a description of their cells."""
    cells = {
        name: [cell for row in rows if (cell := cell_at(row, name)) is not MISSING]
        for name in dict.fromkeys([*chain.from_iterable(rows), *named.values()])
    }
    parsed, mixed = set(), {}
    of_rankings = {named.get(role, name) for role in rankings.READ_FROM_TEXT for name in _KNOWN_COLUMNS[role]}
    for name, of_column in cells.items():
        forms: dict[str, Form] = {"lists of messages": holds_turns}
        if name in of_rankings:
            forms["lists"] = is_part_of_ranking
        for what, is_meant in forms.items():
            lists = written(of_column, is_meant)
            fit = sum(value is not MISSING for value in lists)
            if fit and fit == len(lists):
                parsed.add(name)
            elif is_meant is holds_turns and lists and (cut := sum(map(is_cut_off, of_column))):
                mixed[name] = f"text that begins as a list of messages and cannot be read as one: {counted(cut, 'row')}"
            elif fit:
                mixed[name] = f"{what} as text in {counted(fit, 'row')}, and other text in {len(lists) - fit}"
    # The text of a list may be an answer; but lists of prompts beside lists of answers of each side are lists.
    texts = {name for name in cells if (lists := written(cells[name], is_texts)) and MISSING not in lists}
    for outputs in _OUTPUTS:
        if texts.issuperset(outputs) and (prompt := texts.intersection(_KNOWN_COLUMNS["prompt"])):
            parsed |= {*outputs, *prompt}
    read = []
    for row in rows:
        stored = {name: cell for name in parsed if isinstance(cell := cell_at(row, name), str) and cell.strip()}
        read.append(row | {name: read_if_text(text) for name, text in stored.items()})
    return read, parsed, mixed


def _require_all_written(columns: Sequence[str], mixed: Mapping[str, str], source: str) -> None:
    if name := next((column for column in columns if column in mixed), None):
        advice = "write the lists alike in all rows, as JSON; or leave rows out by `where`"
        raise UserError(f"`{short(name)}` holds {mixed[name]}", where=source, advice=advice)


def _completed(
    shape: Shape,
    given: Sequence[dict[str, Any]],
    read: Sequence[dict[str, Any]],
    parsed: set[str],
    named: Mapping[str, str],
    values: Values | None,
    source: str,
) -> Shape:
    """The shape with everything that takes more than a few rows to recognise."""
    columns = dict(shape.columns)
    present = dict.fromkeys(chain.from_iterable(given))
    scored = next(((first, second) for first, second in _SCORES if {first, second} <= present.keys()), None)
    if "vote" in columns and scored:
        columns |= dict(zip(("score_1", "score_2"), scored, strict=True))
    not_understood = []
    for role, names in _EXTRAS.items():
        if role == "history" and ("prompt" not in columns or columns["prompt"] == "history"):
            continue
        if column := named.get(role) or _extra_column(FORMS[role], names, given):
            columns[role] = column
        else:
            not_understood.append(names[0])
    complete = replace(shape, columns=tuple(columns.items()), values=_meaning(columns, read, values, source))
    repeats = shape.layout.name == "text" and shape.writing == "plain" and _all_repeat_prompt(columns, given)
    used = {column if column in present else column.split(".")[0] for column in columns.values()}
    return replace(
        complete,
        parsed=tuple(sorted(parsed.intersection(columns.values()))),
        repeats_prompt=repeats,
        media=tuple(name for name in _MEDIA if name in present and name not in used),
        unused=() if shape.kind == "prompts" else _unused(complete, used, given),
        not_understood=tuple(name for name in not_understood if name not in used),
    )


def _extra_column(form: Form, names: Sequence[str], rows: Sequence[dict[str, Any]]) -> str | None:
    """The column of an extra role: the first with a cell of its form; else the usual one if that is empty."""
    filled = {name: [cell for row in rows if not is_empty(read_if_text(cell := cell_at(row, name)))] for name in names}
    fitting = [name for name in names if any(map(form, filled[name]))]
    return fitting[0] if fitting else names[0] if not filled[names[0]] else None


def _meaning(
    columns: Mapping[str, str], rows: Sequence[dict[str, Any]], values: Values | None, source: str
) -> Values | None:
    """What votes or labels mean, if not 1 and 2 or true and false."""
    role = next((role for role in ("vote", "label") if role in columns), None)
    if role is None:
        return values
    column = columns[role]
    names = vote_columns(column, dict.fromkeys(chain.from_iterable(rows)))
    cells = [cell_at(row, name) for row in rows for name in names]
    if values is not None:
        require_decided(cells, column, values, source)
        return values
    if role == "label":
        return scale_of_labels(cells, column, source)
    outputs = (columns["output_1"], columns["output_2"])
    return scale_of_votes(cells, column, outputs, set(chain.from_iterable(rows)), source)


def _all_repeat_prompt(columns: Mapping[str, str], rows: Sequence[dict[str, Any]]) -> bool:
    """Whether both answers of each row begin with the text of its prompt; rows with an empty cell do not count."""
    texts = [[cell_at(row, columns[role]) for role in ("prompt", "chosen", "rejected")] for row in rows]
    full = [cells for cells in texts if all(isinstance(cell, str) and cell.strip() for cell in cells)]
    # A few short prompts may begin their answers by chance.
    is_enough = sum(len(prompt) for prompt, *_ in full) >= _REPEATED_CHARACTERS
    return is_enough and all(answer.startswith(prompt) for prompt, *answers in full for answer in answers)


def _unused(shape: Shape, used: set[str], rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """The columns that are not empty, have no role, give no rating and are not known to the layout."""
    aside = set(shape.layout.aside).difference(rankings.ITEM_ROLES)
    known = {*used, *_MEDIA, "winner_tie"}.union(*(_KNOWN_COLUMNS[role] for role in aside))
    filled = {name: cell for row in rows for name, cell in row.items() if name not in known and not is_empty(cell)}
    votes = vote_columns(dict(shape.columns).get("vote", ""), filled)
    names = [name for name, cell in filled.items() if not is_rating(name, cell) and name not in votes]
    # A name may contain lone surrogates, which cannot be encoded.
    return tuple(name.encode("utf-8", "backslashreplace").decode() for name in names)


def _fitting(
    value: dict[str, Any], layouts: Sequence[Layout], named: Mapping[str, str], forgiving: bool
) -> list[Shape]:
    """The shapes that fit a row, at most one for the same assignment of columns."""
    shapes: dict[Columns, Shape] = {}
    for layout in layouts:
        if any(name in value for role in layout.absent for name in _KNOWN_COLUMNS[role]):
            continue
        for columns in _assignments(layout, value, named):
            if _fits(layout, value, columns, forgiving):
                shapes.setdefault(columns, Shape(layout, columns, _writing(value, columns)))
    voted = any("vote" in dict(columns) for columns in shapes)
    # Scores beside a vote are ratings.
    return [shape for columns, shape in shapes.items() if not (voted and "score_1" in dict(columns))]


def _assignments(layout: Layout, value: dict[str, Any], named: Mapping[str, str]) -> Iterator[Columns]:
    """Every assignment of a row's columns to the roles of a layout."""
    for chosen in product(*_choices(layout, value, named).values()):
        columns = dict(zip(layout.forms, chosen, strict=True))
        if not _go_together(columns, named):
            continue
        extra = {"system": named.get("system", "system")}
        # `input` continues an `instruction`; beside another prompt it may be anything.
        if columns.get("prompt") == "instruction" or "input" in named:
            extra["input"] = named.get("input", "input")
        extra |= {role: named[role] for role in rankings.ITEM_ROLES if role in named and role in layout.aside}
        yield tuple((columns | extra).items())


def _go_together(columns: Mapping[str, str], named: Mapping[str, str]) -> bool:
    """Whether the recognised columns go together, no column has two roles, and no triple of retrieval data (query,
    positive, negative) is taken for a pair."""
    for first, second in _TOGETHER:
        if first in columns and not {first, second} & named.keys():
            families = zip(_KNOWN_COLUMNS[first], _KNOWN_COLUMNS[second], strict=True)
            if (columns[first], columns[second]) not in families:
                return False
    is_triple = columns.get("chosen") == "positive" and columns.get("prompt") in _WEAK_PROMPTS
    return len(set(columns.values())) == len(columns) and not (is_triple and "prompt" not in named)


def _choices(layout: Layout, value: dict[str, Any], named: Mapping[str, str]) -> dict[str, list[str]]:
    """The columns of a row that may have a role, for each role of a layout."""
    names = {role: [named[role]] if role in named else [*_KNOWN_COLUMNS[role]] for role in layout.forms}
    if "prompt" in names.keys() - named:
        if layout.kind == "prompts" or "instruction" in value or "input" in named:
            names["prompt"].remove("input")
        strong = [name for name in names["prompt"] if name not in _WEAK_PROMPTS]
        # Beside a prompt for rewards, `context` and `history` may be anything.
        for_rewards = layout.kind == "prompts" and layout not in rankings.LAYOUTS
        weak = [name for name in _WEAK_PROMPTS[: 1 if for_rewards else None] if name in value]
        names["prompt"] = strong if any(has_cell(value, name) for name in strong) else weak[:1]
    return {role: [name for name in columns if has_cell(value, name)] for role, columns in names.items()}


def _fits(layout: Layout, value: dict[str, Any], columns: Columns, forgiving: bool) -> bool:
    """Whether the cells have their forms; if forgiving, some beside the prompt may be empty, but not all."""
    cells = {role: cell_at(value, column) for role, column in columns if role in layout.forms}
    filled = {role: cell for role, cell in cells.items() if not forgiving or cell not in (None, [])}
    is_telling = not forgiving or bool(filled.keys() - {"prompt", "messages"})
    return is_telling and all(layout.forms[role](cell) for role, cell in filled.items())


def _writing(value: dict[str, Any], columns: Columns) -> Writing:
    """How turns are written in the cells that could be dialogues."""
    roles = dict(columns)
    for role in ("prompt", "messages", "chosen"):
        cell = cell_at(value, roles.get(role, ""))
        first = cell[0] if isinstance(cell, list) and cell else cell
        if isinstance(first, dict) and "from" in first and "role" not in first:
            return "ShareGPT"
        is_whole = isinstance(cell, str) and (role == "prompt" or "prompt" not in roles)
        if is_whole and (writing := string_writing(cell)) != "plain":
            return writing
    return "plain"


def _most_frequent(fitting: Sequence[list[Shape]], source: str) -> Shape:
    counts = Counter(chain.from_iterable(fitting))
    best = max(counts, key=lambda shape: counts[shape])
    for shapes in fitting:
        rivals = [shape for shape in shapes if counts[shape] == counts[best] and shape.columns != best.columns]
        if best in shapes and rivals:
            raise _ambiguous(best, rivals[0], source)
    return best


def _check_named(named: Mapping[str, str], values: Sequence[dict[str, Any]], source: str) -> None:
    where = f"{source}, `columns`"
    for role in named:
        if role not in ROLES:
            expected = "one of" + "".join(f"\n    {line}" for line in textwrap.wrap(", ".join(ROLES), 70))
            what, advice = f"there is no role `{short(role)}`", did_you_mean(role, ROLES)
            raise UserError(what, where=where, expected=expected, advice=advice)
    present = dict.fromkeys(column for value in values for column in value)
    for role, column in named.items():
        if values and role not in rankings.ITEM_ROLES and not any(has_cell(value, column) for value in values):
            start = next((value for value in values if column.split(".")[0] in value), values[0])
            above, part, keys = end_of_path(start, column)
            lacks = f"`{short(above)}` has no `{short(part)}`" if above else "there is no such column"
            keys, part = (keys, part) if above else (list(present), column)
            advice = did_you_mean(part, map(short, keys))
            what = f"`{role}: {short(column)}`, but {lacks}"
            raise UserError(what, where=where, expected=_shown(keys), advice=advice)


def _ambiguous(first: Shape, second: Shape, source: str) -> UserError:
    ways = ""
    for shape in (first, second):
        columns = [column for role, column in shape.columns if role not in ("system", "input")]
        ways += f"\n    {shape.name}: {listed(columns)}"
    pair = {role: column for role, column in first.columns if (role, column) not in second.columns}
    example = ", ".join(f"{role}: {short(column)}" for role, column in pair.items())
    advice = f"say which by `columns:`, such as {{{example}}}"
    return UserError(f"its columns can be read in more than one way{ways}", where=source, advice=advice)


def _no_shape(
    values: Sequence[dict[str, Any]],
    source: str,
    named: Mapping[str, str],
    kinds: Sequence[Kind],
    meaning: Values | None,
) -> UserError:
    columns = list(dict.fromkeys(name for value in values for name in value))
    of_kinds = "" if len(kinds) == len(KINDS) else f" of {' or '.join(kinds)}"
    what = f"its columns are no known shape{of_kinds}: {_shown(columns)}" if columns else "its rows have no columns"
    advice = "rename its columns, or say by `columns:` which is what"
    layouts = [layout for layout in _LAYOUTS if layout.kind in kinds]
    layouts = [layout for layout in layouts if _is_candidate(layout, named, meaning)] or layouts
    merged = {name: value[name] for value in reversed(values) for name in value}
    present: list[dict[str, str]] = []
    for layout in layouts:
        roles = {role: names[0] for role, names in _choices(layout, merged, named).items() if names}
        # A row that has only a prompt is near no ranking.
        is_near = layout not in rankings.LAYOUTS or roles.keys() - {"prompt", "tree"}
        present.append(roles if is_near else {})
    shares = [(len(roles) / len(layout.forms), len(roles)) for layout, roles in zip(layouts, present, strict=True)]
    best = shares.index(max(shares))
    if present[best]:
        nearest, misfit = layouts[best], _misfit(layouts[best], present[best], merged, named)
        expected = f"nearest is {nearest.name}:\n    {nearest.meaning}\n    {misfit}"
    else:
        expected = "one of" + "".join(f"\n    {layout.name}: {layout.meaning}" for layout in layouts)
    return UserError(what, where=source, expected=expected, advice=advice)


def _misfit(layout: Layout, present: Mapping[str, str], value: dict[str, Any], named: Mapping[str, str]) -> str:
    """Why a row does not have a layout; `present`: the columns that it has, by role."""
    if unknown := [role for role in named if role not in _roles(layout)]:
        return f"but it has no {listed(unknown)}, which `columns` names"
    if missing := [_KNOWN_COLUMNS[role][0] for role in layout.forms if role not in present]:
        return f"but there is no {listed(missing)}"
    misfits = [column for role, column in present.items() if not layout.forms[role](cell_at(value, column))]
    if not misfits:
        return "but no row has all of it"
    cell = cell_at(value, misfits[0])
    if isinstance(cell, dict) and cell:
        return f"but `{short(misfits[0])}` is an object with {_shown(cell)}:\n    reach into it by a path in `columns:`"
    if isinstance(cell, list) and is_turns(cell):
        last = short(speaker_of(cell[-1]))
        return f"but `{short(misfits[0])}` is a list of messages that ends with one of the role `{last}`"
    return f"but `{short(misfits[0])}` is {json_type(cell)} that does not fit"


def _shown(columns: Sequence[str] | Mapping[str, Any]) -> str:
    names = list(columns)
    return listed(names[:8]) + (", ..." if len(names) > 8 else "")
