"""Base model, tokenizer, dtype, attention, LoRA."""

# ruff: noqa: E402  (a logger must be quiet before peft is imported)

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

# Imported by peft, bitsandbytes warns of an optional CPU kernel that 4-bit training does without.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from prefold.errors import UserError
from prefold.files import without_home
from prefold.models.fetch import fetch
from prefold.recipe import Lora, Model
from prefold.trees.lora import fuse_lora

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
        raise _explained("its tokenizer cannot be loaded", error, folder.name) from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(section: Model, *, dtype: str | None = None) -> PreTrainedModel:
    """The unquantised base model on its device, in eval mode, with the attention of the plain path.

    Args:
        section: which model and how.
        dtype: instead of the section's.

    Raises:
        UserError: the model cannot be had, needs code of its own, or its weights do not fit its configuration.
    """
    folder = fetch(section.name, section.revision)
    device = choose_device()
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model, report = cast(Any, AutoModelForCausalLM).from_pretrained(
                folder,
                config=config,
                dtype=choose_dtype(dtype or section.dtype, device),
                attn_implementation=plain_attention(section.attn_implementation, config),
                device_map=section.device_map,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # `_require_complete` names them
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except UNREADABLE as error:
        raise _explained("cannot be loaded", error, section.name) from None
    _require_complete(report, section.name)
    placed: PreTrainedModel = model if section.device_map else model.to(device)
    # What adapters and merged models name as their base: the model's own name, not a folder of this machine.
    placed.name_or_path = placed.config.name_or_path = without_home(section.name)
    without_dropout(placed)
    widen_residuals(placed)
    placed.eval()
    return placed


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


def _explained(what: str, error: Exception, where: str) -> UserError:
    if "trust_remote_code" in str(error):
        return UserError(
            f"{what}: it needs Python code of its own, which prefold does not run",
            where=where,
            expected="an architecture that transformers knows",
        )
    return UserError(f"{what}: {_first_line(error)}", where=where)


def add_lora(model: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    """Put fresh LoRA weights on a model: float32, the same for the same seed, a no-op before the first step.

    Raises:
        UserError: `target_modules`, or one of its names, fits no module of the model that LoRA can adapt.
    """
    _require_targets(model, lora.target_modules)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=cast(int, lora.lora_alpha),  # peft only divides it by r: any number will do
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules,
    )
    with quiet(), torch.random.fork_rng(range(torch.cuda.device_count()), device_type="cuda"):
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            if "target" not in str(error).lower():
                raise
            raise _no_target(model, f"{lora.target_modules!r} cannot be adapted: {_first_line(error)}") from None
    fuse_lora(adapted)
    return adapted


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


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
