"""Check: what would be trained on, what is wrong with it, and what the run will take."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from prefold.data.examples import Example, Examples
from prefold.data.findings import Finding, by_severity
from prefold.data.mixture import Prepared
from prefold.data.row import tokens_of
from prefold.data.selection import shuffled
from prefold.data.survey import parts_of
from prefold.errors import StageError, UserError
from prefold.evaluation.held_out_pairs import score_pairs
from prefold.evaluation.separation import findings_of as separation_findings
from prefold.evaluation.separation import separation
from prefold.files import write_json
from prefold.models.adapters import load_start
from prefold.models.fetch import fetch
from prefold.plan.plan import Plan
from prefold.plan.planner import make_plan
from prefold.publishing.publish import require_ready
from prefold.recipe import RecipeBase
from prefold.recipe.sections import Lora
from prefold.reports.check import print_check
from prefold.reports.notebook import framed
from prefold.reports.page import render_check
from prefold.reports.plan import in_two_lines
from prefold.runs import limits
from prefold.runs.context import Run, order_of, scorer_of
from prefold.runs.environment import environment
from prefold.runs.measuring import measuring_dtype
from prefold.terminal import as_text, say

EXAMPLES_SHOWN = 3
TOKENS_SHOWN = 1000
"""Of each part of a row that is shown."""
LENGTH_BINS = 10

PAIRS_SCORED = 128
"""Enough to tell an accuracy to 9 points."""


@dataclass(frozen=True)
class CheckReport:
    """What `prefold check` found. `ok` is False if a finding is an error; `separation` is there on request."""

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
        """An example as it is trained on, token by token; of long parts the middle is left out."""
        parts = tokens_of(example.record, example.tree, self.tokenizer)
        half = TOKENS_SHOWN // 2
        return {
            "row": asdict(example.record.origin),
            "counts": {name: len(tokens) for name, tokens in parts.items()},
            "tokens": {
                name: tokens
                if len(tokens) <= TOKENS_SHOWN
                else [*tokens[:half], _left_out(len(tokens) - 2 * half), *tokens[-half:]]
                for name, tokens in parts.items()
            },
        }


def _left_out(number: int) -> dict[str, Any]:
    return {"id": None, "text": f" [... {number:,} tokens ...] ", "part": "left_out"}


def _lengths(examples: Examples) -> dict[str, Any]:
    """Histograms of tokens by part; those of the completions have the same bins."""
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


def examine(
    run: Run, reference: bool = False, device_memory: int | None = None, measure: bool | None = False
) -> CheckReport:
    """Read and count the data, and plan the run; with `reference`, score pairs by the model as well.

    Args:
        device_memory: bytes of a GPU to plan for; unset: this machine.
        measure: time what a step does on this machine; None: if that takes less than the run.
    """
    shapes = run.require_usable()
    run.open_tasks()
    require_ready(run.recipe)
    recipe, prepared = run.recipe, run.prepared
    run.require_openable()
    order = order_of(recipe, len(prepared.train))
    about_recipe = limits.examined(run, shapes, order)
    train, held_out = prepared.train.lengths, prepared.held_out.lengths
    plan = make_plan(recipe, train, held_out, order, device_memory, measure)
    findings, separated = [*prepared.report.findings, *about_recipe, *plan.findings()], None
    if reference:
        separated, more = _separation(recipe, prepared.train)
        findings += more
    report = replace(prepared.report, findings=by_severity(findings))
    return CheckReport(recipe, replace(prepared, report=report), run.tokenizer, plan, separated)


def _what_is_trained(recipe: RecipeBase) -> str:
    model = recipe.model
    bits = next((f", over weights in {bits} bits" for bits in (4, 8) if getattr(model, f"load_in_{bits}bit")), "")
    if model.adapter:
        return f"The adapter {model.adapter} goes on{bits}"
    return f"LoRA of rank {recipe.lora.r}{bits}" if isinstance(recipe.lora, Lora) else "All weights"


def _separation(recipe: RecipeBase, train: Examples) -> tuple[dict[str, Any], list[Finding]]:
    """How far the model tells chosen from rejected already, and what of that is odd."""
    if recipe.algorithm.kind.data != "pairs":
        what = f"`--reference` compares chosen with rejected completions, and `{recipe.method}` takes no pairs"
        raise UserError(what, where=recipe.output_dir, advice="check without it")
    pairs = train.select(shuffled(len(train), recipe.train.seed)[:PAIRS_SCORED])
    model = load_start(recipe.model, dtype=measuring_dtype())
    scores = score_pairs(scorer_of(recipe, model, pairs), pairs.trees, "pairs under the model")
    return separation(scores), separation_findings(scores, pairs.origins)


def check(run: Run) -> None:
    run.require_usable()  # as far as it can be known before weights are downloaded
    fetch(run.recipe.model.name, run.recipe.model.revision)
    report = examine(run, measure=None)
    report.require_ok("this", "`prefold check` shows it all")
    for finding in report.prepared.report.findings:
        if finding.severity == "warning":
            say(f"  warning: {finding.message}")
    for line in in_two_lines(report.plan.as_json()):
        say(f"  {line}")
    write_json(run.folder / "environment.json", environment())
    write_json(run.folder / "data.json", {**report.as_json(), **run.as_read(report.prepared)})
