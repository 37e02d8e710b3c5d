"""`prefold sweep`: a run for each combination of some fields' values, and one comparison of them all.

Each run is an ordinary run in a folder of its own, resumed, compared, tried and published like any other. All are
measured on the same held-out data, by which the best one is chosen; how much that may flatter its score is reported
with it (`evaluation/best_of_many.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from prefold import ranks
from prefold.errors import StageError, UserError
from prefold.evaluation.best_of_many import best_of_many
from prefold.evaluation.paired import beyond_half, estimate
from prefold.files import (
    read_json,
    read_jsonl,
    require_writable,
    storage_trouble,
    without_home,
    without_secrets,
    write_json,
)
from prefold.recipe import RecipeBase, load_recipe, parse_yaml
from prefold.reports.sweep import write_sweep
from prefold.runs.api import perform_all
from prefold.runs.check import examine
from prefold.runs.context import Run
from prefold.runs.folder import outdated_stages
from prefold.runs.measuring import MEASURING, held_out_sampling
from prefold.runs.stages import stages_of
from prefold.terminal import say
from prefold.trees.memory import free_memory

FACTS = "sweep.json"


@dataclass(frozen=True)
class Point:
    """One of the runs. `name`: of its folder; `settings`: values of the swept fields, by dotted path."""

    name: str
    settings: dict[str, Any]
    recipe: RecipeBase

    def is_finished(self) -> bool:
        folder = self.recipe.run_folder
        if not (folder / "recipe.yaml").is_file() or outdated_stages(self.recipe, folder):
            return False
        return all(stage.is_done(folder) for stage in stages_of(self.recipe))


def sweep(recipe: str, overrides: Sequence[str] = (), *, output: str | None = None) -> dict[str, Any]:
    """Run each combination of values that is not done yet, and compare all of them.

    Args:
        recipe: a YAML file, a built-in recipe or a run folder.
        overrides: as in `prefold.run`; a field with several values, `train.learning_rate=1e-5,5e-5`, is swept.
        output: folder of the runs; unset: the recipe's `output_dir` with the suffix `-sweep`.

    Returns:
        The content of `sweep.json`. In `points`, `status` is `done`, `failed` (with `error`) or `waiting`.

    Raises:
        UserError: a recipe, the data or the folder cannot be used; nothing was written.
        StageError: the data of a run has errors; nothing was written.
    """
    swept, fixed = swept_fields(overrides)
    points, folder = _points(recipe, swept, fixed, output)
    _require_own_folder(folder, points)
    _require_comparable(points)
    about = {
        "recipe": without_home(recipe),
        "folder": without_home(str(folder)),
        "fields": swept,
        "overrides": [without_home(override) for override in fixed],
    }
    require_writable(folder)
    failures: dict[str, str] = {}
    measured_before: dict[str, Any] = {}
    comparison = _write(folder, about, points, failures)
    for number, point in enumerate(points, start=1):
        say(f"run {number} of {len(points)}: {point.name}")
        if point.is_finished():
            say("  done before")
            continue
        if failure := _failure_of(Run(point.recipe, measured_before)):
            failures[point.name] = failure
            say(f"  failed: {failure}")
        comparison = _write(folder, about, points, failures)
    return comparison


def swept_fields(overrides: Sequence[str]) -> tuple[dict[str, list[Any]], list[str]]:
    """Values by the dotted paths of the fields that have several, and the other overrides.

    Commas separate values, except within brackets or quotes. Raises UserError: no field has several values, a field or
    a value is given twice, or `output_dir` is set.
    """
    swept: dict[str, list[Any]] = {}
    fixed: list[str] = []
    for override in overrides:
        field, _, text = override.partition("=")
        values = parse_yaml(f"[{text}]", override) if "," in text else []
        if field == "output_dir":
            raise UserError("every run has a folder of its own", where=override, advice="name theirs: `--output DIR`")
        if field in swept or (len(values) > 1 and any(other.startswith(f"{field}=") for other in fixed)):
            raise UserError(f"`{field}` is given twice", where=override)
        if len(values) > 1:
            # As JSON, in which they are shown and set.
            swept[field] = json.loads(json.dumps(values, default=str))
        else:
            fixed.append(override)
        texts = [json.dumps(value) for value in swept.get(field, ())]
        if twice := next((text for text in texts if texts.count(text) > 1), None):
            raise UserError(f"the value {twice} is given twice", where=override)
    if not swept:
        expected = "values with commas between them, e.g. `train.learning_rate=1e-5,5e-5`"
        raise UserError("no field has several values", expected=expected)
    return swept, fixed


def _points(
    recipe: str, swept: Mapping[str, list[Any]], fixed: Sequence[str], output: str | None
) -> tuple[list[Point], Path]:
    """The runs in the order of the grid (the last field varies fastest), and their folder. Raises UserError: a
    combination is no valid recipe, or the recipe has rounds or is published."""
    grid = [dict(zip(swept, values, strict=True)) for values in product(*swept.values())]
    folder = output or f"{load_recipe(recipe, [*fixed, *_overrides(grid[0])]).output_dir}-sweep"
    # Short names: the last part of a path, where no other field has the same.
    lasts = [field.rpartition(".")[2] for field in swept]
    labels = {field: last if lasts.count(last) == 1 else field for field, last in zip(swept, lasts, strict=True)}
    points = []
    for settings in grid:
        name = ",".join(f"{labels[field]}={_in_a_name(value)}" for field, value in settings.items())
        own = _overrides({**settings, "output_dir": f"{folder}/{name}"})
        points.append(Point(name, settings, load_recipe(recipe, [*fixed, *own])))
    if points[0].recipe.rounds is not None:
        advice = "add `rounds=null`, or run each recipe by itself"
        raise UserError("a run of a sweep has no rounds", where="`rounds`", advice=advice)
    if points[0].recipe.publish is not None:
        what = "every run of the sweep would be published to the same place"
        advice = "add `publish=null`, and publish the best run at the end: `prefold publish RUN publish.to=...`"
        raise UserError(what, where="`publish`", advice=advice)
    return points, Path(folder).expanduser()


def _overrides(settings: Mapping[str, Any]) -> list[str]:
    # JSON is YAML too.
    return [f"{field}={json.dumps(value, ensure_ascii=False)}" for field, value in settings.items()]


def _in_a_name(value: Any) -> str:
    """A value as part of a folder's name: 47 characters at most, and different for different values."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        text = re.sub(r"e([+-])0+", r"e\1", text)
    safe = re.sub(r"[^\w.+-]+", "-", text)[:40].strip("-")
    return safe if safe == text else f"{safe}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _require_own_folder(folder: Path, points: Sequence[Point]) -> None:
    """Raises UserError: the folder holds something else, or a sweep with runs that are none of this one's. A sweep may
    only grow, since its statistics depend on how many runs the best was chosen from."""
    where, advice = without_home(str(folder)), "take another folder: `--output DIR`"
    if not (folder / FACTS).is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError("is neither empty nor the folder of a sweep", where=where, advice=advice)
        return
    try:
        earlier = [str(point["name"]) for point in read_json(folder / FACTS)["points"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"cannot be read ({error})", where=f"{where}/{FACTS}", advice=advice) from None
    if missing := [name for name in earlier if name not in {point.name for point in points}]:
        what = f"holds a sweep with a run that is none of this one's: {missing[0]}"
        raise UserError(what, where=where, expected="the same sweep, or one with more values", advice=advice)


def _require_comparable(points: Sequence[Point]) -> None:
    """Check every run that is not finished, data and plan; that also finds LoRA modules that the model does not have.

    Raises:
        UserError: a run cannot be performed, or the runs would not be measured on the same held-out data in the same
            way.
        StageError: the data of a run have errors.
    """
    measured_by = [_measured_by(point) for point in points]
    for other, measured in zip(points, measured_by, strict=True):
        if measured != measured_by[0]:
            what = f"`{points[0].name}` and `{other.name}` could not be compared: they hold out different data, or are "
            advice = "name the held-out data in `data.eval`; fields that decide what is held out, or how answers are "
            advice += "drawn and scored, cannot be swept"
            raise UserError(f"{what}measured in different ways", advice=advice)


def _measured_by(point: Point) -> tuple[Any, ...]:
    """What decides the held-out score of a run besides its model."""
    recipe = point.recipe
    measured = (recipe.algorithm.kind, repr(recipe.rewards), held_out_sampling(recipe))
    if point.is_finished():
        return (read_json(recipe.run_folder / "data.json")["fingerprint"]["held_out"], *measured)
    run = Run(recipe)
    examine(run).require_ok(point.name, "`prefold check` with its settings shows it all")
    if not run.prepared.held_out:
        what = "nothing is held out to choose by"
        raise UserError(what, where="`data`", advice="set `eval_fraction`, or name `eval`")
    return (run.prepared.fingerprints["held_out"], *measured)


def _failure_of(run: Run) -> str:
    """Perform a run; returns why it failed, empty if it did not. A full disk would stop every run, so it is raised."""
    try:
        ranks.join()
        perform_all(run)
        return ""
    except Exception as error:
        if storage_trouble(error) or os.environ.get("PREFOLD_DEBUG"):
            raise
        named = "" if isinstance(error, UserError | StageError) else f"{type(error).__name__}: "
        message = without_secrets(f"{named}{error}")
    # Outside the handler, whose traceback would keep the model alive.
    free_memory()
    return message


def _write(
    folder: Path, about: Mapping[str, Any], points: Sequence[Point], failures: Mapping[str, str]
) -> dict[str, Any]:
    """Compare the runs that are done so far; writes `sweep.json` and the page."""
    entries, measured = [], {}
    for point in points:
        status: dict[str, Any] = {"status": "waiting"}
        if point.name in failures:
            status = {"status": "failed", "error": failures[point.name]}
        elif point.is_finished():
            status = {"status": "done"}
            if facts := _held_out(point):
                measured[point.name] = facts
        entries.append({"name": point.name, "settings": point.settings, **status, "held_out": measured.get(point.name)})
    compared = _compared(measured) if measured else {"best": None}
    comparison = {**about, **compared, "confirm": _confirm(folder, compared["best"]), "points": entries}
    write_json(folder / FACTS, comparison)
    write_sweep(folder, comparison)
    return comparison


def _held_out(point: Point) -> dict[str, Any] | None:
    """What a finished run measured; None if it could measure nothing."""
    folder, kind = point.recipe.run_folder / "evaluation", point.recipe.algorithm.kind
    metric = MEASURING[kind].metric
    comparison = read_json(folder / f"{kind.measured}.json")
    if "after" not in comparison or not (folder / "heldout.jsonl").is_file():
        return None
    before, after = (comparison.get(name, {}) for name in ("before", "after"))
    lines = read_jsonl(folder / "heldout.jsonl")
    return {
        "before": before.get(metric),
        "after": after[metric],
        "after_ci": after[f"{metric}_ci"],
        "margin": after.get("margin"),
        "shares": metric == "accuracy",
        # A prompt may lack a reward.
        "by_unit": {when: np.array([line.get(when) for line in lines], dtype=float) for when in ("before", "after")},
    }


def _compared(measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The facts about all runs together. Changes `measured`: each run's own facts are added, its `by_unit` is removed.
    Every run is compared with the model before training, a reward model with chance."""
    units = {name: facts.pop("by_unit") for name, facts in measured.items()}
    values = {name: of_run["after"] for name, of_run in units.items()}
    known = ~np.isnan(np.stack(list(values.values()))).any(axis=0)
    if not known.any():
        return {"best": None}
    shares = next(iter(measured.values()))["shares"]
    unit = "pair" if shares else "prompt"
    ranked = best_of_many({name: of_run[known] for name, of_run in values.items()}, unit)
    for name, facts in measured.items():
        before, after = units[name]["before"], units[name]["after"]
        if facts["before"] is not None:
            both = np.isfinite(before) & np.isfinite(after)
            difference, number = estimate(before[both], after[both]), int(both.sum())
        else:
            difference, number = beyond_half(after), len(after)
        facts |= {**difference.among(len(measured)).facts(number, unit, shares), **ranked["runs"][name]}
    return {
        "chosen_by": f"held-out {'accuracy' if shares else 'reward'}",
        "held_out": {"unit": unit, "number": int(known.sum())},
        **{name: ranked[name] for name in ("best", "tied", "as_good", "luck")},
    }


def _confirm(folder: Path, best: str | None) -> str | None:
    """The command that measures the best run on data that did not choose it."""
    if best is None:
        return None
    chosen, other = (shlex.quote(without_home(str(path))) for path in (folder / best, f"{folder}-confirmed"))
    fresh = "data.eval='[{path: fresh.jsonl}]' data.eval_fraction=0"
    return " \\\n  ".join((f"prefold run {chosen}", fresh, f"output_dir={other}"))
