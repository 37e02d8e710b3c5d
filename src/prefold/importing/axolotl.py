"""Axolotl's configurations. It trains with TRL's trainers, whose defaults hold where it has none of its own."""

from __future__ import annotations

from prefold.errors import UserError
from prefold.importing.adapters import LORA, without_dropout, write_quantised
from prefold.importing.draft import Decided, Draft, Table, To, Without
from prefold.importing.losses import OF_PAIRS, Loss, known_loss, write_losses
from prefold.importing.shared import (
    ARGUMENTS,
    ATTENTION,
    COUNTED,
    FSDP,
    NO_SYNC,
    PACKED,
    PRECISION,
    READING,
    SPEED,
    has_held_out,
    is_number,
    listed,
    optimizer,
    reward_of,
    scheduler,
    write_batch,
    write_dtype,
    write_evaluation,
    write_publish,
    write_rewards,
    write_steps,
)
from prefold.importing.sources import TEMPLATE, need_data, write_sources
from prefold.importing.trl import GRPO_LOSSES, GRPO_SETTINGS, cpo_losses, write_scaling

NAME = "Axolotl"
TELLS = {
    "base_model",
    "rl",
    "adapter",
    "sequence_len",
    "micro_batch_size",
    "num_epochs",
    "lora_target_linear",
    "sample_packing",
    "val_set_size",
    "special_tokens",
}
METHODS = ("dpo", "ipo", "orpo", "kto", "simpo", "grpo")
TOKENS = "the tokens are the model's own; `model.chat_template` trains the rows of a new template's tokens"
SWITCH = "prefold picks the loop that is fastest and gives the plain numbers"
OWN_NAME = "run `wandb login`, and set WANDB_ENTITY, WANDB_MODE and the like in the shell"
ONLINE = "completions are sampled by prefold's own engine, from the weights of the step"


def _rest(names: str, entry: Decided | Without) -> Table:
    return dict.fromkeys(names.split(), entry)


TABLE: Table = {
    **ARGUMENTS,
    "base_model": To("model.name"),
    "revision_of_model": To("model.revision"),
    "sequence_len": To("data.max_length"),
    "num_epochs": To("train.num_train_epochs"),
    "lr_scheduler": To("train.lr_scheduler_type", scheduler),
    "optimizer": To("train.optim", optimizer),
    "default_system_message": To("data.system"),
    "shuffle_merged_datasets": To("data.shuffle"),
    "dataset_exact_deduplication": To("data.duplicates", lambda value: "drop_exact" if value else "keep"),
    "wandb_project": To("train.project"),
    "wandb_name": To("train.run_name"),
    "max_prompt_len": Without("`data.max_prompt_length` with `data.overlong: truncate_prompt` cuts prompts"),
    "cosine_min_lr_ratio": Without(
        "write `train.lr_scheduler_type: cosine_with_min_lr` and `lr_scheduler_kwargs: {min_lr_rate: ...}`"
    ),
    "saves_per_epoch": Without(f"`train.save_steps` is a number of steps; {COUNTED}"),
    "chat_template": Decided(TEMPLATE),
    "chat_template_jinja": Without("write it to a file and name that: `model.chat_template: FILE.jinja`"),
    "gradient_checkpointing": To("train.gradient_checkpointing", bool),
    "train_on_inputs": Decided("the answers are trained on; ORPO's supervised loss reads the prompt too, as TRL's"),
    "precompute_ref_log_probs": Decided("the reference's log-probs are computed once and kept on disk"),
    "rl_adapter_ref_model": Decided("the base with its adapter off is the reference"),
    "dpo_norm_loss": Without("`method: sigmoid_norm` divides log-probs by their length"),
    "dpo_generate_during_eval": Decided("a run answers held-out prompts before and after (`evaluate.prompts`)"),
    "merge_lora": Decided("every run merges, and proves it"),
    "early_stopping_patience": Without("`train.early_stopping_patience`, beside `eval_steps` and a metric"),
    "bnb_config_kwargs": Without("see `model.bnb_4bit_quant_type` and what follows it in `prefold schema`"),
    "batch_size": Without("`train.batch_size` is pairs (or prompts) a step over all devices"),
    "use_ray": Without("`prefold run RECIPE --nproc N` uses N GPUs"),
    **_rest("fsdp_version fsdp_final_state_dict_type qlora_sharded_model_loading", Without(FSDP)),
    **_rest("model_type tokenizer_type type_of_model base_model_config processor_type", Decided("read from the model")),
    **_rest("is_falcon_derived_model is_llama_derived_model is_mistral_derived_model", Decided("read from the model")),
    **_rest("is_qwen_derived_model tokenizer_use_fast tokenizer_legacy", Decided("read from the model")),
    **_rest("tokenizer_config special_tokens tokens added_tokens_overrides eot_tokens", Without(TOKENS)),
    **_rest("resize_token_embeddings_to_32x fix_untrained_tokens", Without(TOKENS)),
    **_rest("sample_packing eval_sample_packing pad_to_sequence_len batch_flattening", Decided(PACKED)),
    **_rest("dpo_padding_free dpo_use_logits_to_keep sample_packing_group_size", Decided(PACKED)),
    **_rest("flash_attention xformers_attention sdp_attention flex_attention s2_attention", Decided(ATTENTION)),
    **_rest("eager_attention attn_implementation flash_attn_cross_entropy", Decided(ATTENTION)),
    **_rest("lora_mlp_kernel lora_qkv_kernel lora_o_kernel cut_cross_entropy", Decided(SPEED)),
    **_rest("unsloth_cross_entropy_loss unsloth_lora_mlp unsloth_lora_qkv unsloth_lora_o", Decided(SPEED)),
    **_rest("liger_rope liger_rms_norm liger_glu_activation liger_swiglu", Decided(SWITCH)),
    **_rest("liger_fused_linear_cross_entropy liger_layer_norm dpo_use_liger_kernel", Decided(SWITCH)),
    **_rest("dataset_prepared_path dataset_processes skip_prepare_dataset", Decided(READING)),
    **_rest("dataset_keep_in_memory dataset_num_proc preprocess_iterable", Decided(READING)),
    **_rest("strict low_cpu_mem_usage lora_on_cpu lora_fan_in_fan_out gc_steps", Decided("prefold needs it nowhere")),
    **_rest("eval_table_size eval_max_new_tokens eval_batch_size", Decided("see the section `evaluate`")),
    **_rest("auto_resume_from_checkpoints", Decided("a run goes on from its last checkpoint by itself")),
    **_rest("fp8", Decided(PRECISION)),
    **_rest("wandb_entity wandb_watch wandb_run_id wandb_log_model wandb_mode", Without(OWN_NAME)),
    **_rest("use_mlflow mlflow_tracking_uri mlflow_experiment_name", Without("prefold reports to wandb, tensorboard")),
    **_rest("use_comet comet_project_name", Without("prefold reports to wandb, tensorboard")),
    **_rest("plugins", Without("prefold has no plug-ins")),
    **_rest("loss_watchdog_threshold loss_watchdog_patience", Without("the section `guards` watches every step")),
    **_rest("device_map max_memory gpu_memory_limit", Without("see `model.device_map`, as transformers takes it")),
    **_rest("loraplus_lr_ratio loraplus_lr_embedding lr_groups", Without("one learning rate for all that is trained")),
    **_rest(
        "peft_layers_to_transform peft_init_lora_weights relora", Without("see the section `lora` for what it has")
    ),
    **_rest("unfrozen_parameters", Without("`lora.modules_to_save` trains modules whole")),
    **_rest("vllm trl.use_vllm trl.vllm_server_host trl.vllm_server_port", Without(ONLINE)),
    **_rest("trl.vllm_server_timeout trl.vllm_gpu_memory_utilization trl.vllm_max_model_len", Without(ONLINE)),
    **_rest("trl.vllm_mode trl.vllm_dtype trl.vllm_device", Without(ONLINE)),
    **_rest("trl.sync_ref_model trl.ref_model_mixup_alpha trl.ref_model_sync_steps", Without(NO_SYNC)),
    **_rest("trl.log_completions", Decided("completions are kept with their rewards")),
    **_rest("trl.repetition_penalty", Without("reward `{name: repetition}` holds repeated words down")),
}

_LORA: Table = {
    **{key: entry for key, entry in LORA.items() if not key.startswith("use_")},
    "peft_use_dora": To("lora.use_dora"),
    "peft_use_rslora": To("lora.use_rslora"),
    "lora_model_dir": To("model.adapter"),
}


def write(draft: Draft, where: str, method: str | None) -> None:
    """Fill the draft from an Axolotl file."""
    wanted = _wanted(draft, where, method)
    _write_losses(draft, where, wanted)
    chosen = draft.values["method"]
    _write_adapter(draft, drops_dropout=wanted != "grpo")
    write_dtype(draft, "bf16", "fp16", "bfloat16", "float16", "float32")
    write_sources(draft, "datasets", "data.train")
    write_sources(draft, "test_datasets", "data.eval")
    need_data(draft, "the file names no data set")
    _write_fraction(draft)
    _write_length(draft)
    write_batch(draft, ("micro_batch_size", 1), ("gradient_accumulation_steps", 1), chosen)
    _write_steps(draft)
    _write_measurements(draft, chosen)
    write_evaluation(draft, chosen)
    _write_trackers(draft)
    write_publish(draft, None)
    draft.follow(TABLE)
    for field, value in {"train.num_train_epochs": 1, "train.lr_scheduler_type": "cosine"}.items():
        draft.fill(field, value)


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


# ---- losses -----------------------------------------------------------------------------------------------------


def _write_losses(draft: Draft, where: str, wanted: str) -> None:
    draft.section("trl")
    beta = next((key for key in ("trl.beta", "rl_beta", "dpo_beta", "orpo_alpha") if draft.has(key)), "rl_beta")
    keys = ["rl"] if draft.has("rl") else []
    if wanted == "grpo":
        _write_grpo(draft, where, keys)
    elif wanted == "simpo":
        added = ["cpo_alpha"] if draft.has("cpo_alpha") else []
        losses = cpo_losses(draft.look("cpo_alpha", 1.0), "simpo")
        settings = {"beta": beta, "simpo_gamma": "simpo_gamma"}
        write_losses(draft, losses, settings, {"beta": 0.1, "simpo_gamma": 0.5}, [*keys, *added])
        if not added:
            draft.comments["mixed.losses"] = "TRL adds the supervised loss with `cpo_alpha: 1.0` unless told otherwise"
    elif wanted == "kto":
        settings = {"beta": beta, "desirable_weight": "kto_desirable_weight"}
        settings["undesirable_weight"] = "kto_undesirable_weight"
        write_losses(draft, [Loss("kto")], settings, {"beta": 0.1}, keys)
    elif wanted in ("orpo", "reward"):
        write_losses(draft, [Loss(wanted)], {"beta": beta}, {"beta": 0.1}, keys)
    else:
        _write_dpo(draft, where, "ipo" if wanted == "ipo" else "sigmoid", beta, keys)


def _write_dpo(draft: Draft, where: str, loss: str, beta: str, keys: list[str]) -> None:
    names, weights = listed(draft.look("dpo_loss_type", loss)), draft.look("dpo_loss_weights")
    losses = [known_loss(name, OF_PAIRS, "dpo_loss_type", where) for name in names]
    if isinstance(weights, list):
        losses = [Loss(one.method, one.settings, weight) for one, weight in zip(losses, weights, strict=False)]
    if is_number(alpha := draft.look("rpo_alpha")) and alpha > 0:
        losses.append(Loss("sft", weight=alpha))
    keys += [key for key in ("dpo_loss_type", "dpo_loss_weights", "rpo_alpha") if draft.has(key)]
    settings = {"beta": beta, "label_smoothing": "dpo_label_smoothing", "use_weighting": "dpo_use_weighting"}
    write_losses(draft, losses, settings, {"beta": 0.1}, keys)


def _write_grpo(draft: Draft, where: str, keys: list[str]) -> None:
    loss = draft.look("trl.loss_type", "dapo")
    known_loss(loss, {name: Loss("grpo") for name in GRPO_LOSSES}, "trl.loss_type", where)
    defaults = {"num_generations": 8, "max_completion_length": 512, "beta": 0.0}
    write_losses(draft, [Loss("grpo")], {name: f"trl.{name}" for name in GRPO_SETTINGS}, defaults, keys)
    write_scaling(draft, "trl.scale_rewards")
    named = [key for key in ("trl.reward_funcs",) if draft.has(key)]
    names = listed(draft.take("trl.reward_funcs", []))
    # What is no function's name is a reward model's.
    rewards = [{"name": "reward_model", "model": name} if "/" in str(name) else reward_of(name) for name in names]
    write_rewards(draft, rewards, named, "trl.reward_weights")


# ---- the rest ---------------------------------------------------------------------------------------------------


def _write_adapter(draft: Draft, drops_dropout: bool) -> None:
    kind = draft.take("adapter")
    if kind is None:
        draft.values["lora"] = "none"
        draft.comments["lora"] = "no `adapter` in the file: all weights are trained"
        for key in filter(draft.has, [*_LORA, "lora_target_linear", "load_in_4bit", "load_in_8bit"]):
            draft.note("off", key)
        return
    if kind in ("lora", "qlora"):
        draft.note("renamed", "adapter", text="a section `lora`" + (", `model.load_in_4bit`" * (kind == "qlora")))
    else:
        draft.note("missing", "adapter", text=f"{kind}: LoRA is trained instead")
    write_quantised(draft, {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, "")
    draft.follow(_LORA)
    if draft.take("lora_target_linear", False):
        draft.carry("lora.target_modules", "all-linear", "lora_target_linear")
    elif draft.given.get("lora_target_linear") is not None:
        draft.note("off", "lora_target_linear")
    if "model.adapter" in draft.values:
        for field in [field for field in draft.values if field.startswith("lora.")]:
            del draft.values[field]
        draft.comments["model.adapter"] = "it brings its own LoRA settings; those of the file are left out"
        return
    why = "peft's choice for Llama, Mistral, Qwen, Gemma"
    draft.fill("lora.target_modules", ["q_proj", "v_proj"], why)
    draft.fill("lora.lora_dropout", 0.0)
    if drops_dropout:
        without_dropout(draft, "TRL's trainer")


def _write_fraction(draft: Draft) -> None:
    if not draft.has("val_set_size"):
        return
    size = draft.take("val_set_size")
    if not size or "data.eval" in draft.values:
        draft.note("off", "val_set_size")
    elif not is_number(size) or size < 1:
        draft.carry("data.eval_fraction", size, "val_set_size")
    else:
        draft.note("missing", "val_set_size", text="`data.eval_fraction` is a share of the rows, below 1")


def _write_length(draft: Draft) -> None:
    """Longer rows are dropped unless the file has them cut, which prefold does from the left of the prompt alone."""
    draft.fill("data.max_length", 512) if not draft.has("sequence_len") else None
    if not draft.has("excess_length_strategy"):
        return
    choices = {"drop": "drop", "raise": "error", "truncate": "truncate_prompt"}
    value = draft.take("excess_length_strategy")
    comment = "the answer stays whole" if value == "truncate" else ""
    draft.carry("data.overlong", choices.get(str(value), value), "excess_length_strategy", comment=comment)


def _write_steps(draft: Draft) -> None:
    write_steps(draft)
    if "train.warmup_steps" in draft.values:
        return
    if steps := draft.values.get("train.max_steps"):
        draft.fill("train.warmup_steps", min(int(0.03 * steps), 100), f"0.03 of {steps} steps")
    else:
        draft.fill("train.warmup_steps", 0, f"to set: 0.03 of all steps, at most 100; {COUNTED}")


def _write_measurements(draft: Draft, method: str) -> None:
    """`eval_steps`, which needs no strategy beside it, and `evals_per_epoch` as a share of all steps."""
    draft.follow({"num_epochs": TABLE["num_epochs"]})
    measured = has_held_out(draft) and method != "grpo"
    if measured and draft.has("eval_steps") and not draft.has("eval_strategy"):
        draft.follow({"eval_steps": To("train.eval_steps")})
    if not draft.has("evals_per_epoch"):
        return
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


def _write_trackers(draft: Draft) -> None:
    trackers = {"wandb": ("use_wandb", "wandb_project"), "tensorboard": ("use_tensorboard",)}
    wanted = [name for name, keys in trackers.items() if any(draft.look(key) for key in keys)]
    given = [key for key in ("use_wandb", "use_tensorboard") if draft.has(key)]
    if wanted:
        draft.carry("train.report_to", wanted, *given)
    elif given:
        draft.note("off", *given)
