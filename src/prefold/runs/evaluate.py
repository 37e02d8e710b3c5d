"""Evaluate: the model before and after, on held-out data, tasks and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from prefold import ranks
from prefold.data.preference import Message
from prefold.evaluation.contamination import questions_in
from prefold.evaluation.scores import OpenTask
from prefold.evaluation.task_comparison import compare_tasks
from prefold.evaluation.tasks import measure_model, recorded_settings
from prefold.files import write_json, write_jsonl
from prefold.generation.sampling import Completion
from prefold.runs.context import Run
from prefold.runs.fingerprints import inputs_of
from prefold.runs.measuring import MEASURING, Measuring, held_out_sampling
from prefold.terminal import say


def evaluate(run: Run) -> None:
    tasks = run.open_tasks()
    _evaluate_held_out(run)
    if tasks:
        _evaluate_tasks(run, tasks)


def _evaluate_held_out(run: Run) -> None:
    recipe, folder = run.recipe, run.folder
    with ranks.first_ahead():
        held_out = run.checked_data().held_out
    measuring = MEASURING[recipe.algorithm.kind](run, held_out)
    before, answers_before = _measured_before(run, measuring) if measuring.has_before else (None, [])
    after, answers_after = measuring.measure(recipe.model.whole(folder / "merged"), "after")
    if not ranks.is_first():
        return
    if not recipe.algorithm.kind.scores:
        answers = zip(measuring.prompts, answers_before, answers_after, strict=True)
        write_jsonl(folder / "samples.jsonl", [_sample(prompt, before=old, after=new) for prompt, old, new in answers])
    comparison, lines = measuring.compare(before, after)
    if lines is not None:
        write_jsonl(folder / "evaluation" / "heldout.jsonl", lines)
    write_json(folder / "evaluation" / f"{recipe.algorithm.kind.measured}.json", comparison)


def _sample(prompt: Sequence[Message], **answers: Sequence[Completion]) -> dict[str, Any]:
    """A line of `samples.jsonl`: a prompt with the answers of each model, and how each of them ended."""
    texts = {when: [completion.text for completion in group] for when, group in answers.items()}
    reasons = {when: [completion.finish_reason for completion in group] for when, group in answers.items()}
    return {"prompt": list(prompt), **texts, "finish_reasons": reasons}


def _measured_before(run: Run, measuring: Measuring) -> Any:
    """Runs that are measured alike measure the model before training once."""
    recipe, train = run.recipe, run.recipe.train
    settings = (recipe.model, recipe.data, recipe.algorithm.kind.data, recipe.rewards, recipe.evaluate)
    rounding = (train.seed, train.max_tokens, train.gradient_checkpointing)
    read = (run.prepared.fingerprints["held_out"], inputs_of(recipe))
    key = repr((settings, held_out_sampling(recipe), rounding, read))
    if key in run.measured_before:
        say("  the model before training was measured for an earlier run")
    else:
        run.measured_before[key] = measuring.measure(recipe.model, "before")
    return run.measured_before[key]


def _evaluate_tasks(run: Run, tasks: Sequence[OpenTask]) -> None:
    folder, settings = run.folder / "evaluation", run.recipe.evaluate
    number = "1 task" if len(tasks) == 1 else f"{len(tasks)} tasks"
    say(f"  {number}, chat template {'applied' if settings.apply_chat_template else 'off'}")
    trained_on = questions_in(run.prepared.train.records, tasks, settings.limit)
    before = measure_model(run.recipe.model, tasks, settings, "before")
    after = measure_model(run.recipe.model.whole(run.folder / "merged"), tasks, settings, "after", trained_on)
    if ranks.is_first():
        write_json(folder / "scores_before.json", list(map(asdict, before)))
        write_json(folder / "scores_after.json", list(map(asdict, after)))
        write_json(folder / "tasks.json", {**compare_tasks(before, after), "settings": recorded_settings(settings)})
