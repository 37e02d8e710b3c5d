"""The result of an examination, cached until something that it depends on changes: the recipe, its data and tokenizer,
the files that it names, the machine, the installed packages and prefold itself.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

import prefold
from prefold.data.findings import Finding
from prefold.data.prepared_cache import key_of_data
from prefold.files import cache_folder, write_text
from prefold.launch import launched
from prefold.models.fetch import fetch
from prefold.plan.machine import Machine, free_disk
from prefold.plan.plan import Plan
from prefold.recipe import RecipeBase, as_dict
from prefold.runs.context import Run
from prefold.runs.environment import environment

KEPT = 200
"""Entries; the oldest beyond them are removed."""
ENOUGH = 3
"""With this many times a plan's peak at hand, nothing in the plan depends on the exact amount of memory: it is compared
only with parts of the peak, and with the weights plus a copy of them."""

Examined = tuple[list[Finding], Plan]
_EXAMINED = TypeAdapter(Examined)


def key_of(run: Run, machine: Machine, measure: bool) -> str | None:
    """A digest of all that an examination depends on, except the memory at hand; None if that cannot be known."""
    recipe = run.recipe
    data = key_of_data(recipe.data, run.tokenizer, recipe.train.seed, recipe.data_kind)
    if data is None:
        return None
    device = asdict(machine) | {"memory": None, "process": None}
    facts = [as_dict(recipe), data, _files_of(recipe), device, measure, launched(), environment(), _code()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def read(key: str | None, run: Run, machine: Machine) -> Examined | None:
    """The cached result, with the current memory and disk space; None if there is no entry, or if the result depends on
    the memory at hand and that has changed."""
    with suppress(OSError, ValueError):
        findings, plan = _EXAMINED.validate_json(_entry(key).read_bytes())
        now = machine.memory
        if now == plan.at_hand or (plan.device != "cuda" and min(now, plan.at_hand) >= ENOUGH * plan.peak):
            disk = replace(plan.disk, free=free_disk(run.folder))
            return findings, replace(plan, at_hand=now, disk=disk)
    return None


def write(key: str | None, examined: Examined) -> None:
    if key is None:
        return
    with suppress(OSError):  # the cache cannot be written to, or another process removes the same entries
        folder = _entry(key).parent
        folder.mkdir(parents=True, exist_ok=True)
        write_text(_entry(key), _EXAMINED.dump_json(examined).decode())
        for old in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            old.unlink()


def _entry(key: str | None) -> Path:
    return cache_folder() / "plans" / f"{key}.json"


def _files_of(recipe: RecipeBase) -> list[tuple[str, int, int]]:
    """Paths, sizes and modification times of the files that the recipe names, except those of the data."""
    model, rewards = recipe.model, [reward.file for reward in recipe.rewards]
    named = (model.adapter, model.chat_template, recipe.evaluate.include_path, *rewards)
    paths = [fetch(model.name, model.revision, weights=False), *(Path(name).expanduser() for name in named if name)]
    files = sorted(file for path in paths for file in (path, *path.rglob("*")) if file.is_file())
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


@cache
def _code() -> Any:
    folder = Path(prefold.__file__).parent
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))).hexdigest()
