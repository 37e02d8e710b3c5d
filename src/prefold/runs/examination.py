"""What `prefold check` computes: whether all that a recipe names can be used, what does not go together, the plan.

It imports all that a run does, which takes seconds; `remembered.py` has what an earlier one found.
"""

from __future__ import annotations

from typing import Any

from prefold.data.examples import Examples
from prefold.data.findings import Finding
from prefold.data.selection import shuffled
from prefold.errors import UserError
from prefold.evaluation.held_out_pairs import score_pairs
from prefold.evaluation.separation import findings_of as separation_findings
from prefold.evaluation.separation import separation
from prefold.generation.opening import open_model
from prefold.plan.plan import Plan
from prefold.publishing.publish import require_ready
from prefold.recipe import RecipeBase
from prefold.runs import limits
from prefold.runs.context import Run
from prefold.runs.opened import order_of, require_openable, require_usable, scorer_of, tasks_of
from prefold.terminal import busy

PAIRS_SCORED = 128
"""Enough to tell an accuracy to 9 points."""


def examined(run: Run, device_memory: int | None, measure: bool) -> tuple[list[Finding], Plan]:
    """Findings about model, data and recipe together, and the plan.

    Args: as of `check.examine`.
    """
    recipe = run.recipe
    with busy("looking at the model"):
        shapes = require_usable(recipe)
    with busy("looking at the tasks"):
        tasks_of(run)
    require_ready(recipe)
    require_openable(run)
    findings = limits.examined(run, shapes, order_of(recipe, len(run.prepared.train)))
    with busy("planning" if not measure else "planning, and timing this machine"):
        return findings, limits.plan_of(run, device_memory, measure)


def require_others(run: Run) -> None:
    """Raises UserError: what the recipe names beside model and data cannot be used."""
    require_ready(run.recipe)
    require_openable(run)


def separated(recipe: RecipeBase, train: Examples) -> tuple[dict[str, Any], list[Finding]]:
    """How far the model tells chosen from rejected already, and what of that is odd."""
    if recipe.data_kind != "pairs":
        what = "`--reference` compares chosen with rejected completions, and the data of this recipe have none"
        raise UserError(what, where=recipe.output_dir, advice="check without it")
    pairs = train.select(shuffled(len(train), recipe.train.seed)[:PAIRS_SCORED])
    model = open_model(recipe.model, "`check --reference`", measured=True)
    scores = score_pairs(scorer_of(recipe, model, pairs), pairs.trees, "pairs under the model")
    return separation(scores), separation_findings(scores, pairs.origins)
