"""What a run folder has measured besides tasks, and the comparison of two: held-out pairs, the rewards of held-out
prompts, and the win rate.

Two runs are compared on what they share: pairs and prompts are matched by their content, not by the path of a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from prefold.data.preference import messages_key
from prefold.errors import UserError, unique
from prefold.evaluation.paired import beyond_half, estimate, measured_facts
from prefold.files import read_json, read_jsonl, without_home
from prefold.recipe import RecipeBase
from prefold.runs.fingerprints import files_read

PAIRS, PROMPTS, WIN_RATE = "held-out pairs", "held-out prompts", "win rate"
DRAWN = ("max_completion_length", "temperature", "top_p", "top_k", "min_p")
"""The settings of a method that decide how completions of held-out prompts are sampled."""
UNITS = {PAIRS: "pair", PROMPTS: "prompt", WIN_RATE: "prompt"}


@dataclass(frozen=True)
class Measured:
    """`values` by a key of the pair or prompt, NaN where there is none. `settings`, by name, must be equal to compare
    two. `even`: every value is one half by definition, e.g. the win rate of the model before training. `has_keys`: the
    keys identify single pairs or prompts; else at most the whole set is known."""

    metric: str
    values: Mapping[str, float]
    settings: Mapping[str, Any]
    even: bool = False
    has_keys: bool = True


def measured_by(folder: Path, recipe: RecipeBase, when: str) -> dict[str, Measured]:
    """What a run has measured `before` or `after` training. Raises UserError: a file cannot be read."""
    try:
        return {**_held_out(folder, recipe, when), **_win_rate(folder, recipe, when)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        where = without_home(str(folder / "evaluation"))
        advice = "`prefold evaluate` with the run folder measures it again"
        raise UserError(f"cannot be read ({error})", where=where, advice=advice) from None


def compare_measured(
    first: Mapping[str, Measured], second: Mapping[str, Measured], names: tuple[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The facts of each measure that both have, in the form of a task's; and why the others cannot be compared."""
    both = {what: _compared(what, first[what], second[what]) for what in UNITS if what in first and what in second}
    compared = {what: facts for what, facts in both.items() if not isinstance(facts, str)}
    reasons = {what: reason for what, reason in both.items() if isinstance(reason, str)}
    alone = {what: names[0] if what in first else names[1] for what in UNITS if (what in first) != (what in second)}
    return compared, reasons | {what: f"only {name} has measured it" for what, name in alone.items()}


def _compared(what: str, first: Measured, second: Measured) -> dict[str, Any] | str:
    for name, value in first.settings.items():
        if value != (other := second.settings.get(name)):
            return f"{name}: {value} and {other}" if isinstance(value, str | int | float) else f"{name}: not the same"
    unit, keys = UNITS[what], [key for key in first.values if key in second.values]
    if not keys and not (first.has_keys and second.has_keys):
        return f"measured by an earlier version that did not write down which {unit}s; `prefold evaluate` does"
    if not keys:
        return f"no {unit} is the same in both{', with the same answer before training' if what == WIN_RATE else ''}"
    before, after = (np.array([side.values[key] for key in keys], dtype=float) for side in (first, second))
    known = np.isfinite(before) & np.isfinite(after)
    before, after = before[known], after[known]
    if not known.any():
        return f"no {unit} that is the same in both has a value in both"
    difference = beyond_half(after) if first.even else estimate(before, after)
    facts = measured_facts(first.metric, unit, before, after, difference)
    return facts | {"asked": [len(first.values), len(second.values)]}


def _held_out(folder: Path, recipe: RecipeBase, when: str) -> dict[str, Measured]:
    kind, lines = recipe.algorithm.kind, _lines(folder / "evaluation" / "heldout.jsonl")
    if not lines:
        return {}
    data = recipe.data
    settings: dict[str, Any] = {"`data.template`": data.template}
    if kind.samples:
        settings["the rewards"] = [
            # The contents of its file in place of the path.
            spec.model_dump() | {"file": sorted(files_read(folder, "train", f"rewards.{index}").values()) or spec.file}
            for index, spec in enumerate(recipe.rewards)
        ]
        drawn = recipe.algorithm.draws
        settings |= {f"`{name}`": getattr(drawn, name) for name in DRAWN}
    else:
        settings["measured by"] = "scores of answers" if kind.scores else "log-probs of answers"
        settings["what is held out"] = "pairs" if kind.data == "pairs" else "answers with a label, matched"
        cut = (data.max_length, data.max_prompt_length) if data.overlong == "truncate_prompt" else None
        settings["lengths that prompts are cut to"] = cut
    has_keys, even = "key" in lines[0], kind.scores and when == "before"
    held_out = read_json(folder / "data.json")["fingerprint"]["held_out"]
    values = [0.5 if even else np.nan if line[when] is None else float(line[when]) for line in lines]
    by_key = dict(zip(unique(line.get("key") or held_out for line in lines), values, strict=True))
    what, metric = (PROMPTS, "reward") if kind.samples else (PAIRS, "accuracy")
    return {what: Measured(metric, by_key, settings, even, has_keys)}


def _win_rate(folder: Path, recipe: RecipeBase, when: str) -> dict[str, Measured]:
    path = folder / "evaluation" / "win_rate.json"
    if recipe.evaluate.win_rate is None or not path.is_file():
        return {}
    facts, samples = read_json(path), _lines(folder / "samples.jsonl")
    judge = {name: value for name, value in facts["judge"].items() if name != "cost"}
    section = recipe.evaluate.win_rate.judge
    settings = {"the judge": judge | {"settings": section and section.model_dump()}}
    even, outcomes = when == "before", facts.get("outcomes")
    if outcomes is None:
        return {WIN_RATE: Measured("win rate", {}, settings, even, has_keys=False)}
    # The answers before training are part of the key: a preference over other answers is another measurement.
    shown = [
        [*sample["prompt"], *({"role": "assistant", "content": answer} for answer in sample["before"])]
        for sample in samples
    ]
    keys = unique(blake2b(messages_key(each).encode(), digest_size=16).hexdigest() for each in shown)
    known = [[outcome for outcome in of_prompt if outcome is not None] for of_prompt in outcomes]
    values = [(0.5 if even else float(np.mean(of_prompt))) if of_prompt else np.nan for of_prompt in known]
    return {WIN_RATE: Measured("win rate", dict(zip(keys, values, strict=True)), settings, even)} if keys else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    return read_jsonl(path) if path.is_file() else []
