"""What the three tools have in common: the arguments of transformers' trainer, batch sizes, held-out data, trackers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from prefold.algorithms import ALGORITHMS
from prefold.importing.draft import Decided, Draft, NoCounterpartError, Table, To, Without
from prefold.recipe.sections import HUB_MODEL_ID

BUDGET = "micro-batches are token budgets (`train.max_tokens`), found by prefold itself"
READING = "prefold reads and prepares the data itself"
PACKED = "prompts and answers are packed without padding anyway"
PRECISION = "see `model.dtype`; prefold leaves the products to torch's own setting"
ATTENTION = "`model.attn_implementation: auto` takes the fastest attention that passes the check at the start"
SPEED = "prefold trains on an engine of its own: packed prompts, chunked log-probs"
RESUMED = "a run goes on from its last checkpoint by itself; `--fresh` starts it over"
SEVERAL = "no DeepSpeed here: `prefold run RECIPE --nproc N` uses N GPUs, and `train.fsdp: true` shards the model"
FSDP = "write `train.fsdp: true` and start with `prefold run RECIPE --nproc N`"
COUNTED = "`prefold check` says how many there are"
REMOTE = "prefold runs no code of the Hub; a model that needs its own cannot be trained"
NO_SYNC = "the reference stays the model before training"


def scheduler(value: Any) -> Any:
    from transformers.trainer_utils import SchedulerType

    if value in [one.value for one in SchedulerType] and value not in ("reduce_lr_on_plateau", "greedy"):
        return value
    raise NoCounterpartError("choose one of transformers' schedules for `train.lr_scheduler_type`")


def optimizer(value: Any) -> Any:
    from transformers.training_args import OptimizerNames

    if value in [one.value for one in OptimizerNames]:
        return value
    raise NoCounterpartError("not one of transformers' optimizers; set `train.optim` to one, e.g. `adamw_torch`")


def whole(value: Any) -> Any:
    if isinstance(value, float) and value < 1:
        raise NoCounterpartError(f"prefold counts steps here; {COUNTED}")
    return value


def mapping(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        raise NoCounterpartError("not JSON; write it as a mapping") from None


def listed(value: Any) -> list[Any]:
    """Several values, also as one text with commas."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return value if isinstance(value, list) else [value]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def modules(value: Any) -> Any:
    """LoRA's targets: a word for all linear layers, or names."""
    names = listed(value)
    if names in (["all"], ["all-linear"]):
        return "all-linear"
    # peft reads one string as a pattern, and a list as names.
    return value if isinstance(value, str) and re.search(r"[*+^$|\\(\[]", value) else names


# transformers' `TrainingArguments`.
ARGUMENTS: Table = {
    **{
        name: To(f"train.{name}")
        for name in (
            "learning_rate",
            "num_train_epochs",
            "weight_decay",
            "adam_beta1",
            "adam_beta2",
            "adam_epsilon",
            "max_grad_norm",
            "gradient_checkpointing",
            "seed",
            "save_total_limit",
            "run_name",
            "project",
        )
    },
    "lr_scheduler_type": To("train.lr_scheduler_type", scheduler),
    "lr_scheduler_kwargs": To("train.lr_scheduler_kwargs", mapping),
    "optim": To("train.optim", optimizer),
    "save_steps": To("train.save_steps", whole),
    "output_dir": To("output_dir"),
    "overwrite_output_dir": Decided(RESUMED),
    "resume_from_checkpoint": Decided(RESUMED),
    "save_strategy": Decided("checkpoints are written every `train.save_steps` steps"),
    "save_only_model": Decided("checkpoints hold what it takes to go on; the result is `merged/`"),
    "save_safetensors": Decided("always so"),
    "logging_steps": Decided("every step is in metrics.jsonl"),
    "logging_strategy": Decided("every step is in metrics.jsonl"),
    "logging_first_step": Decided("every step is in metrics.jsonl"),
    "logging_dir": Decided("what is logged is in the run folder"),
    "log_level": Decided("what is said is in run.log"),
    "disable_tqdm": Decided("bars are shown on terminals alone"),
    "do_train": Decided("the command says what is done"),
    "do_eval": Decided("a run compares before and after on held-out data"),
    "per_device_eval_batch_size": Decided(BUDGET),
    "eval_accumulation_steps": Decided(BUDGET),
    "auto_find_batch_size": Decided("out of memory halves the token budget, and the step is done again"),
    "group_by_length": Decided(PACKED),
    "train_sampling_strategy": Decided(PACKED),
    "gradient_checkpointing_kwargs": Decided("`train.gradient_checkpointing` knows what the model needs"),
    "remove_unused_columns": Decided(READING),
    "dataset_num_proc": Decided(READING),
    "preprocessing_num_workers": Decided(READING),
    "dataloader_num_workers": Decided(READING),
    "dataloader_pin_memory": Decided(READING),
    "dataloader_drop_last": Decided(READING),
    "dataloader_prefetch_factor": Decided(READING),
    "tf32": Decided(PRECISION),
    "bf16_full_eval": Decided(PRECISION),
    "use_liger_kernel": Decided(SPEED),
    "torch_empty_cache_steps": Decided(SPEED),
    "activation_offloading": Without("`train.gradient_checkpointing: true` saves memory"),
    "torch_compile": Without("nothing to do; prefold does not compile models"),
    "torch_compile_backend": Without("nothing to do; prefold does not compile models"),
    "torch_compile_mode": Without("nothing to do; prefold does not compile models"),
    "ddp_timeout": Decided("processes wait for one another for three days"),
    "ddp_find_unused_parameters": Decided("prefold sets it"),
    "ddp_bucket_cap_mb": Decided("prefold leaves it to torch"),
    "local_rank": Decided("the launcher sets it"),
    "deepspeed": Without(SEVERAL),
    "fsdp": Without(FSDP),
    "fsdp_config": Without(FSDP),
    "accelerator_config": Without("nothing to do; one step is one item of prefold's own loader"),
    "data_seed": Without("`train.seed` is the seed of everything"),
    "optim_args": Without("set `train.adam_beta1`, `train.adam_beta2`, `train.adam_epsilon` if they are meant"),
    "neftune_noise_alpha": Without("prefold adds no noise to embeddings"),
    "label_smoothing_factor": Without("see `label_smoothing` of the method, if it has one"),
    "trust_remote_code": Without(REMOTE),
    "hub_strategy": Without("`publish.checkpoints: true` pushes every checkpoint"),
    "hub_token": Without("`hf auth login` or HF_TOKEN; remove it from the file"),
    "hub_revision": Without("write `publish.branch`"),
}


def write_batch(draft: Draft, per_device: tuple[str, int], accumulation: tuple[str, int], method: str) -> None:
    """The batch of an optimizer step from its factors, each a key and its default; GRPO's count completions."""
    factors = [draft.look(key, default) for key, default in (per_device, accumulation)]
    given = [key for key, _ in (per_device, accumulation) if draft.has(key)]
    group = draft.values.get(f"{method}.num_generations", 8)
    if not all(isinstance(number, int) and number > 0 for number in (*factors, group)):
        draft.note("missing", *given, text="not numbers greater than 0; set `train.batch_size`")
        return
    product, text = math.prod(factors), f"{factors[0]} x {factors[1]}"
    if ALGORITHMS[method].kind.samples:
        product, text = max(1, product // group), f"{text} completions / {group} a prompt"
    text = f"{text} on one device; with more, times their number"
    if given:
        draft.carry("train.batch_size", product, *given, comment=text)
    else:
        draft.fill("train.batch_size", product, text)


def write_steps(draft: Draft) -> None:
    """`max_steps`, and the warm-up in steps, which may be a share in the file."""
    steps = draft.take("max_steps", -1)
    if isinstance(steps, int) and steps > 0:
        draft.carry("train.max_steps", steps, "max_steps")
    elif "max_steps" in draft.given and draft.given["max_steps"] is not None:
        draft.note("off", "max_steps")
    warmup, ratio = draft.take("warmup_steps", 0), draft.take("warmup_ratio", 0)
    key = "warmup_steps" if warmup else "warmup_ratio"
    for other in {"warmup_steps", "warmup_ratio"} - {key}:
        if draft.given.get(other) is not None:
            draft.note("off", other)
    value = warmup or ratio
    if is_number(value) and 0 < value < 1:
        _write_share(draft, value, key)
    elif draft.given.get(key) is not None:
        draft.carry("train.warmup_steps", int(value) if isinstance(value, float) else value, key)


def _write_share(draft: Draft, share: float, key: str) -> None:
    """A warm-up that is a share of all steps: their number is known if the file has it."""
    if steps := draft.values.get("train.max_steps"):
        draft.carry("train.warmup_steps", math.ceil(share * steps), key, comment=f"{share:g} of {steps} steps")
    else:
        text = f"to set: {share:g} of all steps; {COUNTED}"
        draft.carry("train.warmup_steps", 0, comment=text)
        draft.note("missing", key, text=f"`train.warmup_steps` is a number of steps; {text}")


def write_evaluation(draft: Draft, method: str, logging_steps: int = 500) -> None:
    """Measurements while training, from a strategy; `logging_steps`: the other tool's default."""
    held_out = has_held_out(draft)
    for key in ("evaluation_strategy", "eval_strategy"):
        if draft.has(key):
            _measure(draft, key, method, held_out, logging_steps)
    keys = ("metric_for_best_model", "greater_is_better", "load_best_model_at_end")
    if draft.has("eval_steps") and "train.eval_steps" not in draft.values:
        draft.note("missing", "eval_steps", text="nothing is measured while training")
    best = draft.look("metric_for_best_model") or draft.look("load_best_model_at_end")
    for key in keys:
        if not draft.has(key):
            continue
        value = draft.take(key)
        # False says something of a metric; of a switch, that it is off.
        if not (best if key == "greater_is_better" else value):
            draft.note("off", key)
        elif "train.eval_steps" in draft.values:
            draft.carry(f"train.{key}", value.removeprefix("eval_") if isinstance(value, str) else value, key)
        else:
            draft.note("missing", key, text="set `train.eval_steps` first")
    if "data.eval" not in draft.values and "data.eval_fraction" not in draft.values:
        draft.carry("data.eval_fraction", 0.1, comment="prefold holds some rows out, to compare before and after")


def has_held_out(draft: Draft) -> bool:
    return "data.eval" in draft.values or "data.eval_fraction" in draft.values


def _measure(draft: Draft, key: str, method: str, held_out: bool, logging_steps: int) -> None:
    strategy = draft.take(key)
    epochs = draft.values.get("train.num_train_epochs", 3)
    every = draft.look("eval_steps") or draft.look("logging_steps", logging_steps) if strategy == "steps" else None
    if strategy == "epoch" and is_number(epochs) and epochs > 1:
        every = round(1 / epochs, 4)
    if strategy in (False, "no"):
        draft.note("off", key)
    elif ALGORITHMS[method].kind.samples:
        draft.note("missing", key, text=f"`{method}` scores held-out prompts before and after alone")
    elif every is None:
        draft.note("decided", key, text="held-out data is measured before and after training")
    elif not held_out:
        draft.note("missing", key, text="the file holds nothing out; with `data.eval`, set `train.eval_steps`")
    else:
        keys = [key, *(["eval_steps"] if draft.has("eval_steps") else [])]
        draft.carry("train.eval_steps", every, *keys)


def write_dtype(draft: Draft, *keys: str) -> None:
    """The first of the keys that names a dtype or is on decides; `bf16: true` is a dtype too."""
    names = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "float16": "float16", "float32": "float32"}
    names["pure_bf16"] = "bfloat16"
    chosen = None
    for key in (key for key in keys if draft.has(key)):
        value = draft.take(key)
        dtype = names.get(key) or str(value).removeprefix("torch.")
        if value is False:
            draft.note("off", key)
        elif chosen:
            draft.note("decided", key, text=f"weights are kept and computed with in `model.dtype: {chosen}`")
        else:
            chosen = "auto" if value == "auto" else dtype
            draft.carry("model.dtype", chosen, key)


def write_trackers(draft: Draft) -> None:
    if not draft.has("report_to"):
        return
    names = [name for name in listed(draft.take("report_to")) if name not in ("none", "all", False)]
    known = [name for name in names if name in ("wandb", "tensorboard")]
    if known:
        draft.carry("train.report_to", known, "report_to")
    elif not names:
        draft.note("off", "report_to")
    if others := [name for name in names if name not in known]:
        text = f"{', '.join(map(str, others))}: prefold reports to wandb and tensorboard; metrics.jsonl has every step"
        draft.note("missing", "report_to", text=text)


def write_publish(draft: Draft, asked: str | None = "push_to_hub") -> None:
    """The Hub repository; `asked` is the key without which nothing is pushed."""
    push = asked is None or draft.take(asked, False)
    name, private = draft.take("hub_model_id"), draft.take("hub_private_repo")
    keys = [key for key in (asked, "hub_model_id", "hub_private_repo") if key and draft.given.get(key) is not None]
    if not keys:
        return
    if not push:
        draft.note("off", *keys)
    elif isinstance(name, str) and re.fullmatch(HUB_MODEL_ID, name):
        draft.carry("publish.hub_model_id", name, *keys)
        if private is not None:
            draft.values["publish.private"] = private
    else:
        draft.note("missing", *keys, text="write `publish: {hub_model_id: NAME/MODEL}`, with your name on the Hub")


def reward_of(name: Any) -> dict[str, Any] | None:
    """A reward function by its dotted Python name, as the recipe has it; None if the name is not dotted."""
    module, dot, function = str(name).rpartition(".")
    return {"file": module.replace(".", "/") + ".py", "name": function} if dot else None


OWN_REWARDS = "a function takes `completions` as texts, and the rows' columns by their names"


def write_rewards(draft: Draft, rewards: Sequence[dict[str, Any] | None], keys: Sequence[str], weights: str) -> None:
    """`rewards`: None where one has no counterpart; `weights`: the key with one number for each of them."""
    numbers = draft.take(weights)
    if isinstance(numbers, list):
        rewards = [reward and {**reward, "weight": weight} for reward, weight in zip(rewards, numbers, strict=False)]
        draft.note("renamed", weights, text="`weight` of each of `rewards`")
    found = [reward for reward in rewards if reward]
    if found:
        draft.carry("rewards", found, *keys, comment=OWN_REWARDS if any("file" in one for one in found) else "")
    else:
        text = f"to write: the file names none that prefold knows. {OWN_REWARDS}"
        draft.carry("rewards", [{"file": "rewards.py", "name": "my_reward"}], comment=text)
