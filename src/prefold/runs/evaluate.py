"""Evaluate: the model before and after, on held-out data, tasks and prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from prefold import ranks
from prefold.data.examples import Examples
from prefold.data.findings import fingerprint
from prefold.data.preference import Message
from prefold.evaluation.contamination import questions_in
from prefold.evaluation.held_out_pairs import (
    CHANCE,
    PairScores,
    against_chance,
    by_pair,
    compare_pairs,
    match,
    score_matched,
    score_pairs,
)
from prefold.evaluation.held_out_rewards import by_prompt, compare_rewards
from prefold.evaluation.scores import OpenTask
from prefold.evaluation.task_comparison import compare_tasks
from prefold.evaluation.tasks import measure_model, recorded_settings
from prefold.files import write_json, write_jsonl
from prefold.generation.engine import answer
from prefold.generation.groups import Group, prompts_of, sample, scored_groups
from prefold.generation.samplers import seed_of
from prefold.generation.sampling import Sampling
from prefold.models.adapters import load_start
from prefold.models.load import choose_device, load_model, tokenizer_of
from prefold.pairs.candidates import column_names
from prefold.recipe import Model, RecipeBase
from prefold.runs.context import (
    check_tasks,
    does_sample,
    head_seed_of,
    labels_of,
    loaded_rewards,
    prepared_data,
    scorer_of,
)
from prefold.runs.fingerprints import inputs_of
from prefold.terminal import progress_bar, say
from prefold.training.online import sampling_of
from prefold.trees.memory import free_memory


def evaluate(recipe: RecipeBase) -> None:
    tasks = check_tasks(recipe)
    _evaluate_held_out(recipe)
    if tasks:
        _evaluate_tasks(recipe, tasks)


def _evaluate_tasks(recipe: RecipeBase, tasks: Sequence[OpenTask]) -> None:
    folder, settings = recipe.run_folder / "evaluation", recipe.evaluate
    merged = recipe.model.whole(recipe.run_folder / "merged")
    scores = {}
    number = "1 task" if len(tasks) == 1 else f"{len(tasks)} tasks"
    say(f"  {number}, chat template {'applied' if settings.apply_chat_template else 'off'}")
    seen = questions_in(prepared_data(recipe).train.records, tasks, settings.limit)
    for when, section in (("before", recipe.model), ("after", merged)):
        scores[when] = measure_model(section, tasks, settings, when, seen if when == "after" else None)
        _write_json(folder / f"scores_{when}.json", [one.as_json() for one in scores[when]])
    compared = compare_tasks(scores["before"], scores["after"])
    _write_json(folder / "tasks.json", {**compared, "settings": recorded_settings(settings)})


def _write_json(path: Path, content: Any) -> None:
    """Of several processes the first one writes."""
    if ranks.is_first():
        write_json(path, content)


def _evaluate_held_out(recipe: RecipeBase) -> None:
    folder = recipe.run_folder
    with ranks.first_ahead():
        held_out = prepared_data(recipe).held_out
    if recipe.algorithm.kind.scores:
        _write_json(folder / "evaluation" / "heldout.json", _judge_head(recipe, held_out))
        return
    prompts = evaluation_prompts(recipe, held_out)
    measure: Callable[..., tuple[Any, list[list[str]]]] = _measure_rewards if does_sample(recipe) else _measure
    before, answers_before = _measured_before(measure, recipe, held_out, prompts)
    merged = recipe.model.whole(folder / "merged")
    after, answers_after = measure(recipe, merged, held_out, prompts, "after")
    if not ranks.is_first():
        return
    write_jsonl(
        folder / "samples.jsonl",
        [
            {"prompt": list(prompt), "before": first, "after": second}
            for prompt, first, second in zip(prompts, answers_before, answers_after, strict=True)
        ],
    )
    if does_sample(recipe):
        write_jsonl(folder / "evaluation" / "heldout.jsonl", by_prompt(before, after))
        write_json(folder / "evaluation" / "rewards.json", compare_rewards(before, after))
        return
    comparison: dict[str, Any] = {"pairs": 0}
    if before is not None and after is not None:
        comparison = compare_pairs(before, after, recipe.algorithm.reward_scale)
        write_jsonl(folder / "evaluation" / "heldout.jsonl", by_pair(after.means, before.means))
    write_json(folder / "evaluation" / "heldout.json", comparison)


def evaluation_prompts(recipe: RecipeBase, held_out: Examples) -> list[list[Message]]:
    """The conversations to answer: those the recipe names, else the first different held-out prompts."""
    wanted = recipe.evaluate.prompts
    if isinstance(wanted, list):
        prompts = [[Message(role="user", content=text)] for text in wanted]
    else:
        first = {key: place for place, key in reversed(list(enumerate(held_out.prompt_keys)))}
        prompts = [list(held_out.records[place].prompt) for place in sorted(first.values())[:wanted]]
    if recipe.evaluate.system is None:
        return prompts
    system = Message(role="system", content=recipe.evaluate.system)
    return [[system, *(message for message in prompt if message["role"] != "system")] for prompt in prompts]


Measured = tuple[Any, list[list[str]]]

_measured: dict[str, Measured] | None = None
"""Of models before training, by all that decides it, while runs share it."""


@contextmanager
def sharing_before() -> Iterator[None]:
    """Runs in here that are measured alike measure the model before training once."""
    global _measured
    _measured = {}
    try:
        yield
    finally:
        _measured = None


def _measured_before(
    measure: Callable[..., Measured], recipe: RecipeBase, held_out: Examples, prompts: list[list[Message]]
) -> Measured:
    if _measured is None:
        return measure(recipe, recipe.model, held_out, prompts, "before")
    train, drawn = recipe.train, held_out_sampling(recipe)
    settings = (recipe.model, recipe.data, recipe.algorithm.kind.data, recipe.rewards, recipe.evaluate, drawn)
    rounding = (train.seed, train.max_tokens, train.gradient_checkpointing)
    key = repr((settings, rounding, fingerprint(held_out), inputs_of(recipe)))
    if key in _measured:
        say("  the model before training was measured for an earlier run")
    else:
        _measured[key] = measure(recipe, recipe.model, held_out, prompts, "before")
    return _measured[key]


def _measure(
    recipe: RecipeBase, section: Model, held_out: Examples, prompts: list[list[Message]], when: str
) -> tuple[PairScores | None, list[list[str]]]:
    """Held-out scores and answers of one model, which is released afterwards."""
    # On a CPU float32 costs little and keeps rounding out of the comparison.
    model = load_start(section, dtype="float32" if choose_device().type == "cpu" else None)
    tokenizer = tokenizer_of(section)
    scores = _scores(recipe, model, held_out, f"held-out pairs {when}") if held_out else None
    answers = answer(model, tokenizer, prompts, sampling(recipe), f"answers {when}", template=recipe.data.template)
    del model
    free_memory()
    return scores, answers


def _judge_head(recipe: RecipeBase, held_out: Examples) -> dict[str, Any]:
    """How well the trained head tells held-out pairs apart. Before training there was none to compare it with."""
    if not held_out:
        return {"pairs": 0, "chance": {"accuracy": CHANCE}}
    merged = recipe.model.whole(recipe.run_folder / "merged")
    dtype = "float32" if choose_device().type == "cpu" else None
    model = load_model(merged, dtype=dtype, head_seed=head_seed_of(recipe))
    scores = score_pairs(scorer_of(recipe, model, held_out), held_out.trees, "held-out pairs")
    del model
    free_memory()
    if ranks.is_first():
        write_jsonl(recipe.run_folder / "evaluation" / "heldout.jsonl", by_pair(scores.sums))
    return against_chance(scores)


def _scores(recipe: RecipeBase, model: torch.nn.Module, held_out: Examples, label: str) -> PairScores | None:
    scorer = scorer_of(recipe, model, held_out)
    if recipe.algorithm.kind.data == "pairs":
        return score_pairs(scorer, held_out.trees, label)
    matches = match(held_out.prompt_keys, labels_of(held_out))
    return score_matched(scorer, held_out.trees, matches, label) if matches else None


def _measure_rewards(
    recipe: RecipeBase, section: Model, held_out: Examples, prompts: list[list[Message]], when: str
) -> tuple[list[Group], list[list[str]]]:
    """Rewards of a completion of each held-out prompt, sampled as in training, and answers of one model, which is
    released afterwards."""
    drawn = held_out_sampling(recipe)
    assert drawn is not None
    model = load_start(section, dtype="float32" if choose_device().type == "cpu" else None)
    tokenizer = tokenizer_of(section)
    columns = column_names(prompts_of(held_out))
    rewards = loaded_rewards(recipe, columns) if len(held_out) else []
    seeds = [seed_of(recipe.train.seed, place) for place in range(len(held_out))]
    with progress_bar(f"held-out prompts {when}", len(held_out)) as advance:
        completions = sample(model, tokenizer, [tree.prompt for tree in held_out.trees], drawn, seeds, advance)
    groups = ranks.from_first(lambda: scored_groups(rewards, prompts_of(held_out), completions, columns))
    answers = answer(model, tokenizer, prompts, sampling(recipe), f"answers {when}", template=recipe.data.template)
    del model
    free_memory()
    return groups, answers


def held_out_sampling(recipe: RecipeBase) -> Sampling | None:
    """How a completion of each held-out prompt is drawn: as in training; None for methods that train on stored ones."""
    draws = recipe.algorithm.draws
    return replace(sampling_of(draws), num_answers=1) if draws else None


def sampling(recipe: RecipeBase) -> Sampling:
    own = recipe.evaluate.model_dump()
    return Sampling(**{field.name: own[field.name] for field in fields(Sampling) if field.name in own})
