"""What a run folder has measured besides tasks, and the comparison of two: held-out pairs, the rewards of held-out
prompts, and the win rate.

Two runs are compared on what they share: pairs and prompts are matched by their content, not by the path of a file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from prefold.data.preference import messages_key
from prefold.errors import UserError
from prefold.evaluation.paired import beyond_half, estimate
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
    shares, n = first.metric != "reward", len(before)
    difference = beyond_half(after) if first.even else estimate(before, after)
    return {
        "metric": first.metric,
        "shares": shares,
        "before": float(before.mean()),
        "after": float(after.mean()),
        **difference.facts(n, unit, shares),
        "n": n,
        "unit": unit,
        "asked": [len(first.values), len(second.values)],
    }


def _held_out(folder: Path, recipe: RecipeBase, when: str) -> dict[str, Measured]:
    kind, lines = recipe.algorithm.kind, _lines(folder / "evaluation" / "heldout.jsonl")
    if not lines:
        return {}
    data, fingerprints = recipe.data, read_json(folder / "data.json")["fingerprint"]
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
    keys = _unique(line.get("key") or fingerprints["held_out"] for line in lines)
    values = [0.5 if even else _number(line[when]) for line in lines]
    what = PROMPTS if kind.samples else PAIRS
    return {
        what: Measured(
            "reward" if kind.samples else "accuracy", dict(zip(keys, values, strict=True)), settings, even, has_keys
        )
    }


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
    keys = _unique(_digest([*sample["prompt"], *_as_messages(sample["before"])]) for sample in samples)
    known = [[outcome for outcome in of_prompt if outcome is not None] for of_prompt in outcomes]
    values = [(0.5 if even else float(np.mean(of_prompt))) if of_prompt else np.nan for of_prompt in known]
    return {WIN_RATE: Measured("win rate", dict(zip(keys, values, strict=True)), settings, even)} if keys else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    return read_jsonl(path) if path.is_file() else []


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)


def _as_messages(answers: Iterable[str]) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": answer} for answer in answers]


def _digest(messages: list[Any]) -> str:
    return blake2b(messages_key(messages).encode(), digest_size=16).hexdigest()


def _unique(keys: Iterable[str]) -> list[str]:
    """The keys, made unique by a number behind the second and further occurrences."""
    seen: Counter[str] = Counter()
    unique = []
    for key in keys:
        seen[key] += 1
        unique.append(key if seen[key] == 1 else f"{key}-{seen[key]}")
    return unique
