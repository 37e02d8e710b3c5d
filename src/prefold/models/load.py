"""Base model, tokenizer, dtype, attention, fresh LoRA weights."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.pytorch_utils import Conv1D

from prefold import ranks
from prefold.errors import UserError
from prefold.files import without_home
from prefold.models.chat_format import fit_vocabulary, set_chat_format
from prefold.models.fetch import fetch
from prefold.models.quantised import prepare_quantised, quantisation
from prefold.models.score_head import set_up_head
from prefold.recipe import Lora, Model
from prefold.trees.fused_lora import fuse_lora
from prefold.trees.head import score_layer
from prefold.trees.trained_rows import fuse_trained_rows

VOCABULARY_FILES = ("tokenizer.json", "vocab.*", "*.model*", "*.tiktoken", "tekken.json")
"""Without any of these transformers can make an empty tokenizer of the class that tokenizer_config.json names."""

UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    RuntimeError,
    ImportError,
    SafetensorError,
    StrictDataclassError,
)
"""What transformers raises for a folder that is not a sound model: each kind of file has a reader of its own."""


def choose_device() -> torch.device:
    """Where to compute; of several GPUs, the one that the launcher gave this process."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(rank)) if (rank := os.environ.get("LOCAL_RANK")) else torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_dtype(setting: str, device: torch.device) -> torch.dtype:
    """The dtype that a recipe's `auto` means on a device: what it computes in natively."""
    if setting != "auto":
        chosen: torch.dtype = getattr(torch, setting)
        return chosen
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32
    return torch.float32


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' progress bars and advice out of the terminal; errors still raise."""
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; a missing pad token becomes the end token, in memory only.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if not any(any(folder.glob(pattern)) for pattern in VOCABULARY_FILES):
        what = "the model folder has no tokenizer"
        raise UserError(what, where=folder.name, expected=f"a file like {', '.join(VOCABULARY_FILES)}")
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain `Exception` for a file that it cannot read
        raise explained("its tokenizer cannot be loaded", error, folder.name) from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_of(section: Model) -> PreTrainedTokenizerBase:
    """The tokenizer of a model as a recipe names it, with the chat format that it is to learn."""
    return _tokenizer_and_tokens(section)[0]


def chat_tokens(section: Model) -> list[int]:
    """Ids of the tokens of a new chat format, whose rows of the embeddings are trained."""
    return _tokenizer_and_tokens(section)[1] if section.chat_template else []


def _tokenizer_and_tokens(section: Model) -> tuple[PreTrainedTokenizerBase, list[int]]:
    tokenizer = load_tokenizer(fetch(section.name, section.revision, weights=False))
    return tokenizer, set_chat_format(tokenizer, section.chat_template) if section.chat_template else []


def load_model(
    section: Model,
    *,
    dtype: str | None = None,
    quantised: bool = False,
    head_seed: int | None = None,
    sharded: bool = False,
) -> PreTrainedModel:
    """The base model on its device, in eval mode, with the attention of the plain path; no adapter on it.

    Args:
        section: which model and how.
        dtype: instead of the section's.
        quantised: with weights in the 4 or 8 bits that the section asks for; without this they are whole.
        head_seed: given, the model scores conversations: a sequence classifier with one label, whose head, if the files
            hold none, is drawn by this seed.
        sharded: each process loads and keeps its part of every weight (FSDP2); all of them must call this.

    Raises:
        UserError: the model cannot be had, is quantised already, needs code of its own, or its weights do not fit its
        configuration.
    """
    folder = fetch(section.name, section.revision)
    device = choose_device()
    chosen = choose_dtype(dtype or section.dtype, device)
    bits = quantisation(section, chosen) if quantised else None
    try:
        with quiet():
            labels = {} if head_seed is None else {"num_labels": 1}
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **labels)
            _require_whole_weights(config, section.name)
            kind: Any = AutoModelForCausalLM if head_seed is None else AutoModelForSequenceClassification
            model, report = kind.from_pretrained(
                folder,
                config=config,
                dtype=chosen,
                attn_implementation=plain_attention(section.attn_implementation, config),
                device_map=({"": device} if bits and not section.device_map else section.device_map),
                quantization_config=bits,
                distributed_config=DistributedConfig(fsdp_size=ranks.processes()) if sharded else None,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # `_require_complete` names them
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except UNREADABLE as error:
        raise explained("cannot be loaded", error, section.name) from None
    if head_seed is not None:
        report = set_up_head(model, report, head_seed, section.name)
    _require_complete(report, section.name)
    placed: PreTrainedModel = model if section.device_map or bits or sharded else model.to(device)
    if section.chat_template:
        known = len(load_tokenizer(folder))
        with quiet():
            fit_vocabulary(placed, tokenizer_of(section), known)
    if bits:
        prepare_quantised(placed)
    # What adapters and merged models name as their base: the model's own name, not a folder of this machine.
    placed.name_or_path = placed.config.name_or_path = without_home(section.name)
    without_dropout(placed)
    widen_residuals(placed)
    placed.eval()
    return placed


def _require_whole_weights(config: Any, name: str) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            "its weights are stored quantised, and an adapter cannot be merged into them",
            where=name,
            expected="the unquantised model",
            advice="name that one; `model.load_in_4bit: true` quantises it for training",
        )


def widen_residuals(model: nn.Module) -> None:
    """Under autocast, keep the stream between the layers in float32, as it is beside float32 weights.

    Rounding it in every layer is what moves log-probs most: over 600 tokens, by twice as much as the products do.
    """

    def widened(module: nn.Module, inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        return embedded.float() if torch.is_autocast_enabled(embedded.device.type) else embedded

    model.get_input_embeddings().register_forward_hook(widened)  # type: ignore[operator]


def without_dropout(model: torch.nn.Module) -> None:
    """Switch a model's own dropout off, as TRL does: a loss that compares two passes wants one function, not two draws.

    Its configuration keeps the values; a dropout that the recipe gives to LoRA is added later and stays.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)


def plain_attention(setting: str, config: Any) -> str | None:
    """The attention of the plain path: what the recipe says; eager where the model has a soft-cap, which sdpa would
    leave out; else None, which is sdpa for every model that can take it."""
    if setting in ("sdpa", "eager"):
        return setting
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None


def _require_complete(report: dict[str, Any], name: str) -> None:
    """Every tensor of the model came from its files, and none of theirs was left over."""
    mismatched = [str(entry[0]) for entry in report.get("mismatched_keys", ())]
    for keys, problem in (
        (report.get("missing_keys", ()), "lack {count} tensors that its configuration calls for"),
        (mismatched, "have another shape than its configuration says for {count} tensors"),
        (report.get("unexpected_keys", ()), "hold {count} tensors that its configuration has no place for"),
    ):
        if keys:
            raise UserError(
                f"its weights {problem.format(count=len(keys))}, e.g. {min(keys)}",
                where=name,
                advice="the download may be incomplete, or the config.json of another model",
            )


def explained(what: str, error: Exception, where: str) -> UserError:
    if "trust_remote_code" in str(error):
        return UserError(
            f"{what}: it needs Python code of its own, which prefold does not run",
            where=where,
            expected="an architecture that transformers knows",
        )
    return UserError(f"{what}: {first_line(error)}", where=where)


def add_lora(model: PreTrainedModel, lora: Lora, seed: int, tokens: Sequence[int] = ()) -> PeftModel:
    """Put fresh LoRA weights on a model: float32, the same for the same seed, a no-op before the first step. A head
    that gives scores is trained whole.

    Args:
        tokens: ids whose rows in the embeddings and the head are trained as well.

    Raises:
        UserError: `target_modules` or `modules_to_save`, or one of their names, fits no module of the model.
    """
    _require_targets(model, lora.target_modules)
    _require_modules(model, lora)
    scores = score_layer(model) is not None
    tied = bool(model.config.get_text_config().tie_word_embeddings) and not scores
    config = LoraConfig(
        task_type="SEQ_CLS" if scores else "CAUSAL_LM",
        r=lora.r,
        lora_alpha=cast(int, lora.lora_alpha),  # peft only divides it by r: any number will do
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=[*lora.modules_to_save] or None,  # peft adds the head to it, if that gives scores
        ensure_weight_tying=tied and bool(lora.modules_to_save),
        trainable_token_indices=_rows_to_train(model, lora, tokens) or None,
    )
    with quiet(), torch.random.fork_rng(range(torch.cuda.device_count()), device_type="cuda"):
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, config)
        except (ValueError, TypeError) as error:
            if "trainable_token_indices" in str(error):
                what = "the embeddings and the head cannot get LoRA weights beside `model.chat_template`"
                advice = "leave them out, or train them whole by `lora.modules_to_save`"
                raise UserError(what, where="`lora.target_modules`", advice=advice) from None
            if "target" not in str(error).lower():
                raise
            raise _no_target(model, f"{lora.target_modules!r} cannot be adapted: {first_line(error)}") from None
    ready_to_train(adapted)
    return adapted


def ready_to_train(adapted: PeftModel) -> None:
    """Keep what is trained in float32, which half-precision copies of whole modules are not, and compute it fast.

    Raises:
        UserError: DoRA over 8-bit weights on a CPU, where unpacking them breaks them.
    """
    settings = cast(LoraConfig, adapted.peft_config["default"])
    if settings.use_dora and getattr(adapted, "is_loaded_in_8bit", False) and adapted.device.type == "cpu":
        advice = "take `load_in_4bit`, or LoRA without DoRA"
        raise UserError(
            "DoRA over 8-bit weights cannot be computed on a CPU", where="`model.load_in_8bit`", advice=advice
        )
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    fuse_lora(adapted)
    fuse_trained_rows(adapted)


def _rows_to_train(model: PreTrainedModel, lora: Lora, tokens: Sequence[int]) -> dict[str, list[int]]:
    """By module, the rows that peft is to train; a matrix that is trained as a whole needs none."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if any(module is layer for layer in layers)]
    whole = [name for name in names if any(f".{name}".endswith(f".{saved}") for saved in lora.modules_to_save)]
    if whole and model.config.get_text_config().tie_word_embeddings:
        return {}
    return {name: list(tokens) for name in names if tokens and name not in whole}


def _require_targets(model: nn.Module, targets: str | list[str]) -> None:
    """Every name in `targets` fits some module: peft only minds when none of them does."""
    if targets == "all-linear":
        return
    names = [name for name, _ in model.named_modules()]
    if isinstance(targets, str):
        try:
            found = any(re.fullmatch(targets, name) for name in names)
        except re.error as error:
            raise _no_target(model, f"{targets!r} is not a regular expression: {error}") from None
        missing = [] if found else [targets]
    else:
        missing = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if missing or not targets:
        raise _no_target(model, f"no module of the model is called {', '.join(map(repr, missing)) or 'nothing'}")


def _require_modules(model: nn.Module, lora: Lora) -> None:
    """Every name in `modules_to_save` fits some module, and its weights can be trained."""
    modules = dict(model.named_modules())
    for wanted in lora.modules_to_save:
        meant = [module for name, module in modules.items() if f".{name}".endswith(f".{wanted}")]
        if not meant:
            known = sorted({name.split(".")[-1] for name in modules if name and not name.split(".")[-1].isdigit()})
            what, expected = f"no module of the model is called {wanted!r}", f"some of {', '.join(known)}"
            raise UserError(what, where="`lora.modules_to_save`", expected=expected)
        if not all(weight.is_floating_point() for module in meant for weight in module.parameters()):
            what = f"{wanted!r} is quantised, and quantised weights cannot be trained whole"
            raise UserError(what, where="`lora.modules_to_save`", expected="embeddings, head or norms")


def _no_target(model: nn.Module, what: str) -> UserError:
    linear = (part for part in model.named_modules() if isinstance(part[1], nn.Linear | Conv1D))
    names = sorted({name.split(".")[-1] for name, _ in linear})
    return UserError(what, where="`lora.target_modules`", expected=f"all-linear, or some of {', '.join(names)}")


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters are trained, and how many there are; tied weights count once, quantised ones unpacked."""
    trainable, total = 0, 0
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)
        count = state.shape.numel() if state is not None else weight.numel()
        total += count
        trainable += count if weight.requires_grad else 0
    return trainable, total


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
