"""Axolotl's configurations. It trains with TRL's trainers, whose defaults hold where it has none of its own."""

from __future__ import annotations

from prefold.errors import UserError
from prefold.importing.draft import Draft
from prefold.importing.losses import Loss, known_loss, write_dpo, write_grpo, write_losses, write_simpo
from prefold.importing.sources import write_sources
from prefold.importing.tables import COUNTED, Entry, read_tool, table_of
from prefold.importing.write import Tool, has_held_out, samples, without_dropout, write_all_weights, write_quantised

KEYS = read_tool("axolotl")
METHODS = ("dpo", "ipo", "orpo", "kto", "simpo", "grpo")


def _write_losses(draft: Draft, where: str, method: str | None) -> None:
    wanted = _wanted(draft, where, method)
    draft.section("trl")
    if wanted == "grpo":
        write_grpo(draft, where, "trl.")
        return
    beta = next(filter(draft.has, KEYS["beta"]), "rl_beta")
    settings = {"beta": beta, **KEYS["settings"]["dpo" if wanted == "ipo" else wanted]}
    if wanted == "simpo":
        write_simpo(draft, settings)
    elif wanted in ("dpo", "ipo"):
        write_dpo(draft, where, settings, "dpo_", default="ipo" if wanted == "ipo" else "sigmoid")
    else:
        write_losses(draft, [Loss(wanted)], settings, [*filter(draft.has, ["rl"])])


def _wanted(draft: Draft, where: str, method: str | None) -> str:
    """What `rl` says."""
    wanted = draft.look("rl")
    if wanted is None and draft.take("reward_model", False):
        draft.note("renamed", "reward_model", text="method: reward")
        wanted = "reward"
    if wanted is None:
        raise UserError(
            "a file for supervised fine-tuning or pre-training: it has no `rl`",
            where=where,
            expected="one that aligns with preferences, which is what prefold does: rl: " + " | ".join(METHODS),
            advice="with pairs, `method: orpo` does both at once; `method: sft` trains on their chosen answers",
        )
    if wanted not in (*METHODS, "reward"):
        known_loss(wanted, dict.fromkeys(METHODS, Loss("dpo")), "rl", where)
    if method not in (None, wanted):
        raise UserError(f"`--method {method}`, and the file says `rl: {wanted}`", where=where, advice="leave it out")
    return str(wanted)


def _write_model(draft: Draft) -> None:
    table, kind = table_of(KEYS["adapter"]), draft.take("adapter")
    if kind is None:
        write_all_weights(draft, table, "no `adapter` in the file: all weights are trained")
        draft.off("lora_target_linear", "load_in_4bit", "load_in_8bit")
        return
    if kind in ("lora", "qlora"):
        draft.note("renamed", "adapter", text="a section `lora`" + (", `model.load_in_4bit`" * (kind == "qlora")))
    else:
        draft.note("missing", "adapter", text=f"{kind}: LoRA is trained instead")
    write_quantised(draft, "bnb_4bit_quant_type", "", double=True)
    draft.follow(table)
    if draft.take("lora_target_linear", False):
        draft.carry("lora.target_modules", "all-linear", "lora_target_linear")
    elif draft.given.get("lora_target_linear") is not None:
        draft.note("off", "lora_target_linear")
    if "model.adapter" in draft.values:
        for field in [field for field in draft.values if field.startswith("lora.")]:
            del draft.values[field]
        draft.comments["model.adapter"] = "it brings its own LoRA settings; those of the file are left out"
        return
    draft.fill("lora.target_modules", ["q_proj", "v_proj"], "peft's choice for Llama, Mistral, Qwen, Gemma")
    draft.fill("lora.lora_dropout", 0.0)
    if not samples(draft):
        without_dropout(draft, "TRL's trainer")


def _write_data(draft: Draft) -> None:
    """Longer rows are dropped unless the file has them cut, which prefold does from the left of the prompt alone."""
    write_sources(draft, "datasets", "data.train")
    write_sources(draft, "test_datasets", "data.eval")
    if not draft.has("sequence_len"):
        draft.fill("data.max_length", 512)
    if draft.has("excess_length_strategy"):
        choices = {"drop": "drop", "raise": "error", "truncate": "truncate_prompt"}
        value = draft.take("excess_length_strategy")
        comment = "the answer stays whole" if value == "truncate" else ""
        draft.carry("data.overlong", choices.get(str(value), value), "excess_length_strategy", comment=comment)


def _write_steps(draft: Draft) -> None:
    """The warm-up where the file says nothing, trackers by their switches, and when held-out data is measured."""
    if steps := draft.values.get("train.max_steps"):
        draft.fill("train.warmup_steps", min(int(0.03 * steps), 100), f"0.03 of {steps} steps")
    else:
        draft.fill("train.warmup_steps", 0, f"to set: 0.03 of all steps, at most 100; {COUNTED}")
    trackers = {"wandb": ("use_wandb", "wandb_project"), "tensorboard": ("use_tensorboard",)}
    wanted = [name for name, keys in trackers.items() if any(draft.look(key) for key in keys)]
    given = [key for key in ("use_wandb", "use_tensorboard") if draft.has(key)]
    if wanted:
        draft.carry("train.report_to", wanted, *given)
    elif given:
        draft.note("off", *given)
    measured = has_held_out(draft) and not samples(draft)
    # It needs no strategy beside it.
    if measured and draft.has("eval_steps") and not draft.has("eval_strategy"):
        draft.follow({"eval_steps": Entry("field", "train.eval_steps")})
    if draft.has("evals_per_epoch"):
        _write_share_of_steps(draft, measured)


def _write_share_of_steps(draft: Draft, measured: bool) -> None:
    number, epochs = draft.take("evals_per_epoch"), draft.values.get("train.num_train_epochs", 1)
    try:
        share = round(1 / (number * epochs), 4)
    except (ZeroDivisionError, TypeError):
        share = 1.0
    if share >= 1:
        draft.note("off" if not number else "decided", "evals_per_epoch", text="measured before and after training")
    elif not measured:
        draft.note("missing", "evals_per_epoch", text="nothing is measured while training, for want of held-out pairs")
    else:
        comment = f"{number} times an epoch, as a share of all steps"
        draft.carry("train.eval_steps", share, "evals_per_epoch", comment=comment)


AXOLOTL = Tool(KEYS, _write_losses, _write_model, _write_data, _write_steps)
