"""Keys that no entry of a table is for: settings of other methods, and families of keys that share a reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from prefold.importing.draft import Draft
from prefold.importing.tables import Entry, is_number, table_of
from prefold.importing.write import samples
from prefold.recipe.sections import Model

VISION = "(^|[-_./])(vl|vision|omni|audio|llava|pixtral|internvl[0-9.]*)([-_.]|[0-9]|$)"
"""What the names of models of images, video and sound have in them."""


def write_rest(draft: Draft, keys: Mapping[str, Any]) -> None:
    """Note what is left of the settings of other methods and of the families of a tool's table.

    Args:
        keys: the tool's file of tables. `elsewhere`: why -> keys of settings that not every method has; `families`:
            why -> the first letters of keys.
    """
    draft.follow({key: Entry("missing", why) for why, names in keys.get("elsewhere", {}).items() for key in names})
    known = {**table_of(keys), **(table_of(keys.get("online", {})) if samples(draft) else {})}
    for why, starts in keys.get("families", {}).items():
        left = [key for key in draft.given if draft.has(key) and key.startswith(tuple(starts)) and key not in known]
        draft.follow(dict.fromkeys(left, Entry("missing", why)))


def write_template_kwargs(draft: Draft, key: str, value: Any) -> None:
    """Keywords of the chat template, which a key has been taken for."""
    if not isinstance(value, Mapping):
        draft.note("missing", key, text="write a mapping into `model.chat_template_kwargs`")
    elif "chat_template_kwargs" in Model.model_fields:
        draft.carry("model.chat_template_kwargs", dict(value), key)
    else:
        draft.note("missing", key, text="rows may have a column `chat_template_kwargs`")


def share(value: Any, *of: Any) -> float | None:
    """A number as the share of a product; None if it is none below 1."""
    if not all(is_number(number) and number > 0 for number in (value, *of)):
        return None
    part = round(value / math.prod(of), 4)
    return part if 0 < part < 1 else None
