"""Axolotl's configurations. It trains with TRL's trainers, whose defaults hold unless it has its own."""

from __future__ import annotations

from prefold.errors import UserError
from prefold.importing.draft import Draft
from prefold.importing.losses import known, require_method, supervised, write_command
from prefold.importing.sources import write_sources
from prefold.importing.tables import read_tool
from prefold.importing.write import Tool, has_held_out, samples, write_per_epoch, write_template

KEYS = read_tool("axolotl")


def _write_losses(draft: Draft, where: str, method: str | None) -> None:
    wanted, choices = draft.look("rl"), "rl: " + " | ".join(KEYS["commands"])
    if draft.look("process_reward_model"):
        what = "`process_reward_model`: a model that scores steps of an answer"
        expected = f"`reward_model: true`, whose model scores whole answers, or {choices}"
        raise UserError(what, where=where, expected=expected)
    if wanted is None and draft.take("reward_model", False):
        draft.note("renamed", "reward_model", text="method: reward")
        wanted = "reward"
    if wanted is None:
        raise supervised("a file for supervised fine-tuning or pre-training: it has no `rl`", where, f": {choices}")
    command = "reward" if wanted == "reward" else known(wanted, KEYS["commands"], "rl", where)
    require_method(method, wanted, "rl", where)
    write_command(draft, where, command, KEYS, ["rl"], "ipo" if wanted == "ipo" else None)


def _write_data(draft: Draft, where: str) -> None:
    """Sources, and the chat template. Instead of a template given by name, the model's own is used."""
    write_sources(draft, "datasets", "data.train")
    write_sources(draft, "test_datasets", "data.eval")
    if isinstance(draft.look("chat_template_jinja"), str):
        write_template(draft, "chat_template_jinja")
        if draft.has("chat_template"):
            draft.note("renamed", "chat_template", text="as `chat_template_jinja` says")
    name = str(draft.look("chat_template", ""))
    if draft.has("chat_template") and not name.startswith("tokenizer_default"):
        text = f"{name}: the model's own chat template writes the turns; `model.chat_template` gives a base model one"
        draft.note("missing", "chat_template", text=text)


def _write_steps(draft: Draft) -> None:
    """The default warm-up, trackers from their switches, and the intervals of checkpoints and measurements."""
    if steps := draft.values.get("train.max_steps"):
        draft.fill("train.warmup_steps", min(int(0.03 * steps), 100), f"0.03 of {steps} steps")
    else:
        draft.fill("train.warmup_steps", 0.03, "a share of all steps, and at most 100 there")
    switches = {f"use_{name}": name for name in ("wandb", "tensorboard", "mlflow", "trackio")}
    wanted = [
        name for key, name in switches.items() if draft.look(key) or (name == "wandb" and draft.look("wandb_project"))
    ]
    if wanted:
        draft.carry("train.report_to", wanted, *filter(draft.has, switches))
    draft.off(*switches)
    measured = has_held_out(draft) and not samples(draft)
    why_not = "" if measured else "nothing is measured while training, for want of held-out pairs"
    evals, saves = draft.look("evals_per_epoch", 0), draft.look("saves_per_epoch", 0)
    at_the_end = "measured before and after training"
    write_per_epoch(draft, "evals_per_epoch", evals, "train.eval_steps", at_the_end, why_not)
    write_per_epoch(draft, "saves_per_epoch", saves, "train.save_steps", "the last step is saved anyway")


AXOLOTL = Tool(KEYS, _write_losses, _write_data, _write_steps)
