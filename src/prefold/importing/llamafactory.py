"""LLaMA-Factory's configurations. It trains with transformers' trainer, whose defaults hold for what it has from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefold.errors import UserError
from prefold.importing.adapters import LORA, without_dropout
from prefold.importing.draft import Decided, Draft, Table, To, Without
from prefold.importing.losses import Loss, known_loss, write_losses
from prefold.importing.shared import (
    ARGUMENTS,
    ATTENTION,
    PACKED,
    PRECISION,
    READING,
    SPEED,
    is_number,
    listed,
    modules,
    write_batch,
    write_dtype,
    write_evaluation,
    write_publish,
    write_steps,
    write_trackers,
)
from prefold.importing.sources import TEMPLATE, need_data
from prefold.recipe import parse_yaml

NAME = "LLaMA-Factory"
TELLS = {
    "stage",
    "finetuning_type",
    "cutoff_len",
    "lora_rank",
    "lora_target",
    "pref_loss",
    "pref_beta",
    "dataset_dir",
    "quantization_bit",
    "template",
}
STAGES = {"dpo": "dpo", "kto": "kto", "rm": "reward"}
LOSSES = {
    "sigmoid": Loss("dpo"),
    "hinge": Loss("hinge"),
    "ipo": Loss("ipo"),
    "orpo": Loss("orpo", {"completion_only_loss": True}),
    "simpo": Loss("simpo"),
}
IN_INFO = "of dataset_info.json: write the file or Hub data set that it stands for"
REFERENCE = "the reference is the model before training"
GALORE = "choose one of transformers' optimizers for `train.optim`"

TABLE: Table = {
    **ARGUMENTS,
    "model_name_or_path": To("model.name"),
    "model_revision": To("model.revision", lambda value: None if value == "main" else value),
    "cutoff_len": To("data.max_length"),
    "gradient_checkpointing": To("train.gradient_checkpointing"),
    "disable_gradient_checkpointing": To("train.gradient_checkpointing", lambda value: not value),
    "template": Decided(TEMPLATE),
    "tool_format": Decided("turns with tools are left out, and counted"),
    "overwrite_cache": Decided(READING),
    "preprocessing_batch_size": Decided(READING),
    "tokenized_path": Decided(READING),
    "dataset_dir": Without("its dataset_info.json is not read: name files or Hub data sets in `data.train`"),
    "media_dir": Without("images, videos and sound cannot be trained on"),
    "streaming": Without("write `streaming: true` and `count` into the sources in `data.train`"),
    "train_on_prompt": Without("the answers are trained on"),
    "mask_history": Decided("the last answer is trained on"),
    "packing": Decided(PACKED),
    "neat_packing": Decided(PACKED),
    "pref_loss": Decided("`stage` alone decides here"),
    "pref_ftx": Without("`kto` and `reward` have no supervised loss beside them"),
    "pref_bco_weight": Without("`kto` and `reward` have no other loss beside them"),
    "plot_loss": Decided("report.html has the curves"),
    "compute_accuracy": Decided("held-out pairs have their accuracy"),
    "disable_shuffling": Without("each epoch draws its order by `train.seed`"),
    "include_effective_tokens_per_second": Decided("timing.jsonl has it"),
    "include_num_input_tokens_seen": Decided("timing.jsonl has it"),
    "early_stopping_steps": Without("`train.early_stopping_patience`, beside `eval_steps` and a metric"),
    "flash_attn": Decided(ATTENTION),
    "use_unsloth": Decided(SPEED),
    "use_unsloth_gc": Decided(SPEED),
    "enable_liger_kernel": Decided(SPEED),
    "use_kv_cache": Decided("sampling has its own"),
    "low_cpu_mem_usage": Decided("weights are loaded once, file by file"),
    "use_fast_tokenizer": Decided("read from the model"),
    "upcast_layernorm": Decided(PRECISION),
    "upcast_lmhead_output": Decided("log-probs are computed in float32"),
    "quantization_method": Without("bitsandbytes alone: `model.load_in_4bit`, `model.load_in_8bit`"),
    "quantization_device_map": Without("see `model.device_map`, as transformers takes it"),
    "rope_scaling": Without("the model's own positions are kept"),
    "shift_attn": Without("the model's own attention is kept"),
    "resize_vocab": Without("the tokens are the model's own; see `model.chat_template`"),
    "add_tokens": Without("the tokens are the model's own; see `model.chat_template`"),
    "add_special_tokens": Without("the tokens are the model's own; see `model.chat_template`"),
    "create_new_adapter": Without("merge the first adapter, and name the merged model in `model.name`"),
    "ref_model": Without(REFERENCE),
    "ref_model_adapters": Without(REFERENCE),
    "ref_model_quantization_bit": Without(REFERENCE),
    "loraplus_lr_ratio": Without("one learning rate for all that is trained"),
    "pissa_init": Without("adapters begin as peft's own default does"),
    "use_galore": Without(GALORE),
    "use_apollo": Without(GALORE),
    "use_badam": Without(GALORE),
    "use_adam_mini": Without(GALORE),
    "use_muon": Without(GALORE),
    "use_swanlab": Without("prefold reports to wandb and tensorboard"),
    "ray_run_name": Without("`prefold run RECIPE --nproc N` uses N GPUs"),
    "export_dir": Decided("the merged model is in `merged/`, and goes where `publish` says"),
    "cache_dir": Without("set HF_HOME in the shell"),
    "hf_hub_token": Without("`hf auth login` or HF_TOKEN; remove it from the file"),
}
_LORA: Table = {
    "lora_rank": To("lora.r"),
    "lora_alpha": LORA["lora_alpha"],
    "lora_dropout": LORA["lora_dropout"],
    "lora_target": To("lora.target_modules", modules),
    "additional_target": To("lora.modules_to_save", listed),
    "use_rslora": LORA["use_rslora"],
    "use_dora": LORA["use_dora"],
}
_BASE: dict[str, Any] = {
    "train.learning_rate": 5e-5,
    "train.num_train_epochs": 3,
    "train.lr_scheduler_type": "linear",
    "train.warmup_steps": 0,
    "train.gradient_checkpointing": True,
    "data.max_length": 2048,
}


def write(draft: Draft, where: str, method: str | None) -> None:
    """Fill the draft from a LLaMA-Factory file."""
    stage = _stage(draft, where, method)
    _write_losses(draft, where, stage)
    chosen = draft.values["method"]
    _write_quantised(draft)
    _write_adapter(draft, drops_dropout=stage != "rm")
    write_dtype(draft, "bf16", "fp16", "pure_bf16", "infer_dtype")
    _write_data(draft)
    write_batch(draft, ("per_device_train_batch_size", 8), ("gradient_accumulation_steps", 1), chosen)
    write_steps(draft)
    write_trackers(draft)
    write_publish(draft)
    draft.follow({"num_train_epochs": TABLE["num_train_epochs"]})
    write_evaluation(draft, chosen)
    draft.follow(TABLE)
    for field, value in _BASE.items():
        draft.fill(field, value)


def _stage(draft: Draft, where: str, method: str | None) -> str:
    stage = str(draft.take("stage", "sft"))
    if stage in ("pt", "sft"):
        raise UserError(
            f"a file for {'pre-training' if stage == 'pt' else 'supervised fine-tuning'}, `stage: {stage}`",
            where=where,
            expected="one that aligns with preferences, which is what prefold does: stage: " + " | ".join(STAGES),
            advice="with pairs, `method: orpo` does both at once; `method: sft` trains on their chosen answers",
        )
    if stage not in STAGES:
        hint = "GRPO does PPO's job without a value model: `prefold recipes smolgrpo`" if stage == "ppo" else ""
        raise UserError(
            f"`stage: {stage}` has no counterpart in prefold", where=where, expected=" | ".join(STAGES), advice=hint
        )
    if method not in (None, stage):
        raise UserError(f"`--method {method}`, and the file says `stage: {stage}`", where=where, advice="leave it out")
    return stage


def _write_losses(draft: Draft, where: str, stage: str) -> None:
    settings = {"beta": "pref_beta"}
    if stage == "kto":
        settings |= {"desirable_weight": "kto_chosen_weight", "undesirable_weight": "kto_rejected_weight"}
    if stage != "dpo":
        write_losses(draft, [Loss(STAGES[stage])], settings, {"beta": 0.1}, ["stage"])
        return
    loss = known_loss(draft.look("pref_loss", "sigmoid"), LOSSES, "pref_loss", where)
    losses, keys = [loss], ["stage", *(["pref_loss"] if draft.has("pref_loss") else [])]
    # With BCO beside it, their sum is divided by the sum of their weights.
    if is_number(share := draft.look("pref_bco_weight", 0)) and share > 0:
        losses = [Loss(loss.method, loss.settings, 1 / (1 + share)), Loss("bco", weight=share / (1 + share))]
    if is_number(weight := draft.look("pref_ftx", 0)) and weight > 0:
        losses.append(Loss("sft", weight=weight))
    for key in filter(draft.has, ["pref_bco_weight", "pref_ftx"]):
        if draft.look(key):
            keys.append(key)
        else:
            draft.note("off", key)
    settings |= {"label_smoothing": "dpo_label_smoothing", "simpo_gamma": "simpo_gamma", "ld_alpha": "ld_alpha"}
    write_losses(draft, losses, settings, {"beta": 0.1, "simpo_gamma": 0.5}, keys)


def _write_quantised(draft: Draft) -> None:
    bits = draft.take("quantization_bit")
    fours: Table = {
        "quantization_type": To("model.bnb_4bit_quant_type"),
        "double_quantization": To("model.bnb_4bit_use_double_quant"),
    }
    if bits == 4:
        draft.carry("model.load_in_4bit", True, "quantization_bit")
        draft.follow(fours)
        draft.fill("model.bnb_4bit_quant_type", "nf4")
        draft.fill("model.bnb_4bit_use_double_quant", True)
        return
    for key in filter(draft.has, list(fours)):
        draft.note("off", key)
    if bits == 8:
        draft.carry("model.load_in_8bit", True, "quantization_bit")
    elif bits is not None:
        draft.note("missing", "quantization_bit", text=f"{bits}: weights are held in 4 or 8 bits, or as they are")


def _write_adapter(draft: Draft, drops_dropout: bool) -> None:
    kind = draft.take("finetuning_type", "lora")
    if kind == "full":
        draft.note("renamed", "finetuning_type", text="lora: none, which trains all weights")
        draft.values["lora"] = "none"
        for key in filter(draft.has, list(_LORA)):
            draft.note("off", key)
        return
    if kind != "lora":
        draft.note("missing", "finetuning_type", text=f"{kind}: LoRA is trained instead")
    elif "finetuning_type" in draft.given:
        draft.note("renamed", "finetuning_type", text="a section `lora`")
    if draft.has("adapter_name_or_path"):
        _write_start(draft)
        return
    draft.follow(_LORA)
    draft.fill("lora.r", 8)
    if is_number(rank := draft.values["lora.r"]):
        draft.fill("lora.lora_alpha", 2 * rank, "twice the rank")
    draft.fill("lora.lora_dropout", 0.0)
    draft.fill("lora.target_modules", "all-linear")
    if drops_dropout:
        without_dropout(draft, NAME)


def _write_start(draft: Draft) -> None:
    """An adapter to go on from brings its own settings."""
    names = listed(draft.take("adapter_name_or_path"))
    draft.carry("model.adapter", names[0], "adapter_name_or_path", comment="it brings its own LoRA settings")
    if len(names) > 1:
        text = f"{', '.join(map(str, names[1:]))}: one adapter only; merge the others into the model first"
        draft.note("missing", "adapter_name_or_path", text=text)
    for key in filter(draft.has, list(_LORA)):
        draft.note("decided", key, text="the adapter brings its own")


def _write_data(draft: Draft) -> None:
    counts = draft.take("max_samples")
    weights = listed(draft.take("interleave_probs")) if draft.has("interleave_probs") else []
    for key, field in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        if not draft.has(key):
            continue
        names = listed(draft.take(key))
        sources: list[dict[str, Any]] = [{"path": name} for name in names]
        for source in sources if counts and not weights else []:
            source["count"] = counts
        for source, weight in zip(sources, weights, strict=False):
            source["weight"] = parse_yaml(weight, key) if isinstance(weight, str) else weight
        bare = [str(name) for name in names if "/" not in str(name) and not Path(str(name)).suffix]
        draft.carry(field, sources, key, comment=f"{', '.join(bare)} {IN_INFO}" if bare else "")
    if counts is not None and weights:
        draft.note("missing", "max_samples", text="a source has a `weight` or a `count`, not both")
    elif counts is not None:
        draft.note("renamed", "max_samples", text="`count` of each source, which must have that many rows")
    if weights:
        draft.note("renamed", "interleave_probs", text="`weight` of each source")
    if draft.has("mix_strategy"):
        draft.note("decided", "mix_strategy", text="no row is repeated: the largest mixture that keeps the weights")
    need_data(draft, "the file names no data set")
    if draft.has("val_size"):
        _write_fraction(draft)


def _write_fraction(draft: Draft) -> None:
    size = draft.take("val_size")
    if not size or "data.eval" in draft.values:
        draft.note("off", "val_size")
    elif not is_number(size) or size < 1:
        draft.carry("data.eval_fraction", size, "val_size")
    else:
        draft.note("missing", "val_size", text="`data.eval_fraction` is a share of the rows, below 1")
