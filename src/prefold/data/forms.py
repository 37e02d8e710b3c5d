"""What a cell holds: a test for each form, and which form the cell of a role has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefold.data.cells import read_if_text
from prefold.data.dialogues import holds_dialogue, speaks
from prefold.data.preference import role_of
from prefold.recipe.values import as_number

Form = Callable[[Any], bool]
POSTS = ("post", "article")
"""Keys of the text in the object of a `post`."""
_WORDS = {"chosen": 1.0, "rejected": 0.0}


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_bare_text(value: Any) -> bool:
    return isinstance(value, str) and not holds_dialogue(value)


def is_texts(value: Any) -> bool:
    """A list of strings; any but the first may be null."""
    return _is_filled(value) and is_text(value[0]) and all(item is None or is_text(item) for item in value)


def _is_filled(value: Any) -> bool:
    return isinstance(value, list) and value != []


# ---- dialogues --------------------------------------------------------------------------------------------------


def is_turns(value: Any) -> bool:
    """A list of messages, or a single one."""
    return _is_turn(value) or (_is_filled(value) and all(map(_is_turn, value)))


def _is_turn(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    speaks = isinstance(value.get("role"), str) and ("content" in value or "tool_calls" in value)
    return speaks or (isinstance(value.get("from"), str) and "value" in value)


def holds_turns(value: Any) -> bool:
    """Messages, or an object that holds some."""
    return is_turns(value) or (isinstance(value, dict) and any(map(is_turns, value.values())))


def speaker_of(turn: Any) -> Any:
    """None if the value is not a turn."""
    return turn.get("role", turn.get("from")) if isinstance(turn, dict) else None


def _speaker_at(value: Any, index: int) -> str:
    """Who speaks in a turn of a list, `assistant` or `other`; empty if it is not such a list."""
    name = speaker_of(value[index]) if _is_filled(value) else None
    return "assistant" if role_of(name) == "assistant" else "other" if name else ""


def is_opening(value: Any) -> bool:
    """A list of turns of which the last is not the assistant's."""
    return _speaker_at(value, -1) == "other"


def is_answered(value: Any) -> bool:
    """A list of turns of which the last is the assistant's."""
    return _speaker_at(value, 0) != "" and _speaker_at(value, -1) == "assistant"


def is_answer(value: Any) -> bool:
    return is_bare_text(value) or _speaker_at([value] if isinstance(value, dict) else value, 0) == "assistant"


def is_dialogue(value: Any) -> bool:
    """A dialogue that begins with its prompt."""
    return holds_dialogue(value) if isinstance(value, str) else _speaker_at(value, 0) == "other"


def is_history(cell: Any) -> bool:
    """Earlier turns, as (question, answer) pairs or as messages; they may be stored as text."""
    turns = read_if_text(cell)
    are_pairs = _is_filled(turns) and all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in turns)
    return are_pairs or (_is_filled(turns) and is_turns(turns))


# ---- what decides, and what goes with a prompt ------------------------------------------------------------------


def is_number(value: Any) -> bool:
    return as_number(value) is not None or isinstance(value, bool)


def is_scalar(value: Any) -> bool:
    """Whether a cell could be a vote or a label at all."""
    is_word = isinstance(value, str) and len(value) <= 40 and value.strip() != ""
    return is_word or (isinstance(value, bool | int | float) and value == value)


def is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_tools(cell: Any) -> bool:
    """An object or a list of them; the whole, or each object, may be stored as text."""
    tools = tools_in(cell)
    return tools != [] and all(isinstance(tool, dict) for tool in tools)


def tools_in(cell: Any) -> list[Any]:
    value = read_if_text(cell)
    return [read_if_text(tool) for tool in (value if isinstance(value, list) else [value])]


def is_kwargs(cell: Any) -> bool:
    """An object, which may be stored as text."""
    value = read_if_text(cell)
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


# ---- several answers --------------------------------------------------------------------------------------------


def is_objects(value: Any) -> bool:
    """A list of objects that are not turns of a dialogue."""
    return _is_filled(value) and all(isinstance(item, dict) and not speaks(item) for item in value)


def is_answers(value: Any) -> bool:
    """A list of texts, or of lists of turns."""
    return _is_list_of(value, lambda item: is_text(item) or (_is_filled(item) and all(map(speaks, item))))


def is_numbers(value: Any) -> bool:
    """A list of numbers, or of `chosen` and `rejected`."""
    return _is_list_of(value, lambda item: level_of(item) is not None)


def _is_list_of(value: Any, is_meant: Form) -> bool:
    """A list of which some items may be null, but not all."""
    return isinstance(value, list) and any(map(is_meant, value)) and all(x is None or is_meant(x) for x in value)


def level_of(value: Any) -> float | None:
    """A number; 1 and 0 for the words `chosen` and `rejected`."""
    return _WORDS[value] if isinstance(value, str) and value in _WORDS else as_number(value)


def is_tree(value: Any) -> bool:
    return isinstance(value, dict) and is_text(value.get("text")) and isinstance(value.get("replies"), list)


def is_part_of_ranking(value: Any) -> bool:
    return any(form(value) for form in (is_objects, is_answers, is_numbers, is_tree))


# ---- of roles ---------------------------------------------------------------------------------------------------

FORMS: dict[str, Form] = {
    # The forms that the cells of roles have, if a layout names no other one.
    **{"prompt": lambda value: is_text(value) or is_opening(value), "completion": is_answer},
    **{"chosen": is_answer, "rejected": is_answer, "output_1": is_answer, "output_2": is_answer},
    **{"vote": is_scalar, "label": is_scalar, "score_1": is_number, "score_2": is_number},
    **{"answers": is_answers, "best_first": is_answers, "rating": is_numbers, "rank": is_numbers},
    **{"choice": is_index, "tree": is_tree, "sentences": lambda value: _is_filled(value) and all(map(is_text, value))},
    "better_worse": lambda value: is_texts(value) and len(value) == 2,
    "post": lambda value: isinstance(value, dict) and any(is_text(value.get(key)) for key in POSTS),
    # Of roles beside those of the layout.
    **{"system": is_text, "tools": is_tools, "chat_template_kwargs": is_kwargs, "history": is_history},
    # Other forms, by their own names.
    **{"text": is_text, "bare": is_bare_text, "texts": is_texts, "opening": is_opening, "answered": is_answered},
    **{"dialogue": is_dialogue, "objects": is_objects},
    "answer_or_dialogue": lambda value: is_answer(value) or is_dialogue(value),
    "several": lambda value: is_answer(value) or is_answers(value),
    "either": lambda value: is_answers(value) or is_objects(value),
}
