"""What `prefold check` computes: whether everything that a recipe names can be used and fits together, and the plan.

It imports everything that a run does, which takes seconds; `remembered.py` caches its results.
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
"""Enough to know an accuracy to within 9 percentage points."""


def findings_and_plan(run: Run, device_memory: int | None, measure: bool) -> tuple[list[Finding], Plan]:
    """Findings about model, data and recipe together, and the plan; arguments as in `check.examine`.

    Raises:
        UserError: something that the recipe names cannot be used, or does not fit the data.
    """
    recipe = run.recipe
    with busy("looking at the model"):
        shapes = require_usable(recipe)
    with busy("looking at the tasks"):
        tasks_of(run)
    require_ready(recipe)
    require_openable(run)
    findings = limits.findings_of(run, shapes, order_of(recipe, len(run.prepared.train)))
    with busy("planning" if not measure else "planning, and timing this machine"):
        return findings, limits.plan_of(run, device_memory, measure)


def require_others(run: Run) -> None:
    """Raises UserError: something that the recipe names besides model and data cannot be used."""
    require_ready(run.recipe)
    require_openable(run)


def separated(recipe: RecipeBase, train: Examples) -> tuple[dict[str, Any], list[Finding]]:
    """How well the model already tells chosen from rejected, and findings about it. Raises UserError: no pairs."""
    if recipe.data_kind != "pairs":
        what = "`--reference` compares chosen with rejected completions, and the data of this recipe have none"
        raise UserError(what, where=recipe.output_dir, advice="check without it")
    pairs = train.select(shuffled(len(train), recipe.train.seed)[:PAIRS_SCORED])
    model = open_model(recipe.model, "`check --reference`", measured=True)
    scores = score_pairs(scorer_of(recipe, model, pairs), pairs.trees, "pairs under the model")
    return separation(scores), separation_findings(scores, pairs.origins)
