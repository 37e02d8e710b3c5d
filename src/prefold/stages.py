"""What each stage does. A stage reads the recipe and the outputs of the stages before it, and leaves its own, whole."""

from __future__ import annotations

import logging
import math
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments

from prefold import ranks
from prefold.algorithms import GRPO
from prefold.data.examples import Example, Examples
from prefold.data.findings import by_severity, fingerprint
from prefold.data.mixture import Prepared, load_split
from prefold.data.preference import Message, Unpaired
from prefold.data.selection import shuffled
from prefold.errors import StageError, UserError
from prefold.evaluation.heldout import PairScores, compare_pairs, match, score_matched, score_pairs
from prefold.evaluation.rewards import compare_rewards
from prefold.evaluation.separation import findings_of as separation_findings
from prefold.evaluation.separation import separation
from prefold.files import cache_folder, new_folder, read_json, write_json, write_jsonl
from prefold.models.adapters import load_policy, load_start
from prefold.models.load import choose_device, choose_dtype, load_model, tokenizer_of, trainable_parameters
from prefold.models.merge import merge_adapter, remarks, save_and_check
from prefold.recipe import Model, RecipeBase
from prefold.reports.html import write_report
from prefold.rollouts.candidates import column_names
from prefold.rollouts.completions import Group, prompts_of, sample, scored_groups
from prefold.rollouts.generate import answer
from prefold.rollouts.rewards import LoadedReward, open_rewards
from prefold.rollouts.samples import seed_of
from prefold.rollouts.sampling import Sampling
from prefold.terminal import progress_bar, say
from prefold.trainers.arguments import training_arguments
from prefold.trainers.offline import PreferenceTrainer, StepOrder, TreeSet, kept_in, last_checkpoint, save_weights
from prefold.trainers.online import OnlineTrainer, sampling_of
from prefold.trainers.record import StepRecord
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
    plan: dict[str, Any]
    separation: dict[str, Any] | None = None

    @property
    def ok(self) -> bool:
        return all(finding.severity != "error" for finding in self.prepared.report.findings)

    def as_json(self) -> dict[str, Any]:
        fingerprints = {"train": fingerprint(self.prepared.train), "held_out": fingerprint(self.prepared.held_out)}
        return {
            "ok": self.ok,
            **self.prepared.report.as_json(),
            "fingerprint": fingerprints,
            "plan": self.plan,
            **({"separation": self.separation} if self.separation else {}),
            "examples": [self._shown(example) for example in self.prepared.train[:EXAMPLES_SHOWN]],
        }

    def _shown(self, example: Example) -> dict[str, Any]:
        """An example as it is trained on: the text of its ids."""
        parts = (example.tree.prompt, *example.tree.completions)
        prompt, *completions = (str(self.tokenizer.decode(list(ids), skip_special_tokens=False)) for ids in parts)
        tokens = [len(part) for part in parts]
        return {"row": asdict(example.record.origin), "prompt": prompt, "completions": completions, "tokens": tokens}


def examine(recipe: RecipeBase, reference: bool = False) -> CheckReport:
    """Read and count the data; with `reference`, score pairs by the model as well."""
    tokenizer = tokenizer_of(recipe.model)
    prepared = _read_once(recipe, tokenizer)
    if _samples(recipe):
        _rewards(recipe, column_names(prompts_of(prepared.train)))
    steps = len(_order(recipe, len(prepared.train)))
    plan = {"optimizer_steps": steps, "batch_size": recipe.train.batch_size, "max_tokens": recipe.train.max_tokens}
    found = CheckReport(prepared, tokenizer, plan)
    return _with_separation(recipe, found) if reference else found


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
    found = examine(recipe)
    if not found.ok:
        raise StageError("the data has errors; `prefold check` shows them")
    for finding in found.prepared.report.findings:
        if finding.severity == "warning":
            say(f"  warning: {finding.message}")
    write_json(recipe.run_folder / "environment.json", environment())
    write_json(recipe.run_folder / "data.json", found.as_json())


PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "bitsandbytes")


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
    folder = recipe.run_folder
    _require_sharing(recipe)
    with ranks.first_ahead():
        prepared = _prepared(recipe)
    model = _policy(recipe)
    scorer = _scorer(recipe, model, prepared.train)
    _require_packing(scorer)
    make_trainer = (_online_trainer if _samples(recipe) else _offline_trainer)(recipe, scorer, prepared)
    checkpoint = ranks.from_first(lambda: last_checkpoint(folder / "checkpoints"))
    done = int(checkpoint.name.split("-")[1]) if checkpoint else 0
    order = _order(recipe, len(prepared.train))
    with _trackers(recipe), progress_bar("train", len(order), done) as advance:
        record = StepRecord(folder, done, advance)
        trainer = make_trainer(order, record, training_arguments(recipe, len(order)))
        if checkpoint:
            trainer.scorer.max_tokens, trainer.carried = kept_in(checkpoint)
            say(f"  going on after step {done}")
        with scorer.in_place():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    target = folder / ("trained" if recipe.lora == "none" else "adapter")
    with new_folder(target) if ranks.is_first() else nullcontext(target) as aside:
        save_weights(model, aside)
        if recipe.model.chat_template and ranks.is_first():
            tokenizer_of(recipe.model).save_pretrained(aside)
    del trainer, make_trainer, model, scorer
    free_memory()


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
        model = load_model(recipe.model, dtype="float32", sharded=recipe.train.fsdp)
    else:
        model = load_policy(recipe.model, recipe.lora, recipe.train.seed, recipe.train.fsdp)
    trainable, total = trainable_parameters(model)
    say(f"  {trainable:,} of {total:,} parameters are trained ({trainable / total:.2%})")
    return model


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

            wandb.finish()


# ---- merge ------------------------------------------------------------------------------------------------------


def merge(recipe: RecipeBase) -> None:
    folder = recipe.run_folder
    tokenizer = tokenizer_of(recipe.model)
    trees = _sample_trees(_prepared(recipe).train)
    rows, prompts = [sum(tree.completions[:1], tree.prompt) for tree in trees], [tree.prompt for tree in trees]
    dtype = _merge_dtype(recipe)
    if recipe.lora == "none":
        trained = load_model(Model(name=str(folder / "trained")), dtype=dtype)
        result = save_and_check(trained, folder / "merged", tokenizer, rows, prompts)
    else:
        result = merge_adapter(recipe.model, folder / "adapter", folder / "merged", tokenizer, rows, dtype, prompts)
    for remark in remarks(result):
        say(f"  {remark}")
    write_json(folder / "merge.json", result)


def _merge_dtype(recipe: RecipeBase) -> str:
    if recipe.merge.dtype != "auto":
        return recipe.merge.dtype
    computed = recipe.model.bnb_4bit_compute_dtype
    trained_in = recipe.model.dtype if computed in (None, "auto") else computed
    return str(choose_dtype(trained_in, choose_device())).removeprefix("torch.")


# ---- evaluate ---------------------------------------------------------------------------------------------------


def evaluate(recipe: RecipeBase) -> None:
    folder = recipe.run_folder
    with ranks.first_ahead():
        held_out = _prepared(recipe).held_out
    prompts = evaluation_prompts(recipe, held_out)
    measure: Callable[..., tuple[Any, list[list[str]]]] = _measure_rewards if _samples(recipe) else _measure
    before, answers_before = measure(recipe, recipe.model, held_out, prompts, "before")
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
        write_json(folder / "evaluation" / "rewards.json", compare_rewards(before, after))
        return
    comparison: dict[str, Any] = {"pairs": 0}
    if before is not None and after is not None:
        comparison = compare_pairs(before, after, recipe.algorithm.reward_scale)
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
    return Sampling(**recipe.evaluate.model_dump(exclude={"prompts", "system"}))


# ---- report -----------------------------------------------------------------------------------------------------


def report(recipe: RecipeBase) -> None:
    write_report(recipe.run_folder)


# ---- data -------------------------------------------------------------------------------------------------------


def _prepared(recipe: RecipeBase) -> Prepared:
    """The data as it was checked.

    Raises:
        UserError: a file has changed since.
    """
    found = examine(recipe)
    if found.as_json()["fingerprint"] != read_json(recipe.run_folder / "data.json")["fingerprint"]:
        raise UserError(
            "the data is not what it was when this run began",
            where=recipe.output_dir,
            advice="restore the files, take another `output_dir`, or `--fresh` to start over",
        )
    return found.prepared


def _sample_trees(examples: Examples) -> list[TokenTree]:
    """Two small trees and a middling one, for checks that should cost little."""
    trees = examples.trees
    by_size = sorted(range(len(trees)), key=lambda place: trees[place].size)
    return [trees[place] for place in (*by_size[:2], by_size[len(by_size) // 2])]
