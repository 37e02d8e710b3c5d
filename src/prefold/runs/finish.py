"""Compare with other models, have a judge decide, report, publish: what is done with what was measured."""

from __future__ import annotations

from prefold.evaluation.win_rate import measure_win_rate
from prefold.files import read_jsonl, write_json
from prefold.models.load import tokenizer_of
from prefold.publishing.publish import publish_run, require_section
from prefold.recipe import RecipeBase
from prefold.reports.card import write_card
from prefold.reports.page import write_report
from prefold.runs.comparison import compare_with, read_scores
from prefold.runs.context import judge_of


def compare(recipe: RecipeBase) -> None:
    """Ask the models of `evaluate.compare_with` what this run was asked."""
    folder, settings = recipe.run_folder / "evaluation", recipe.evaluate
    found = compare_with(settings.compare_with, read_scores(folder / "scores_before.json"), settings)
    write_json(folder / "compared.json", found)


def judge(recipe: RecipeBase) -> None:
    """Have the judge of `evaluate.win_rate` compare the answers before with those after."""
    samples = read_jsonl(recipe.run_folder / "samples.jsonl")
    found = measure_win_rate(judge_of(recipe, tokenizer_of(recipe.model)), samples)
    write_json(recipe.run_folder / "evaluation" / "win_rate.json", found)


def report(recipe: RecipeBase) -> None:
    write_report(recipe.run_folder)
    if (recipe.run_folder / "merged").is_dir():
        write_card(recipe.run_folder)


def publish(recipe: RecipeBase) -> None:
    publish_run(recipe.run_folder, require_section(recipe))
