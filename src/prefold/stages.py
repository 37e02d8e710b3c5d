"""What each stage does. A stage reads the recipe and the outputs of the stages before it, and leaves its own, whole."""

from __future__ import annotations

import logging
import math
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from prefold import ranks
from prefold.algorithms import GRPO
from prefold.comparison import compare_with, read_scores, require_models
from prefold.data.examples import Example, Examples
from prefold.data.findings import by_severity, fingerprint
from prefold.data.mixture import Prepared, load_split
from prefold.data.preference import Message, Unpaired
from prefold.data.selection import shuffled
from prefold.errors import StageError, UserError
from prefold.evaluation.compare import compare_tasks
from prefold.evaluation.contamination import questions_in
from prefold.evaluation.heldout import (
    CHANCE,
    PairScores,
    against_chance,
    by_pair,
    compare_pairs,
    match,
    score_matched,
    score_pairs,
)
from prefold.evaluation.rewards import by_prompt, compare_rewards
from prefold.evaluation.samples import OpenTask
from prefold.evaluation.separation import findings_of as separation_findings
from prefold.evaluation.separation import separation
from prefold.evaluation.tasks import asked_with, measure_model, open_tasks
from prefold.evaluation.win_rate import Compares, measure_win_rate, open_judge
from prefold.files import cache_folder, new_folder, read_json, read_jsonl, write_json, write_jsonl
from prefold.inputs import inputs_of, require_unchanged, row_list
from prefold.models.adapters import load_policy, load_start
from prefold.models.fetch import fetch
from prefold.models.load import choose_device, choose_dtype, load_model, tokenizer_of, trainable_parameters
from prefold.models.merge import merge_adapter, remarks, save_and_check
from prefold.models.provenance import provenance
from prefold.models.score_head import pad_apart
from prefold.plan.plan import Plan, make_plan
from prefold.publishing import publish_run, push_checkpoint, require_ready, require_section
from prefold.recipe import Model, RecipeBase
from prefold.reports.card import write_card
from prefold.reports.check import print_check
from prefold.reports.html import render_check, write_report
from prefold.reports.notebook import framed
from prefold.reports.plan import in_two_lines
from prefold.rollouts.candidates import column_names
from prefold.rollouts.completions import Group, prompts_of, sample, scored_groups
from prefold.rollouts.generate import answer
from prefold.rollouts.rewards import LoadedReward, open_rewards
from prefold.rollouts.samples import seed_of
from prefold.rollouts.sampling import Sampling
from prefold.terminal import as_text, progress_bar, say
from prefold.trainers.arguments import training_arguments
from prefold.trainers.checkpoints import kept_in, last_checkpoint, step_of
from prefold.trainers.guards import Facts
from prefold.trainers.interrupt import Interruption
from prefold.trainers.offline import PreferenceTrainer, StepOrder, TreeSet, save_weights
from prefold.trainers.online import OnlineTrainer, sampling_of
from prefold.trainers.pushes import Pushes
from prefold.trainers.record import StepRecord
from prefold.trainers.trackers import open_trackers
from prefold.trainers.watch import RolledBack, Watch
from prefold.trees.memory import auto_max_tokens, free_memory
from prefold.trees.packing import TokenTree
from prefold.trees.reference import reference_logprobs
from prefold.trees.scorer import Scorer, choose_scorer, unwrapped

logger = logging.getLogger("prefold")


EXAMPLES_SHOWN = 3
PAIRS_SCORED = 128
"""Enough to tell an accuracy to 9 points."""
STAND_IN = 32
"""Tokens."""


# ---- check ------------------------------------------------------------------------------------------------------


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
    order = _order(recipe, len(prepared.train))
    train, held_out = list(prepared.train.lengths), list(prepared.held_out.lengths)
    plan = make_plan(recipe, train, held_out, order, device_memory, measure)
    report = prepared.report
    everything = by_severity([*report.findings, *plan.findings()])
    prepared = replace(prepared, report=replace(report, findings=everything))
    found = CheckReport(prepared, tokenizer_of(recipe.model), plan)
    return _with_separation(recipe, found) if reference else found


def read_and_check(recipe: RecipeBase) -> Prepared:
    """The data, once what else the recipe names could be opened: rewards, judge, other models."""
    prepared = _read_once(recipe, tokenizer_of(recipe.model))
    if _samples(recipe):
        _rewards(recipe, column_names(prompts_of(prepared.train)))
    if recipe.evaluate.win_rate:
        _judge(recipe, tokenizer_of(recipe.model))
    require_models(recipe.evaluate.compare_with)
    return prepared


def fingerprints(prepared: Prepared) -> dict[str, str]:
    return {"train": fingerprint(prepared.train), "held_out": fingerprint(prepared.held_out)}


def _as_read(recipe: RecipeBase, prepared: Prepared) -> dict[str, Any]:
    """What a run must find unchanged when it goes on: its data, and what it reads beside it."""
    return {**prepared.report.as_json(), "fingerprint": {**fingerprints(prepared), **inputs_of(recipe)}}


_last_read: dict[str, Prepared] = {}


def _read_once(recipe: RecipeBase, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """The data of a recipe; the stages of one run share it."""
    key = f"{recipe.model!r} {recipe.data!r} {recipe.train.seed} {recipe.method}"
    if key not in _last_read:
        _last_read.clear()
        _last_read[key] = load_split(recipe.data, tokenizer, recipe.train.seed, recipe.algorithm.data)
    return _last_read[key]


def forget_data() -> None:
    """Read the data anew when it is next needed: files may have changed."""
    _last_read.clear()


def _with_separation(recipe: RecipeBase, found: CheckReport) -> CheckReport:
    if recipe.algorithm.data != "pairs":
        what = f"`--reference` compares chosen with rejected completions, and `{recipe.method}` takes no pairs"
        raise UserError(what, where=recipe.output_dir, advice="check without it")
    pairs = found.prepared.train.select(shuffled(len(found.prepared.train), recipe.train.seed)[:PAIRS_SCORED])
    model = load_start(recipe.model, dtype="float32" if choose_device().type == "cpu" else None)
    scores = score_pairs(_scorer(recipe, model, pairs), pairs.trees, "pairs under the model")
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
    write_json(recipe.run_folder / "data.json", {**found.as_json(), **_as_read(recipe, found.prepared)})


PACKAGES = (
    *("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "bitsandbytes"),
    "lm_eval",
)


def environment() -> dict[str, Any]:
    """What the run was computed with."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    device = choose_device()
    return {
        "prefold": version("prefold"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device.type,
        "device_name": torch.cuda.get_device_name() if device.type == "cuda" else _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "packages": versions,
    }


def _cpu_name() -> str:
    return str(torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine())


# ---- train ------------------------------------------------------------------------------------------------------


def train(recipe: RecipeBase) -> None:
    """Train; where a guard rolls back, once more from the checkpoint before."""
    _require_sharing(recipe)
    with ranks.first_ahead():
        prepared = _prepared(recipe)
    while True:
        try:
            return _train(recipe, prepared)
        except RolledBack:
            pass
        free_memory()


def _train(recipe: RecipeBase, prepared: Prepared) -> None:
    folder = recipe.run_folder
    model = _policy(recipe)
    scorer = _scorer(recipe, model, prepared.train)
    _require_packing(scorer)
    make_trainer = (_online_trainer if _samples(recipe) else _offline_trainer)(recipe, scorer, prepared)
    checkpoint = _last_checkpoint(recipe)
    done, order = step_of(checkpoint), _order(recipe, len(prepared.train))
    interruption = Interruption(every=order.iterations)
    with interruption, _trackers(recipe), progress_bar("train", len(order), done) as advance:
        record = StepRecord(folder, done, advance)
        trainer = make_trainer(order, record, training_arguments(recipe, len(order)))
        trainer.watch_by(_watch(recipe, record, done, order, prepared))
        for callback in (*(_outside(recipe) if ranks.is_first() else []), interruption):
            trainer.add_callback(callback)
        if checkpoint:
            trainer.scorer.max_tokens, trainer.carried = kept_in(checkpoint)
            say(f"  going on after step {done}")
        with scorer.in_place():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        interruption.leave()
    target = folder / ("trained" if recipe.lora == "none" else "adapter")
    with new_folder(target) if ranks.is_first() else nullcontext(target) as aside:
        save_weights(model, aside)
        if recipe.model.chat_template and ranks.is_first():
            tokenizer_of(recipe.model).save_pretrained(aside)
    del trainer, make_trainer, model, scorer
    free_memory()


def _outside(recipe: RecipeBase) -> list[TrainerCallback]:
    """Who else is told of training."""
    pushes = [Pushes(partial(push_checkpoint, recipe))] if recipe.publish and recipe.publish.checkpoints else []
    return [*open_trackers(recipe.train.report_to), *pushes]


def _watch(recipe: RecipeBase, record: StepRecord, done: int, order: StepOrder, prepared: Prepared) -> Watch:
    dtype = choose_dtype(recipe.model.dtype, choose_device())
    facts = Facts(len(order), recipe.train.learning_rate, scales_gradients=dtype == torch.float16)
    origins = prepared.train.origins
    return Watch(
        recipe.guards.actions,
        facts,
        record,
        done,
        rows_of=lambda step: row_list([origins[place] for place in order[step - 1]]),
        last_step=lambda: step_of(_last_checkpoint(recipe)),
    )


def _last_checkpoint(recipe: RecipeBase) -> Path | None:
    return ranks.from_first(lambda: last_checkpoint(recipe.run_folder / "checkpoints"))


def _require_sharing(recipe: RecipeBase) -> None:
    """Raises UserError if what the recipe asks for cannot be had from the processes that there are."""
    if ranks.processes() > 1:
        say(f"  {ranks.processes()} processes, each with a share of every step")
        if recipe.model.device_map:
            what = "places one model on several devices, and here each process has its own"
            raise UserError(what, where="`model.device_map`", advice="remove it, or start one process")
    elif recipe.train.fsdp:
        raise UserError(
            "shards weights over processes, and there is one",
            where="`train.fsdp`",
            advice="start several, e.g. `prefold run RECIPE --nproc 2`",
        )


def _require_packing(scorer: Scorer) -> None:
    if scorer.sharded and not scorer.packed:
        raise StageError(f"`train.fsdp` needs a model whose trees can be packed; here: {scorer.reason}")


MakeTrainer = Callable[[StepOrder, StepRecord, TrainingArguments], PreferenceTrainer]


def _offline_trainer(recipe: RecipeBase, scorer: Scorer, prepared: Prepared) -> MakeTrainer:
    train = _tree_set(recipe, scorer, prepared.train)
    held_out = _tree_set(recipe, scorer, prepared.held_out) if recipe.train.eval_steps else None
    patience = recipe.train.early_stopping_patience
    return partial(PreferenceTrainer, recipe.algorithm, scorer, train, held_out=held_out, patience=patience)


def _tree_set(recipe: RecipeBase, scorer: Scorer, examples: Examples) -> TreeSet:
    """Examples with what the algorithm asks for."""
    needs, dtype = recipe.algorithm, choose_dtype(recipe.model.dtype, choose_device())
    reference = reference_logprobs(scorer, examples.trees, cache_folder(), dtype) if needs.needs_reference else None
    return TreeSet(examples.trees, reference, _labels(examples) if needs.data == "unpaired" else None)


def _labels(examples: Examples) -> list[bool]:
    return [record.label for record in examples.records if isinstance(record, Unpaired)]


def _online_trainer(recipe: RecipeBase, scorer: Scorer, prepared: Prepared) -> MakeTrainer:
    assert isinstance(recipe.algorithm, GRPO)
    columns = column_names(prompts_of(prepared.train))
    rewards, tokenizer = _rewards(recipe, columns), tokenizer_of(recipe.model)
    return partial(OnlineTrainer, recipe.algorithm, scorer, prepared.train, rewards, columns, tokenizer)


def _samples(recipe: RecipeBase) -> bool:
    """Whether the method trains on completions that it samples."""
    return recipe.algorithm.data == "prompts"


def _rewards(recipe: RecipeBase, columns: Sequence[str]) -> list[LoadedReward]:
    """Raises UserError if a reward cannot be loaded, or asks for what there is not."""
    return open_rewards(recipe.rewards, ["prompts", "completions", "completion_ids", *columns])


def _policy(recipe: RecipeBase) -> torch.nn.Module:
    """The model to train, with its trainable parameters counted aloud."""
    model: torch.nn.Module
    if recipe.lora == "none":
        # Mixed precision keeps the trained weights in float32 and computes in the recipe's dtype.
        model = load_model(recipe.model, dtype="float32", head_seed=_head_seed(recipe), sharded=recipe.train.fsdp)
    else:
        model = load_policy(recipe.model, recipe.lora, recipe.train.seed, _head_seed(recipe), recipe.train.fsdp)
    trainable, total = trainable_parameters(model)
    say(f"  {trainable:,} of {total:,} parameters are trained ({trainable / total:.2%})")
    return model


def _head_seed(recipe: RecipeBase) -> int | None:
    """What a new head is drawn by, for a method that wants one that gives scores."""
    return recipe.train.seed if recipe.algorithm.scores_sequences else None


def _scorer(recipe: RecipeBase, model: torch.nn.Module, examples: Examples) -> Scorer:
    setting = recipe.train.max_tokens
    budget = auto_max_tokens(unwrapped(model), recipe.train.gradient_checkpointing) if setting == "auto" else setting
    sampled = recipe.algorithm.max_completion_length if isinstance(recipe.algorithm, GRPO) else 0
    longest = max(tree.longest for tree in examples.trees) + sampled
    return choose_scorer(model, _checked_trees(examples), budget, recipe.model.attn_implementation, longest)


def _checked_trees(examples: Examples) -> list[TokenTree]:
    """Sample trees; where completions are yet to be sampled, ends of their prompts stand in for them."""
    trees = _sample_trees(examples)
    stand_ins = tuple(tree.prompt[-STAND_IN:] for tree in trees)
    return [tree if tree.completions else replace(tree, completions=stand_ins) for tree in trees]


def _order(recipe: RecipeBase, trees: int) -> StepOrder:
    settings, iterations = recipe.train, recipe.algorithm.iterations
    draws = round(settings.num_train_epochs * trees)
    if settings.max_steps:
        draws = math.ceil(settings.max_steps / iterations) * settings.batch_size
    return StepOrder(trees, settings.batch_size, max(1, draws), settings.seed, iterations)


@contextmanager
def _trackers(recipe: RecipeBase) -> Iterator[None]:
    """W&B and TensorBoard take their settings from the environment; their files go into the run folder."""
    wanted = {
        "WANDB_PROJECT": recipe.train.project,
        "WANDB_DIR": str(recipe.run_folder),
        "TENSORBOARD_LOGGING_DIR": str(recipe.run_folder / "tensorboard"),
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        if "wandb" in recipe.train.report_to:
            import wandb

            with suppress(Exception, SystemExit):  # a tracker that is down costs its curves, never the run
                wandb.finish()
                wandb.teardown()  # else it keeps this run's folder for the next one in the process


# ---- merge ------------------------------------------------------------------------------------------------------


def merge(recipe: RecipeBase) -> None:
    folder = recipe.run_folder
    tokenizer = tokenizer_of(recipe.model)
    trees = _sample_trees(_prepared(recipe).train)
    rows, prompts = [sum(tree.completions[:1], tree.prompt) for tree in trees], [tree.prompt for tree in trees]
    if recipe.algorithm.scores_sequences:
        rows, prompts = [tree.prompt + ids for tree in trees for ids in tree.completions], []
        pad_apart(tokenizer, {row[-1] for row in rows})
    dtype, seed = _merge_dtype(recipe), _head_seed(recipe)
    if recipe.lora == "none":
        trained = load_model(Model(name=str(folder / "trained")), dtype=dtype, head_seed=seed)
        result = save_and_check(trained, folder / "merged", tokenizer, rows, prompts)
    else:
        adapter, merged = folder / "adapter", folder / "merged"
        result = merge_adapter(recipe.model, adapter, merged, tokenizer, rows, dtype, prompts, seed)
    for remark in remarks(result):
        say(f"  {remark}")
    write_json(folder / "merge.json", {**result, "provenance": provenance(recipe.model, recipe.data)})


def _merge_dtype(recipe: RecipeBase) -> str:
    if recipe.merge.dtype != "auto":
        return recipe.merge.dtype
    computed = recipe.model.bnb_4bit_compute_dtype
    trained_in = recipe.model.dtype if computed in (None, "auto") else computed
    return str(choose_dtype(trained_in, choose_device())).removeprefix("torch.")


# ---- evaluate ---------------------------------------------------------------------------------------------------


def evaluate(recipe: RecipeBase) -> None:
    tasks = check_tasks(recipe)
    _evaluate_held_out(recipe)
    if tasks:
        _evaluate_tasks(recipe, tasks)


def check_tasks(recipe: RecipeBase) -> list[OpenTask]:
    """Open the tasks that the recipe asks for.

    Raises:
        UserError: one of them cannot be asked.
    """
    return open_tasks(recipe.evaluate, tokenizer_of(recipe.model)) if recipe.evaluate.tasks else []


def _evaluate_tasks(recipe: RecipeBase, tasks: Sequence[OpenTask]) -> None:
    folder, settings = recipe.run_folder / "evaluation", recipe.evaluate
    merged = recipe.model.whole(recipe.run_folder / "merged")
    scores = {}
    number = "1 task" if len(tasks) == 1 else f"{len(tasks)} tasks"
    say(f"  {number}, chat template {'applied' if settings.apply_chat_template else 'off'}")
    seen = questions_in(_prepared(recipe).train.records, tasks, settings.limit)
    for when, section in (("before", recipe.model), ("after", merged)):
        scores[when] = measure_model(section, tasks, settings, when, seen if when == "after" else None)
        _write_json(folder / f"scores_{when}.json", [one.as_json() for one in scores[when]])
    compared = compare_tasks(scores["before"], scores["after"])
    _write_json(folder / "tasks.json", {**compared, "settings": asked_with(settings)})


def _write_json(path: Path, content: Any) -> None:
    """Of several processes the first one writes."""
    if ranks.is_first():
        write_json(path, content)


def _evaluate_held_out(recipe: RecipeBase) -> None:
    folder = recipe.run_folder
    with ranks.first_ahead():
        held_out = _prepared(recipe).held_out
    if recipe.algorithm.scores_sequences:
        _write_json(folder / "evaluation" / "heldout.json", _judge_head(recipe, held_out))
        return
    prompts = evaluation_prompts(recipe, held_out)
    measure: Callable[..., tuple[Any, list[list[str]]]] = _measure_rewards if _samples(recipe) else _measure
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
    if _samples(recipe):
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
    train, sampled = recipe.train, sampling_of(recipe.algorithm) if isinstance(recipe.algorithm, GRPO) else None
    settings = (recipe.model, recipe.data, recipe.algorithm.data, recipe.rewards, recipe.evaluate, sampled)
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
    model = load_model(merged, dtype=dtype, head_seed=_head_seed(recipe))
    scores = score_pairs(_scorer(recipe, model, held_out), held_out.trees, "held-out pairs")
    del model
    free_memory()
    if ranks.is_first():
        write_jsonl(recipe.run_folder / "evaluation" / "heldout.jsonl", by_pair(scores.sums))
    return against_chance(scores)


def _scores(recipe: RecipeBase, model: torch.nn.Module, held_out: Examples, label: str) -> PairScores | None:
    scorer = _scorer(recipe, model, held_out)
    if recipe.algorithm.data == "pairs":
        return score_pairs(scorer, held_out.trees, label)
    matches = match(held_out.prompt_keys, _labels(held_out))
    return score_matched(scorer, held_out.trees, matches, label) if matches else None


def _measure_rewards(
    recipe: RecipeBase, section: Model, held_out: Examples, prompts: list[list[Message]], when: str
) -> tuple[list[Group], list[list[str]]]:
    """Rewards of a completion of each held-out prompt, sampled as in training, and answers of one model, which is
    released afterwards."""
    assert isinstance(recipe.algorithm, GRPO)
    model = load_start(section, dtype="float32" if choose_device().type == "cpu" else None)
    tokenizer = tokenizer_of(section)
    columns = column_names(prompts_of(held_out))
    rewards = _rewards(recipe, columns) if len(held_out) else []
    drawn = replace(sampling_of(recipe.algorithm), num_answers=1)
    seeds = [seed_of(recipe.train.seed, place) for place in range(len(held_out))]
    with progress_bar(f"held-out prompts {when}", len(held_out)) as advance:
        completions = sample(model, tokenizer, [tree.prompt for tree in held_out.trees], drawn, seeds, advance)
    groups = ranks.from_first(lambda: scored_groups(rewards, prompts_of(held_out), completions, columns))
    answers = answer(model, tokenizer, prompts, sampling(recipe), f"answers {when}", template=recipe.data.template)
    del model
    free_memory()
    return groups, answers


def sampling(recipe: RecipeBase) -> Sampling:
    own = recipe.evaluate.model_dump()
    return Sampling(**{field.name: own[field.name] for field in fields(Sampling) if field.name in own})


# ---- report -----------------------------------------------------------------------------------------------------


def report(recipe: RecipeBase) -> None:
    write_report(recipe.run_folder)
    if (recipe.run_folder / "merged").is_dir():
        write_card(recipe.run_folder)


# ---- publish ----------------------------------------------------------------------------------------------------


def publish(recipe: RecipeBase) -> None:
    publish_run(recipe.run_folder, require_section(recipe))


# ---- compare and judge ------------------------------------------------------------------------------------------


def compare(recipe: RecipeBase) -> None:
    """Ask the models of `evaluate.compare_with` what this run was asked."""
    folder, settings = recipe.run_folder / "evaluation", recipe.evaluate
    found = compare_with(settings.compare_with, read_scores(folder / "scores_before.json"), settings)
    write_json(folder / "compared.json", found)


def judge(recipe: RecipeBase) -> None:
    """Have the judge of `evaluate.win_rate` compare the answers before with those after."""
    samples = read_jsonl(recipe.run_folder / "samples.jsonl")
    found = measure_win_rate(_judge(recipe, tokenizer_of(recipe.model)), samples)
    write_json(recipe.run_folder / "evaluation" / "win_rate.json", found)


def _judge(recipe: RecipeBase, tokenizer: PreTrainedTokenizerBase) -> Compares:
    assert recipe.evaluate.win_rate is not None

    def token_ids(texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    return open_judge(recipe.evaluate.win_rate.judge, token_ids)


# ---- data -------------------------------------------------------------------------------------------------------


def _prepared(recipe: RecipeBase) -> Prepared:
    """The data as it was checked.

    Raises:
        UserError: the data, or another file that the run reads, has changed since.
    """
    prepared = read_and_check(recipe)
    require_unchanged(read_json(recipe.run_folder / "data.json"), _as_read(recipe, prepared), recipe.output_dir)
    return prepared


def _sample_trees(examples: Examples) -> list[TokenTree]:
    """Two small trees and a middling one, for checks that should cost little."""
    trees = examples.trees
    by_size = sorted(range(len(trees)), key=lambda place: trees[place].size)
    return [trees[place] for place in (*by_size[:2], by_size[len(by_size) // 2])]
