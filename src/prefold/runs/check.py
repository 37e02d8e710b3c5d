"""Check: what would be trained on, what is wrong with it, and what the run will take.

`examination.py`, which is slow to import, is imported only if its result is not remembered: a second check is quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prefold.data.examples import Example, Examples
from prefold.data.findings import by_severity
from prefold.data.mixture import Prepared
from prefold.data.row import SeenRow, see_row, tokens_of
from prefold.data.survey import parts_of
from prefold.errors import StageError, UserError
from prefold.models.tokenizer import tokenizer_of
from prefold.plan.machine import Machine, bytes_of
from prefold.plan.plan import Plan
from prefold.recipe import RecipeBase, as_recipe
from prefold.recipe.sections import Lora
from prefold.reports.check import print_check
from prefold.reports.notebook import framed
from prefold.reports.page import render_check
from prefold.runs import remembered
from prefold.runs.context import Run
from prefold.terminal import as_text, loading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXAMPLES_SHOWN = 3
TOKENS_SHOWN = 1000
"""Of each part of an example; if it is longer, its middle is left out."""
LENGTH_BINS = 10


@dataclass(frozen=True)
class CheckReport:
    """What `prefold check` found. `ok` is False if a finding is an error; `separation` is set on request."""

    recipe: RecipeBase
    prepared: Prepared
    tokenizer: PreTrainedTokenizerBase
    plan: Plan
    separation: dict[str, Any] | None = None

    @property
    def ok(self) -> bool:
        return not self._errors()

    def _errors(self) -> list[str]:
        return [finding.message for finding in self.prepared.report.findings if finding.severity == "error"]

    def require_ok(self, what: str, advice: str) -> None:
        if errors := self._errors():
            raise StageError(f"{what} cannot be trained: {errors[0]}; {advice}")

    def __repr__(self) -> str:
        return as_text(partial(print_check, self.as_json()))

    def _repr_html_(self) -> str:
        return framed(render_check("check", self.as_json()))

    def as_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "method": self.recipe.method,
            "model": self.recipe.model.name,
            "trains": _what_is_trained(self.recipe),
            **self.prepared.report.as_json(),
            "fingerprint": self.prepared.fingerprints,
            "plan": self.plan.as_json(),
            **({"separation": self.separation} if self.separation else {}),
            "lengths": _lengths(self.prepared.train),
            "examples": [self._shown(example) for example in self.prepared.train[:EXAMPLES_SHOWN]],
        }

    def _shown(self, example: Example) -> dict[str, Any]:
        """An example as it is trained on, token by token."""
        parts = tokens_of(example.record, example.tree, self.tokenizer)
        counts, half = {name: len(tokens) for name, tokens in parts.items()}, TOKENS_SHOWN // 2
        for name, number in counts.items():
            if number > TOKENS_SHOWN:
                gap = {"id": None, "text": f" [... {number - 2 * half:,} tokens ...] ", "part": "left_out"}
                parts[name] = [*parts[name][:half], gap, *parts[name][-half:]]
        return {"row": asdict(example.record.origin), "counts": counts, "tokens": parts}


def _lengths(examples: Examples) -> dict[str, Any]:
    """Histograms of token counts by part; the completions share their bins."""
    if not len(examples):
        return {}
    columns = dict(zip(parts_of(examples.records[0]), zip(*examples.lengths, strict=True), strict=True))
    completions = [length for name, column in columns.items() if name != "prompt" for length in column]
    lengths = {}
    for name, column in columns.items():
        binned = column if name == "prompt" else completions
        edges = np.unique(np.linspace(min(binned), max(binned) + 1, LENGTH_BINS + 1).astype(int))
        counts = np.histogram(column, edges)[0]
        lengths[name] = {"median": float(np.median(column)), "edges": edges.tolist(), "counts": counts.tolist()}
    return lengths


def check(
    recipe: str | Path | RecipeBase,
    overrides: Sequence[str] = (),
    *,
    reference: bool = False,
    device_memory: str | None = None,
    measure: bool = False,
) -> CheckReport:
    """Report what would be trained on, what is wrong with it and what the run would take; writes only to the cache.

    Args:
        reference: load the model and measure how well it already tells chosen from rejected.
        device_memory: memory of a GPU to plan for, e.g. `24GB`; unset: this machine.
        measure: time the engine on this machine for some seconds, to estimate how long the run will take.
    """
    if device_memory and measure:
        what = "times are measured on this machine, and the plan is for another"
        raise UserError(what, where="`--measure`", advice="leave it or `--device-memory` out")
    run = Run(as_recipe(recipe, overrides))
    return examine(run, reference, bytes_of(device_memory) if device_memory else None, measure)


def check_row(recipe: str | Path | RecipeBase, row: str | int, overrides: Sequence[str] = ()) -> SeenRow:
    """One row of the data as it is read, as messages, as text and as tokens, or why it is left out.

    Args:
        row: its 1-based number, as in findings; with several sources after the source's name, `pairs.jsonl:12`.

    Raises:
        UserError: there is no such row, or its source cannot be read or recognised.
    """
    recipe = as_recipe(recipe, overrides)
    return see_row(str(row), recipe.data, tokenizer_of(recipe.model), recipe.train.seed, recipe.data_kind)


def examine(run: Run, reference: bool = False, device_memory: int | None = None, measure: bool = False) -> CheckReport:
    """Read and count the data, and plan the run; with `reference`, score pairs by the model as well.

    Args:
        device_memory: bytes of a GPU to plan for; unset: this machine.
        measure: time what a step does on this machine.
    """
    machine, settings = Machine.planned(device_memory), run.recipe.evaluate
    key = remembered.key_of(run, machine, measure)
    known = remembered.read(key, run, machine)
    others = run.recipe.rewards or run.recipe.publish or settings.win_rate or settings.compare_with
    if known is None or others or reference:
        with loading():
            from prefold.runs import examination
    if known is None:
        known = examination.findings_and_plan(run, device_memory, measure)
        remembered.write(key, known)
    elif others:
        examination.require_others(run)
    (findings, plan), separated = known, None
    findings = [*run.prepared.report.findings, *findings, *plan.findings()]
    if reference:
        separated, more = examination.separated(run.recipe, run.prepared.train)
        findings += more
    report = replace(run.prepared.report, findings=by_severity(findings))
    return CheckReport(run.recipe, replace(run.prepared, report=report), run.tokenizer, plan, separated)


def _what_is_trained(recipe: RecipeBase) -> str:
    model = recipe.model
    bits = next((f", over weights in {bits} bits" for bits in (4, 8) if getattr(model, f"load_in_{bits}bit")), "")
    if model.adapter:
        return f"The adapter {model.adapter} goes on{bits}"
    return f"LoRA of rank {recipe.lora.r}{bits}" if isinstance(recipe.lora, Lora) else "All weights"
