"""Fills the draft of a recipe from another tool's file: the order in which that is done, and what the tools have in
common: batches, steps, held-out data, trackers, publishing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from prefold.algorithms import ALGORITHMS
from prefold.importing.draft import Draft
from prefold.importing.sources import drop_splits_of_files
from prefold.importing.tables import Entry, is_number, listed, read_tool, table_of, whole_or_share
from prefold.importing.weights import write_weights
from prefold.recipe.sections import HUB_MODEL_ID, Tracker


@dataclass(frozen=True)
class Tool:
    """What is specific to a tool. `keys`: the content of its YAML file.

    Args:
        write_losses: sets the method, from the draft, the file's name and what `--method` says.
        write_data: sets the sources, and what is done with their rows.
        write_steps: sets what is not an argument of transformers' trainer.
    """

    keys: Mapping[str, Any]
    write_losses: Callable[[Draft, str, str | None], None]
    write_data: Callable[[Draft, str], None]
    write_steps: Callable[[Draft], None] = lambda draft: None

    @property
    def name(self) -> str:
        return str(self.keys["name"])


def write(draft: Draft, tool: Tool, where: str, method: str | None) -> None:
    """Fill the draft from a file of the tool."""
    keys, table = tool.keys, {**table_of(read_tool("transformers")), **table_of(tool.keys)}
    for section in keys.get("sections", []):
        draft.section(section)
    tool.write_losses(draft, where, method)
    if samples(draft):
        table |= table_of(keys.get("online", {}))
    write_weights(draft, keys)
    write_dtype(draft, keys["dtypes"])
    tool.write_data(draft, where)
    if not draft.values.get("data.train"):
        draft.values["data.train"] = [{"path": "pairs.jsonl"}]
        draft.comments["data.train"] = "to write: the file names no data set"
    drop_splits_of_files(draft)
    write_fraction(draft, keys["fraction"])
    write_batch(draft, *keys["batch"])
    write_steps(draft)
    draft.follow({keys["epochs"]: table[keys["epochs"]]})
    draft.fill("train.num_train_epochs", keys["defaults"]["train.num_train_epochs"])
    tool.write_steps(draft)
    write_trackers(draft)
    write_publish(draft, keys["push"])
    write_evaluation(draft, keys)
    draft.follow(table)
    for why, starts in keys.get("families", {}).items():
        draft.follow({key: Entry("missing", why) for key in draft.given if key.startswith(tuple(starts))})
    own = keys.get("method_defaults", {}).get(draft.values["method"], {})
    for field, value in [*own.items(), *keys["defaults"].items()]:
        draft.fill(field, value)


def samples(draft: Draft) -> bool:
    return ALGORITHMS[draft.values["method"]].kind.samples


def write_batch(draft: Draft, key: str, default: int) -> None:
    """The batch of an optimizer step: that of a device (`key`) times accumulation; for GRPO over the group's size."""
    factors = [draft.look(key, default), draft.look("gradient_accumulation_steps", 1)]
    given = [*filter(draft.has, (key, "gradient_accumulation_steps"))]
    group = draft.values.get("grpo.num_generations", 8)
    if not all(isinstance(number, int) and number > 0 for number in (*factors, group)):
        if given:
            draft.note("missing", *given, text="not numbers greater than 0; set `train.batch_size`")
        return
    product, text = math.prod(factors), f"{factors[0]} x {factors[1]}"
    if samples(draft):
        product, text = max(1, product // group), f"{text} completions / {group} a prompt"
    text = f"{text} on one device; with more, times their number"
    if given:
        draft.carry("train.batch_size", product, *given, comment=text)
    else:
        draft.fill("train.batch_size", product, text)


def write_steps(draft: Draft) -> None:
    """`max_steps` and the warm-up."""
    steps = draft.take("max_steps", -1)
    if isinstance(steps, int) and steps > 0:
        draft.carry("train.max_steps", steps, "max_steps")
    elif draft.look("max_steps") is not None:
        draft.note("off", "max_steps")
    # Either may be a share of all steps; `warmup_steps` takes precedence.
    warmup, ratio = draft.take("warmup_steps", 0), draft.take("warmup_ratio", 0)
    key, other = ("warmup_steps", "warmup_ratio") if warmup else ("warmup_ratio", "warmup_steps")
    if draft.look(other) is not None:
        draft.note("off", other)
    if key == "warmup_ratio" and is_number(ratio) and ratio >= 1:
        draft.note("missing", key, text="`train.warmup_steps` is a number of steps, or a share of them below 1")
    elif draft.look(key) is not None:
        draft.carry("train.warmup_steps", whole_or_share(warmup or ratio), key)


def write_evaluation(draft: Draft, keys: Mapping[str, Any]) -> None:
    """Measurements during training, from the strategy; for some tools `eval_steps` is enough without one."""
    held_out = has_held_out(draft)
    strategies = [*filter(draft.has, ("evaluation_strategy", "eval_strategy"))]
    for key in strategies:
        _measure(draft, key, held_out, keys["logging_steps"])
    if held_out and not samples(draft) and not strategies and keys.get("eval_steps_are_enough"):
        draft.follow({"eval_steps": Entry("field", "train.eval_steps", "steps")})
    if draft.has("eval_steps") and "train.eval_steps" not in draft.values:
        draft.note("missing", "eval_steps", text="nothing is measured while training")
    best = draft.look("metric_for_best_model") or draft.look("load_best_model_at_end")
    for key in filter(draft.has, ("metric_for_best_model", "greater_is_better", "load_best_model_at_end")):
        value = draft.take(key)
        # For `greater_is_better` false is a value; for the others it means off.
        if not (best if key == "greater_is_better" else value):
            draft.note("off", key)
        elif "train.eval_steps" in draft.values:
            draft.carry(f"train.{key}", value.removeprefix("eval_") if isinstance(value, str) else value, key)
        else:
            draft.note("missing", key, text="set `train.eval_steps` first")
    if not held_out:
        draft.carry("data.eval_fraction", 0.1, comment="prefold holds some rows out, to compare before and after")


def has_held_out(draft: Draft) -> bool:
    return "data.eval" in draft.values or "data.eval_fraction" in draft.values


def _measure(draft: Draft, key: str, held_out: bool, logging_steps: int) -> None:
    strategy = draft.take(key)
    epochs = draft.values["train.num_train_epochs"]
    every = draft.look("eval_steps") or draft.look("logging_steps", logging_steps) if strategy == "steps" else None
    if strategy == "epoch" and is_number(epochs) and epochs > 1:
        every = round(1 / epochs, 4)
    if strategy in (False, "no"):
        draft.note("off", key)
    elif samples(draft):
        draft.note("missing", key, text="`grpo` scores held-out prompts before and after alone")
    elif every is None:
        draft.note("decided", key, text="held-out data is measured before and after training")
    elif not held_out:
        draft.note("missing", key, text="the file holds nothing out; with `data.eval`, set `train.eval_steps`")
    else:
        draft.carry("train.eval_steps", whole_or_share(every), key, *filter(draft.has, ["eval_steps"]))


def write_per_epoch(draft: Draft, key: str, times: Any, field: str, at_the_end: str, why_not: str = "") -> None:
    """Set a field for what is done `times` an epoch to a share of all steps, unless that is once, at the end.
    `why_not`: why it cannot be set."""
    if not draft.has(key):
        return
    numbers = (times, draft.values["train.num_train_epochs"])
    part = round(1 / math.prod(numbers), 4) if all(is_number(number) and number > 0 for number in numbers) else 0
    often = "once" if times == 1 else f"{times} times"
    if not 0 < part < 1:
        draft.note("decided" if times else "off", key, text=at_the_end)
    elif why_not:
        draft.note("missing", key, text=why_not)
    else:
        draft.carry(field, part, key, comment=f"{often} an epoch, as a share of all steps")


def write_dtype(draft: Draft, keys: Mapping[str, str | None]) -> None:
    """The first of the keys that names a dtype or is on decides; `bf16: true` is a dtype too."""
    chosen = None
    for key in filter(draft.has, keys):
        value = draft.take(key)
        dtype = keys[key] or str(value).removeprefix("torch.")
        if value is False:
            draft.note("off", key)
        elif chosen:
            draft.note("decided", key, text=f"`model.dtype: {chosen}` is that of weights and of computing")
        else:
            chosen = "auto" if value == "auto" else dtype
            draft.carry("model.dtype", chosen, key)


def write_trackers(draft: Draft) -> None:
    if not draft.has("report_to"):
        return
    names = [name for name in listed(draft.take("report_to")) if name not in ("none", False)]
    if known := [name for name in names if name in get_args(Tracker)]:
        draft.carry("train.report_to", known, "report_to")
    elif not names:
        draft.note("off", "report_to")
    if others := [str(name) for name in names if name not in known]:
        text = f"{', '.join(others)}: not a tracker that prefold reports to; metrics.jsonl has every step"
        draft.note("missing", "report_to", text=text)


def write_fraction(draft: Draft, key: str) -> None:
    if not draft.has(key):
        return
    size = draft.take(key)
    if not size or "data.eval" in draft.values:
        draft.note("off", key)
    elif not is_number(size) or size < 1:
        draft.carry("data.eval_fraction", size, key)
    else:
        text = f"to set: {size:g} rows are held out in the file; `prefold check` says how many there are"
        draft.carry("data.eval_fraction", 0.1, comment=text)
        draft.note("missing", key, text=f"`data.eval_fraction` is a share of the rows, below 1; {text}")


def write_publish(draft: Draft, push_key: str | None) -> None:
    """The Hub repository."""
    push, name = push_key is None or draft.take(push_key, False), draft.take("hub_model_id")
    others = table_of(read_tool("transformers")["publish"])
    keys = [key for key in (push_key, "hub_model_id", *others) if key and draft.look(key) is not None]
    if not keys:
        return
    if not push:
        draft.note("off", *keys)
    elif isinstance(name, str) and re.fullmatch(HUB_MODEL_ID, name):
        draft.carry("publish.hub_model_id", name, *(key for key in keys if key not in others))
        draft.follow(others)
    else:
        draft.note("missing", *keys, text="write `publish: {hub_model_id: NAME/MODEL}`, with your name on the Hub")


def write_template(draft: Draft, key: str) -> None:
    """A chat template. One that is text in the file goes to a file beside the recipe, if the recipe goes to a file."""
    value = draft.take(key)
    if value == "chatml" or str(value).endswith(".jinja"):
        draft.carry("model.chat_template", value, key)
    elif not isinstance(value, str) or "{" not in value:
        draft.note("missing", key, text="`model.chat_template` is `chatml` or a file FILE.jinja; else the model's own")
    elif draft.output is None:
        text = "`--output RECIPE` writes it to a file beside the recipe; without it the model's own template is used"
        draft.note("missing", key, text=text)
    else:
        file = draft.output.with_suffix(".jinja")
        draft.files[file] = value
        comment = "the template that the file holds, written beside this"
        draft.carry("model.chat_template", str(file), key, comment=comment)
