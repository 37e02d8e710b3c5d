"""What an examination found, remembered in the cache while nothing has changed that it depends on: the recipe, its data
and tokenizer, the files that it names, the machine, the packages and this one.
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
"""Entries; beyond them, the oldest go."""
ENOUGH = 3
"""With so many times its peak at hand nothing in a plan depends on how much memory that is: all comparisons with it are
of parts of the peak, and of weights beside a copy of them."""

Examined = tuple[list[Finding], Plan]
_EXAMINED = TypeAdapter(Examined)


def key_of(run: Run, machine: Machine, measure: bool) -> str | None:
    """A digest of all that an examination depends on but the memory at hand; None where that cannot be known."""
    recipe = run.recipe
    data = key_of_data(recipe.data, run.tokenizer, recipe.train.seed, recipe.data_kind)
    if data is None:
        return None
    device = asdict(machine) | {"memory": None, "process": None}
    facts = [as_dict(recipe), data, _files_of(recipe), device, measure, launched(), environment(), _code()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def read(key: str | None, run: Run, machine: Machine) -> Examined | None:
    """What was found, with the memory and the disk of now; None where there is no entry, or where it depends on how
    much memory there is."""
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
    with suppress(OSError):  # a cache that cannot be written to; another process that removes the same
        folder = _entry(key).parent
        folder.mkdir(parents=True, exist_ok=True)
        write_text(_entry(key), _EXAMINED.dump_json(examined).decode())
        for old in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            old.unlink()


def _entry(key: str | None) -> Path:
    return cache_folder() / "plans" / f"{key}.json"


def _files_of(recipe: RecipeBase) -> list[tuple[str, int, int]]:
    """Sizes and times of the files that the recipe names, but for those of the data."""
    model, rewards = recipe.model, [reward.file for reward in recipe.rewards]
    named = (model.adapter, model.chat_template, recipe.evaluate.include_path, *rewards)
    paths = [fetch(model.name, model.revision, weights=False), *(Path(name).expanduser() for name in named if name)]
    files = sorted(file for path in paths for file in (path, *path.rglob("*")) if file.is_file())
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


@cache
def _code() -> Any:
    folder = Path(prefold.__file__).parent
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))).hexdigest()
