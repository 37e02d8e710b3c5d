"""Check: what would be trained on, what is wrong with it, and what the run will take."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefold.data.examples import Example
from prefold.data.findings import by_severity
from prefold.data.mixture import Prepared
from prefold.data.selection import shuffled
from prefold.errors import StageError, UserError
from prefold.evaluation.held_out_pairs import score_pairs
from prefold.evaluation.separation import findings_of as separation_findings
from prefold.evaluation.separation import separation
from prefold.files import write_json
from prefold.models.adapters import load_start
from prefold.models.fetch import fetch
from prefold.models.load import choose_device, tokenizer_of
from prefold.plan.plan import Plan, make_plan
from prefold.publishing.publish import require_ready
from prefold.recipe import RecipeBase
from prefold.reports.check import print_check
from prefold.reports.notebook import framed
from prefold.reports.page import render_check
from prefold.reports.plan import in_two_lines
from prefold.runs.context import as_read, check_tasks, fingerprints, order_of, read_and_check, scorer_of
from prefold.runs.environment import environment
from prefold.terminal import as_text, say

EXAMPLES_SHOWN = 3

PAIRS_SCORED = 128
"""Enough to tell an accuracy to 9 points."""


@dataclass(frozen=True)
class CheckReport:
    """What `prefold check` found. `ok` is False if a finding is an error; `separation` is there on request."""

    prepared: Prepared
    tokenizer: PreTrainedTokenizerBase
    plan: Plan
    separation: dict[str, Any] | None = None

    @property
    def ok(self) -> bool:
        return all(finding.severity != "error" for finding in self.prepared.report.findings)

    def __repr__(self) -> str:
        """As the command shows it in a terminal."""
        return as_text(partial(print_check, self.as_json()))

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return framed(render_check("check", self.as_json()))

    def as_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            **self.prepared.report.as_json(),
            "fingerprint": fingerprints(self.prepared),
            "plan": self.plan.as_json(),
            **({"separation": self.separation} if self.separation else {}),
            "examples": [self._shown(example) for example in self.prepared.train[:EXAMPLES_SHOWN]],
        }

    def _shown(self, example: Example) -> dict[str, Any]:
        """An example as it is trained on: the text of its ids."""
        parts = (example.tree.prompt, *example.tree.completions)
        prompt, *completions = (str(self.tokenizer.decode(list(ids), skip_special_tokens=False)) for ids in parts)
        tokens = [len(part) for part in parts]
        return {"row": asdict(example.record.origin), "prompt": prompt, "completions": completions, "tokens": tokens}


def examine(
    recipe: RecipeBase, reference: bool = False, device_memory: int | None = None, measure: bool | None = False
) -> CheckReport:
    """Read and count the data, and plan the run; with `reference`, score pairs by the model as well.

    Args:
        device_memory: bytes of a GPU to plan for; unset: this machine.
        measure: time what a step does on this machine; None: if that takes less than the run.
    """
    prepared = read_and_check(recipe)
    order = order_of(recipe, len(prepared.train))
    train, held_out = list(prepared.train.lengths), list(prepared.held_out.lengths)
    plan = make_plan(recipe, train, held_out, order, device_memory, measure)
    report = prepared.report
    everything = by_severity([*report.findings, *plan.findings()])
    prepared = replace(prepared, report=replace(report, findings=everything))
    found = CheckReport(prepared, tokenizer_of(recipe.model), plan)
    return _with_separation(recipe, found) if reference else found


def _with_separation(recipe: RecipeBase, found: CheckReport) -> CheckReport:
    if recipe.algorithm.kind.data != "pairs":
        what = f"`--reference` compares chosen with rejected completions, and `{recipe.method}` takes no pairs"
        raise UserError(what, where=recipe.output_dir, advice="check without it")
    pairs = found.prepared.train.select(shuffled(len(found.prepared.train), recipe.train.seed)[:PAIRS_SCORED])
    model = load_start(recipe.model, dtype="float32" if choose_device().type == "cpu" else None)
    scores = score_pairs(scorer_of(recipe, model, pairs), pairs.trees, "pairs under the model")
    report = found.prepared.report
    everything = by_severity([*report.findings, *separation_findings(scores, pairs.origins)])
    prepared = replace(found.prepared, report=replace(report, findings=everything))
    return replace(found, prepared=prepared, separation=separation(scores))


def check(recipe: RecipeBase) -> None:
    check_tasks(recipe)
    require_ready(recipe)
    fetch(recipe.model.name, recipe.model.revision)
    found = examine(recipe, measure=None)
    if not found.ok:
        errors = [finding.message for finding in found.prepared.report.findings if finding.severity == "error"]
        raise StageError(f"this cannot be trained: {errors[0]}; `prefold check` shows it all")
    for finding in found.prepared.report.findings:
        if finding.severity == "warning":
            say(f"  warning: {finding.message}")
    for line in in_two_lines(found.plan.as_json()):
        say(f"  {line}")
    write_json(recipe.run_folder / "environment.json", environment())
    write_json(recipe.run_folder / "data.json", {**found.as_json(), **as_read(recipe, found.prepared)})
