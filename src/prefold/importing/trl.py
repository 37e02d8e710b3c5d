"""TRL's configurations: `trl dpo --config FILE`, and the same for its other trainers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prefold.errors import UserError
from prefold.importing.adapters import LORA, without_dropout, write_quantised
from prefold.importing.draft import Decided, Draft, Table, To, Without
from prefold.importing.losses import OF_PAIRS, Loss, known_loss, write_losses
from prefold.importing.shared import (
    ARGUMENTS,
    ATTENTION,
    BUDGET,
    NO_SYNC,
    PACKED,
    SPEED,
    is_number,
    listed,
    reward_of,
    write_batch,
    write_dtype,
    write_evaluation,
    write_publish,
    write_rewards,
    write_steps,
    write_trackers,
)
from prefold.importing.sources import need_data, write_sources

NAME = "TRL"
TELLS = {
    "dataset_name",
    "dataset_config",
    "dataset_train_split",
    "dataset_test_split",
    "use_peft",
    "loss_type",
    "beta",
    "max_prompt_length",
    "max_completion_length",
    "num_generations",
    "reward_funcs",
    "desirable_weight",
    "simpo_gamma",
    "cpo_alpha",
    "center_rewards_coefficient",
}

_KTO = ("desirable_weight", "undesirable_weight")
_CPO = ("cpo_alpha", "simpo_gamma")
_GRPO = ("num_generations", "reward_funcs", "reward_model_name_or_path", "epsilon", "scale_rewards", "use_vllm")
_DPO = (
    "loss_weights",
    "truncation_mode",
    "f_divergence_type",
    "discopop_tau",
    "ld_alpha",
    "rpo_alpha",
    "reference_free",
    "use_weighting",
    "label_smoothing",
    "padding_free",
)
_SFT = ("packing", "assistant_only_loss", "completion_only_loss", "dataset_text_field", "max_seq_length")
COMMANDS = ("dpo", "orpo", "cpo", "kto", "grpo", "reward")

TABLE: Table = {
    **ARGUMENTS,
    "model_name_or_path": To("model.name"),
    "model_revision": To("model.revision", lambda value: None if value == "main" else value),
    "bnb_4bit_quant_storage": Decided("4-bit weights are kept as bytes"),
    "attn_implementation": Decided(ATTENTION),
    "model_init_kwargs": Without("write what is meant into the section `model`"),
    "lora_task_type": Decided("the method says what the model is for"),
    "lora_target_parameters": Without("name modules in `lora.target_modules`"),
    "router_aux_loss_coef": Without("the loss that balances experts is not trained"),
    "max_prompt_length": To("data.max_prompt_length"),
    "truncation_mode": Decided("answers are never cut; pairs that are too long follow `data.overlong`"),
    "padding_free": Decided(PACKED),
    "pad_to_multiple_of": Decided(PACKED),
    "padding_value": Decided(PACKED),
    "label_pad_token_id": Decided(PACKED),
    "pad_token": Decided(PACKED),
    "eos_token": Decided("the chat template writes an answer's end token"),
    "precompute_ref_log_probs": Decided("the reference's log-probs are computed once and kept on disk"),
    "precompute_ref_batch_size": Decided(BUDGET),
    "reference_free": Without("`method: cpo` needs no reference"),
    "ref_model": Without("the reference is the model before training"),
    "ref_model_name_or_path": Without("the reference is the model before training"),
    "model_adapter_name": Decided("`model.adapter` names an adapter to go on from"),
    "ref_adapter_name": Decided("with `model.adapter` the reference is a frozen copy of it"),
    "force_use_ref_model": Decided("with an adapter the base itself is the reference"),
    "sync_ref_model": Without(NO_SYNC),
    "ref_model_mixup_alpha": Without(NO_SYNC),
    "ref_model_sync_steps": Without(NO_SYNC),
    "generate_during_eval": Decided("a run answers held-out prompts before and after (`evaluate.prompts`)"),
    "is_encoder_decoder": Without("encoder-decoder models cannot be trained"),
    "use_logits_to_keep": Decided(SPEED),
    "ignore_bias_buffers": Decided("prefold needs it nowhere"),
    "dataset_streaming": Without("write `streaming: true` and `count` into the source in `data.train`"),
    "streaming": Without("write `streaming: true` and `count` into the sources in `data.train`"),
    "chat_template_path": Without("write `model.chat_template: FILE.jinja`, or `chatml`"),
    "env": Without("set these variables in the shell"),
}
ONLINE: Table = {
    **TABLE,
    "steps_per_generation": Decided("each step samples for itself"),
    "generation_batch_size": Decided("each step samples for itself"),
    "num_generations_eval": Without("held-out prompts have `evaluate.num_answers` answers"),
    "log_completions": Decided("completions are kept with their rewards"),
    "num_completions_to_print": Decided("completions are kept with their rewards"),
    "log_unique_prompts": Decided("completions are kept with their rewards"),
    "max_length": Decided("`data.max_length` bounds the prompt, `grpo.max_completion_length` the answer"),
    "shuffle_dataset": Decided("each epoch draws its order by `train.seed`"),
    "cast_lm_head_to_fp32": Decided("log-probs are computed in float32"),
    "repetition_penalty": Without("reward `{name: repetition}` holds repeated words down"),
    "delta": Without("`grpo.epsilon` clips on both sides"),
    "generation_kwargs": Without("`grpo.temperature`, `top_p`, `top_k` and `min_p` are what sampling has"),
    "chat_template_kwargs": Without("a template of your own: `model.chat_template: FILE.jinja`"),
    "use_vllm": Without("completions are sampled by prefold's own engine, from the weights of the step"),
}

_BASE: dict[str, Any] = {
    "train.num_train_epochs": 3,
    "train.lr_scheduler_type": "linear",
    "train.warmup_steps": 0,
    "train.gradient_checkpointing": True,
}
_RATES = {"reward": 1e-4}
"""Learning rates that are not 1e-6."""
_DPO_SETTINGS = (
    "beta",
    "label_smoothing",
    "ld_alpha",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "use_weighting",
    "discopop_tau",
)
GRPO_SETTINGS = (
    "num_generations",
    "max_completion_length",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "beta",
    "use_bias_correction_kl",
    "loss_type",
    "epsilon",
    "epsilon_high",
    "importance_sampling_level",
    "num_iterations",
    "mask_truncated_completions",
)
GRPO_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")
THINKING = r"(?s)\A<think>(?!.*<think>).*?</think>"


@dataclass(frozen=True)
class _Command:
    """What a trainer's file can ask for, beside what all have."""

    losses: Callable[[Draft, str], None]
    online: bool = False


def write(draft: Draft, where: str, method: str | None) -> None:
    """Fill the draft from a TRL file."""
    command = _command(draft, where, method)
    kind = _COMMANDS[command]
    kind.losses(draft, where)
    table, chosen = ONLINE if kind.online else TABLE, draft.values["method"]
    _write_model(draft, drops_dropout=not kind.online)
    write_dtype(draft, "bf16", "fp16", "dtype", "torch_dtype")
    _write_data(draft, command)
    write_batch(draft, ("per_device_train_batch_size", 8), ("gradient_accumulation_steps", 1), chosen)
    write_steps(draft)
    write_trackers(draft)
    write_publish(draft)
    draft.follow({key: table[key] for key in ("num_train_epochs",)})
    write_evaluation(draft, chosen, logging_steps=10)
    draft.follow(table)
    _vllm(draft)
    for field, value in {**_BASE, "train.learning_rate": _RATES.get(command, 1e-6)}.items():
        draft.fill(field, value)


def _command(draft: Draft, where: str, method: str | None) -> str:
    """Which of TRL's commands the file is for."""
    if method is not None:
        if method in COMMANDS:
            return method
        raise UserError(f"`--method {method}` is none of TRL's", where=where, expected=", ".join(COMMANDS))
    loss = draft.look("loss_type")
    names = {name for name in listed(loss) if isinstance(name, str)}
    fits: list[tuple[str, bool]] = [
        ("grpo", any(map(draft.has, _GRPO)) or bool(names & {*GRPO_LOSSES, "sapo", "vespo", "luspo"})),
        ("kto", any(map(draft.has, _KTO)) or bool(names & {"kto", "apo_zero_unpaired"})),
        ("cpo", any(map(draft.has, _CPO)) or "simpo" in names),
        ("reward", draft.has("center_rewards_coefficient") or draft.look("lora_task_type") == "SEQ_CLS"),
        ("dpo", any(map(draft.has, _DPO)) or bool(names & set(OF_PAIRS))),
    ]
    found = [name for name, fit in fits if fit]
    if found:
        return found[0]
    if any(map(draft.has, _SFT)):
        raise UserError(
            "a file for supervised fine-tuning",
            where=where,
            expected="one that aligns with preferences, which is what prefold does",
            advice="with pairs, `method: orpo` does both at once; `method: sft` trains on their chosen answers",
        )
    raise UserError(
        "TRL's command is not in the file, and its keys fit several",
        where=where,
        expected="--method " + " | ".join(COMMANDS),
        advice="add the command that the file is run with, e.g. `--method dpo` for `trl dpo --config FILE`",
    )


# ---- losses -----------------------------------------------------------------------------------------------------


def _dpo(draft: Draft, where: str) -> None:
    names, weights = listed(draft.take("loss_type", "sigmoid")), draft.take("loss_weights")
    losses = [known_loss(name, OF_PAIRS, "loss_type", where) for name in names]
    if isinstance(weights, list):
        losses = [Loss(one.method, one.settings, weight) for one, weight in zip(losses, weights, strict=False)]
    keys = [key for key in ("loss_type", "loss_weights") if draft.look(key)]
    if is_number(alpha := draft.take("rpo_alpha")) and alpha > 0:
        losses.append(Loss("sft", weight=alpha))
        keys.append("rpo_alpha")
    write_losses(draft, losses, {name: name for name in _DPO_SETTINGS}, {"beta": 0.1}, keys)


def _orpo(draft: Draft, where: str) -> None:
    write_losses(draft, [Loss("orpo")], {"beta": "beta"}, {"beta": 0.1})


def cpo_losses(alpha: Any, name: str) -> list[Loss]:
    """TRL's CPO trainer adds the supervised loss to SimPO's as well, with weight 1 where nothing is said."""
    if name != "simpo":
        return [Loss("cpo")]
    return [Loss("simpo"), *([Loss("sft", weight=alpha)] if alpha else [])]


def _cpo(draft: Draft, where: str) -> None:
    simpo = draft.look("loss_type") == "simpo"
    keys = [key for key in ("loss_type", "cpo_alpha") if simpo and draft.has(key)]
    losses = cpo_losses(draft.look("cpo_alpha", 1.0), draft.look("loss_type", "sigmoid"))
    settings = {name: name for name in ("beta", "cpo_alpha", "loss_type", "label_smoothing", "simpo_gamma")}
    for key in keys:
        draft.take(key)
        settings.pop(key)
    write_losses(draft, losses, settings, {"beta": 0.1, "cpo_alpha": 1.0, "simpo_gamma": 0.5}, keys)
    if simpo and "cpo_alpha" not in draft.given:
        draft.comments["mixed.losses"] = "TRL adds the supervised loss with `cpo_alpha: 1.0` unless told otherwise"


def _kto(draft: Draft, where: str) -> None:
    loss = known_loss(draft.take("loss_type", "kto"), {"kto": Loss("kto")}, "loss_type", where)
    keys = [key for key in ("loss_type",) if draft.look(key)]
    write_losses(draft, [loss], {name: name for name in ("beta", *_KTO)}, {"beta": 0.1}, keys)


def _reward(draft: Draft, where: str) -> None:
    key = "center_rewards_coefficient"
    write_losses(draft, [Loss("reward")], {key: key}, {})


def write_scaling(draft: Draft, key: str) -> None:
    """`scale_rewards`, which was a yes or no once."""
    if draft.has(key):
        value = draft.take(key)
        draft.carry("grpo.scale_rewards", {"True": "group", "False": "none"}.get(str(value), value), key)


def _grpo(draft: Draft, where: str) -> None:
    known_loss(draft.look("loss_type", "dapo"), {name: Loss("grpo") for name in GRPO_LOSSES}, "loss_type", where)
    defaults = {"num_generations": 8, "max_completion_length": 512, "beta": 0.0}
    write_losses(draft, [Loss("grpo")], {name: name for name in GRPO_SETTINGS}, defaults)
    write_scaling(draft, "scale_rewards")
    keys = [key for key in ("reward_model_name_or_path", "reward_funcs") if draft.has(key)]
    rewards: list[dict[str, Any] | None] = []
    if draft.has("reward_model_name_or_path"):
        rewards.append({"name": "reward_model", "model": draft.take("reward_model_name_or_path")})
    names = listed(draft.take("reward_funcs", []))
    rewards += [_reward_function(name) for name in names]
    write_rewards(draft, rewards, keys, "reward_weights")
    if lost := [name for name in names if _reward_function(name) is None]:
        draft.note("missing", "reward_funcs", text=f"{', '.join(map(str, lost))}: write it as a function of your own")


def _reward_function(name: Any) -> dict[str, Any] | None:
    if name in ("accuracy_reward", "reasoning_accuracy_reward"):
        return {"name": "symbolic_equality"}
    if name == "think_format_reward":
        return {"name": "regex", "pattern": THINKING}
    return reward_of(name)


def _vllm(draft: Draft) -> None:
    for key in [key for key in draft.given if key.startswith("vllm_") and draft.has(key)]:
        draft.note("missing", key, text="completions are sampled by prefold's own engine")


# ---- model and data ---------------------------------------------------------------------------------------------


def _write_model(draft: Draft, drops_dropout: bool) -> None:
    if not draft.take("use_peft", False):
        if "use_peft" in draft.given:
            draft.note("renamed", "use_peft", text="lora: none, which trains all weights")
        for key in filter(draft.has, list(LORA)):
            draft.note("off", key)
        for key in filter(draft.has, ["load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant"]):
            draft.note("missing", key, text="all weights are trained, which quantised ones cannot be")
        draft.values["lora"] = "none"
        return
    draft.note("renamed", "use_peft", text="a section `lora`")
    draft.follow(LORA)
    draft.fill("lora.r", 16)
    draft.fill("lora.lora_alpha", 32)
    draft.fill("lora.lora_dropout", 0.05)
    why = "peft's choice for Llama, Mistral, Qwen, Gemma"
    draft.fill("lora.target_modules", ["q_proj", "v_proj"], why)
    if drops_dropout and draft.take("disable_dropout", True):
        without_dropout(draft, "TRL", "disable_dropout")
    write_quantised(draft, {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False}, "use_bnb_nested_quant")


def _write_data(draft: Draft, command: str) -> None:
    write_sources(draft, "datasets", "data.train")
    _write_named(draft)
    if draft.has("test_split_size"):
        draft.follow({"test_split_size": To("data.eval_fraction")})
    need_data(draft, "the file names no data set")
    if command == "grpo":
        if draft.has("max_prompt_length"):
            _prompt_limit(draft)
        return
    if draft.has("max_length"):
        draft.carry("data.max_length", draft.take("max_length"), "max_length")
    elif "max_length" in draft.given:
        draft.carry("data.max_length", 1024, comment="no limit in the file, and prefold needs one")
    draft.fill("data.max_length", 1024)
    if draft.has("max_prompt_length"):
        draft.values["data.overlong"] = "truncate_prompt"
        draft.comments["data.overlong"] = "TRL cuts answers as well, which prefold never does"
    if draft.has("max_completion_length"):
        draft.note("decided", "max_completion_length", text="answers are never cut; see `data.max_length`")


def _prompt_limit(draft: Draft) -> None:
    """Where completions are sampled, `data.max_length` bounds the prompt alone."""
    draft.carry("data.max_length", draft.take("max_prompt_length"), "max_prompt_length")
    draft.values["data.overlong"] = "truncate_prompt"


def _write_named(draft: Draft) -> None:
    """`dataset_name` and its splits; `datasets` goes before it."""
    keys: Sequence[str] = ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split")
    name, config, train, test = (draft.take(key) for key in keys)
    given = [key for key in keys if draft.look(key)]
    if "data.train" in draft.values or name is None:
        if given:
            draft.note("off", *given)
        return
    source = {"path": name, **({"name": config} if config else {})}
    used = [key for key in given if key != "dataset_test_split"]
    draft.carry("data.train", [{**source, **({"split": train} if train else {})}], *used)
    measured = any(draft.look(key) not in (None, False, "no") for key in ("eval_strategy", "evaluation_strategy"))
    if test and test != train:
        draft.carry("data.eval", [{**source, "split": test}], "dataset_test_split")
    elif measured:
        draft.fill("data.eval", [{**source, "split": "test"}])
    if test == train and test:
        draft.note("decided", "dataset_test_split", text="rows that are trained on are not held out")


_COMMANDS = {
    "dpo": _Command(_dpo),
    "orpo": _Command(_orpo),
    "cpo": _Command(_cpo),
    "kto": _Command(_kto),
    "reward": _Command(_reward),
    "grpo": _Command(_grpo, online=True),
}
