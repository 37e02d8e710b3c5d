"""Evaluate: the model before and after, on held-out data, tasks and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from prefold import ranks
from prefold.data.preference import Message
from prefold.errors import counted
from prefold.evaluation.contamination import questions_in
from prefold.evaluation.scores import OpenTask
from prefold.evaluation.task_comparison import compare_tasks
from prefold.evaluation.tasks import measure_model, recorded_settings
from prefold.files import write_json, write_jsonl
from prefold.generation.sampling import Completion
from prefold.runs.context import Run
from prefold.runs.fingerprints import inputs_of
from prefold.runs.limits import evaluated_in_16_bits
from prefold.runs.measuring import MEASURING, Measuring, held_out_sampling
from prefold.runs.opened import tasks_of
from prefold.terminal import say


def evaluate(run: Run) -> None:
    tasks = tasks_of(run)
    in_16_bits = ranks.from_first(lambda: evaluated_in_16_bits(run))
    _evaluate_held_out(run, in_16_bits)
    if tasks:
        _evaluate_tasks(run, tasks, in_16_bits)


def _evaluate_held_out(run: Run, in_16_bits: bool) -> None:
    recipe, folder = run.recipe, run.folder
    with ranks.first_ahead():
        held_out = run.checked_data().held_out
    measuring = MEASURING[recipe.algorithm.kind](run, held_out, in_16_bits)
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
    precision = {"weights_in_16_bits": True} if in_16_bits else {}
    write_json(folder / "evaluation" / f"{recipe.algorithm.kind.measured}.json", {**comparison, **precision})


def _sample(prompt: Sequence[Message], **answers: Sequence[Completion]) -> dict[str, Any]:
    """A line of `samples.jsonl`: a prompt, the answers of each model, and why each answer ended."""
    texts = {when: [completion.text for completion in group] for when, group in answers.items()}
    reasons = {when: [completion.finish_reason for completion in group] for when, group in answers.items()}
    return {"prompt": list(prompt), **texts, "finish_reasons": reasons}


def _measured_before(run: Run, measuring: Measuring) -> Any:
    """The result of the model before training, which runs with the same measurement share."""
    recipe, train = run.recipe, run.recipe.train
    settings = (recipe.model, recipe.data, recipe.algorithm.kind.data, recipe.rewards, recipe.evaluate)
    rounding = (train.seed, train.max_tokens, train.gradient_checkpointing)
    inputs = (run.prepared.fingerprints["held_out"], inputs_of(recipe))
    key = repr((settings, held_out_sampling(recipe), rounding, inputs, measuring.in_16_bits))
    if key in run.measured_before:
        say("  the model before training was measured for an earlier run")
    else:
        run.measured_before[key] = measuring.measure(recipe.model, "before")
    return run.measured_before[key]


def _evaluate_tasks(run: Run, tasks: Sequence[OpenTask], in_16_bits: bool) -> None:
    folder, settings = run.folder / "evaluation", run.recipe.evaluate
    say(f"  {counted(len(tasks), 'task')}, chat template {'applied' if settings.apply_chat_template else 'off'}")
    trained_on = questions_in(run.prepared.train.records, tasks, settings.limit)
    merged = run.recipe.model.whole(run.folder / "merged")
    before = measure_model(run.recipe.model, tasks, settings, "before", in_16_bits=in_16_bits)
    after = measure_model(merged, tasks, settings, "after", trained_on, in_16_bits)
    if ranks.is_first():
        write_json(folder / "scores_before.json", list(map(asdict, before)))
        write_json(folder / "scores_after.json", list(map(asdict, after)))
        write_json(folder / "tasks.json", {**compare_tasks(before, after), "settings": recorded_settings(settings)})
