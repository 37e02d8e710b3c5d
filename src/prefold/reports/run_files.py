"""The files of a run folder as plain values.

Everything that comes out of `read_run` is safe to show: text holds no control characters and no broken Unicode, so it
can neither steer a terminal nor fail to encode. Markup is left as it is; whoever writes a page escapes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from prefold.errors import UserError

Values = dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """The files of a run folder. None, or an empty list, stands for a file that the run has not written yet. Only the
    first, the middle and the last groups of its rollouts are included."""

    folder: Path
    recipe_text: str
    recipe: Values
    environment: Values | None
    data: Values | None
    metrics: list[Values]
    timing: list[Values]
    heldout: Values | None
    rewards: Values | None
    tasks: Values | None
    compared: Values | None
    win_rate: Values | None
    samples: list[Values]
    merge: Values | None
    guards: Values | None
    rollouts: list[Values]

    @property
    def name(self) -> str:
        return readable(self.folder.resolve().name)

    @property
    def description(self) -> str:
        return " ".join(str(self.recipe.get("description") or "").split())

    @property
    def method(self) -> str:
        return str(self.recipe.get("method", ""))

    @property
    def model(self) -> str:
        return str(section(self.recipe, "model").get("name", ""))

    @property
    def scores(self) -> bool:
        """Whether the model scores answers: it gives none itself, and is compared with chance."""
        return "chance" in (self.heldout or {})

    @cached_property
    def held_out_lines(self) -> list[Values]:
        """Each held-out pair or prompt. Raises UserError: the file cannot be read."""
        return _read_lines(self.folder / "evaluation" / "heldout.jsonl")

    @property
    def held_out(self) -> str:
        """What was kept out of training."""
        return "prompts" if (self.rewards or self.recipe.get("rewards")) and not self.heldout else "pairs"

    @property
    def precision(self) -> str:
        """A remark on the evaluation if weights were in 16 bits; else empty."""
        if not (self.heldout or self.rewards or {}).get("weights_in_16_bits"):
            return ""
        return (
            "Both models were evaluated with their weights in 16 bits, each module widened to float32 for its call: "
            "float32 weights did not fit into memory."
        )


GROWING = ("data", "metrics", "timing", "samples", "rollouts")
"""Files that grow with a run's data, steps and samples, and that its verdict does not need."""


def read_run(folder: Path, growing: Collection[str] = GROWING) -> RunRecord:
    """Read what a run has written so far. Raises UserError: it holds no recipe, or one of its files cannot be read.

    Args:
        growing: which of `GROWING` to read; the others are treated as missing.
    """
    recipe_text = _read(folder / "recipe.yaml", readable)
    if recipe_text is None:
        what, advice = "not a run folder: it holds no recipe.yaml", "give the `output_dir` of a run"
        raise UserError(what, where=readable(str(folder)), advice=advice)
    recipe = _read(folder / "recipe.yaml", lambda text: cleaned(_from_yaml(text)))
    recipe = recipe if isinstance(recipe, dict) else {}
    evaluated, settings = folder / "evaluation", section(recipe, "evaluate")

    def lines(name: str, choose: Callable[[str], str] = str) -> list[Values]:
        return _read_lines(folder / f"{name}.jsonl", choose) if name in growing else []

    return RunRecord(
        folder=folder,
        recipe_text=recipe_text,
        recipe=recipe,
        environment=_read_object(folder / "environment.json"),
        data=_read_object(folder / "data.json") if "data" in growing else None,
        metrics=lines("metrics"),
        timing=lines("timing"),
        heldout=_read_object(evaluated / "heldout.json"),
        rewards=_read_object(evaluated / "rewards.json"),
        # Results that an earlier recipe asked for may still be in the folder.
        tasks=_read_object(evaluated / "tasks.json") if settings.get("tasks") else None,
        compared=_read_object(evaluated / "compared.json") if settings.get("compare_with") else None,
        win_rate=_read_object(evaluated / "win_rate.json") if settings.get("win_rate") else None,
        samples=lines("samples"),
        merge=_read_object(folder / "merge.json"),
        guards=_read_object(folder / "guards.json"),
        rollouts=lines("rollouts", _excerpt),
    )


_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _from_yaml(text: str) -> Any:
    """Parse by the loader in C, which is ten times as fast; where it fails (lone surrogates), by the one in Python."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return yaml.safe_load(text)


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        message = " ".join(readable(str(error)).split())
        advice = "remove the file and run the recipe again; the stage that writes it is redone"
        raise UserError(f"cannot be read ({message})", where=readable(str(path)), advice=advice) from None


def _read_object(path: Path) -> Any:
    return _read(path, lambda text: _cleaned_object(json.loads(text)))


def _cleaned_object(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return cleaned(value)


def _read_lines(path: Path, choose: Callable[[str], str] = str) -> list[Values]:
    return _read(path, lambda text: _parse_lines(choose(text))) or []


def _parse_lines(text: str) -> list[Values]:
    rows: list[Values] = []
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            rows += [_cleaned_object(json.loads(line))] if line.strip() else []
        except ValueError as error:
            # A run that is still going, or was killed, may have half a line at the end.
            if number == len(lines):
                break
            raise ValueError(f"line {number}: {error}") from None
    return rows


GROUPS_READ = 8


def _excerpt(text: str) -> str:
    """The first, the middle and the last lines of a long file."""
    lines = text.split("\n")
    starts = (0, (len(lines) - GROUPS_READ) // 2, len(lines) - GROUPS_READ - 1)
    chosen = sorted({index for start in starts for index in range(max(start, 0), start + GROUPS_READ + 1)})
    return "\n".join(lines[index] for index in chosen if index < len(lines))


def cleaned(value: Any) -> Any:
    """A copy of plain values in which every text, keys included, is `readable`."""
    return map_texts(value, readable)


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of plain values with every text, keys included, changed."""
    if isinstance(value, dict):
        return {change(str(key)): map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [map_texts(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


_CONTROL_PICTURES = {code: 0x2400 + code for code in range(0x20)} | {0x7F: 0x2421}
# C1 controls steer terminals as ESC does; direction overrides turn the text that follows around. They have no pictures.
_UNSHOWABLE = [*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)]
_READABLE = _CONTROL_PICTURES | dict.fromkeys(_UNSHOWABLE, 0xFFFD)
for _shown in "\t\n":
    del _READABLE[ord(_shown)]


def readable(text: str) -> str:
    """`text` with control characters, direction overrides and lone surrogates made visible; tabs and newlines stay."""
    return text.replace("\r\n", "\n").translate(_READABLE)


def section(values: Values | None, name: str) -> Values:
    """A mapping inside a mapping; empty where it is missing or something else."""
    inner = (values or {}).get(name)
    return inner if isinstance(inner, dict) else {}


def as_list(value: Any) -> list[Any]:
    """A list, also from a tuple, as values have that were not read from a file; empty for anything else."""
    return list(value) if isinstance(value, list | tuple) else []


def objects(value: Any) -> list[Values]:
    """The mappings in a list."""
    return [item for item in as_list(value) if isinstance(item, dict)]


def turns(conversation: Any) -> list[tuple[str, str]]:
    """Role and text of each message."""
    return [(str(message.get("role", "")), str(message.get("content", ""))) for message in objects(conversation)]
