"""LoRA: fresh adapters, adapters from a folder to train further or to merge, and the model that training starts
from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prefold.errors import UserError, first_line
from prefold.files import without_home
from prefold.models.chat_format import vocabulary_rows
from prefold.models.load import load_model
from prefold.models.messages import UNREADABLE, quiet
from prefold.models.score_head import unshard_head
from prefold.models.tokenizer import chat_tokens
from prefold.recipe import Lora, Model
from prefold.trees.attention import widened
from prefold.trees.fused_layers import fuse_lora, fuse_trained_rows
from prefold.trees.head import SCORE, score_layer
from prefold.trees.scorer import freeze_reference

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@contextmanager
def _whole_shapes() -> Iterator[None]:
    """While open, peft gives LoRA of a sharded layer the shape of the whole layer. It takes a mesh of two dimensions
    for tensor parallelism's, where a layer computes with its part alone."""
    before = LoraLayer._get_in_out_features

    def shape_of(self: LoraLayer, module: nn.Module) -> Any:
        linear = isinstance(module, nn.Linear)
        return (module.in_features, module.out_features) if linear else before(self, module)

    LoraLayer._get_in_out_features = shape_of  # type: ignore[method-assign]
    try:
        yield
    finally:
        LoraLayer._get_in_out_features = before  # type: ignore[method-assign]


@_whole_shapes()
def load_policy(
    section: Model,
    lora: Lora | None,
    seed: int,
    head_seed: int | None = None,
    shards: int = 1,
    contents: bool = True,
) -> PeftModel:
    """The model to train: quantised if the section says so, with fresh LoRA weights, which every process holds whole,
    or with the adapter that it names, which has its own settings. The other arguments: see `load_model`."""
    model = load_model(section, quantised=True, head_seed=head_seed, shards=shards, contents=contents)
    if shards > 1 and contents:
        unshard_head(model)
    if section.adapter is None:
        with nullcontext() if contents else torch.device("meta"):
            return add_lora(model, lora or Lora(), seed, chat_tokens(section))
    policy = open_adapter(model, Path(section.adapter).expanduser(), is_trainable=True)
    ready_to_train(policy)
    if section.reference is None:
        freeze_reference(policy)
    return policy


def load_start(section: Model, *, dtype: str | None = None) -> PreTrainedModel:
    """The unquantised model that training starts from: the base, with the adapter that the section names merged in."""
    model = load_model(section, dtype=dtype)
    if section.adapter is None:
        return model
    with quiet():
        merged = cast(Any, open_adapter(model, Path(section.adapter).expanduser())).merge_and_unload()
    return cast(PreTrainedModel, merged.eval())


# ---- fresh weights ------------------------------------------------------------------------------------------------


def add_lora(model: PreTrainedModel, lora: Lora, seed: int, tokens: Sequence[int] = ()) -> PeftModel:
    """Add fresh LoRA weights to a model: float32, the same for the same seed, a no-op before the first step. A score
    head is trained in full.

    Args:
        tokens: ids whose rows in the embeddings and the head are trained as well.

    Raises:
        UserError: `target_modules` or `modules_to_save`, or one of their names, matches no module of the model.
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
        modules_to_save=[*lora.modules_to_save] or None,  # peft adds a score head itself
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
            if "target" in str(error).lower():
                raise _no_target(model, f"{lora.target_modules!r} cannot be adapted: {first_line(error)}") from None
            if "lora_dropout" in str(error):  # stacked weights have no input of their own to drop from
                what = f"there is no dropout for LoRA on the experts of a {model.config.model_type} model"
                raise UserError(what, where="`lora.lora_dropout`", expected="0") from None
            raise UserError(f"cannot be put on the model: {first_line(error)}", where="`lora`") from None
    ready_to_train(adapted)
    return adapted


def ready_to_train(adapted: PeftModel) -> None:
    """Convert trained weights to float32 (copies of whole modules may be in half precision), and install the fast
    forward passes. Raises UserError: DoRA over 8-bit weights on a CPU, where dequantising breaks them, or LoRA on a
    matrix that a merge would change at both ends of the model."""
    settings = cast(LoraConfig, adapted.peft_config["default"])
    _require_mergeable(adapted)
    if settings.use_dora and getattr(adapted, "is_loaded_in_8bit", False) and adapted.device.type == "cpu":
        advice = "take `load_in_4bit`, or LoRA without DoRA"
        what = "DoRA over 8-bit weights cannot be computed on a CPU"
        raise UserError(what, where="`model.load_in_8bit`", advice=advice)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = widened(parameter.data)
    fuse_lora(adapted)
    fuse_trained_rows(adapted)


def _require_mergeable(adapted: PeftModel) -> None:
    """If embeddings and head are one matrix, LoRA of one of them would be merged into both (peft issue 2972)."""
    base = cast(PreTrainedModel, adapted.get_base_model())
    if score_layer(base) is not None or not base.config.get_text_config().tie_word_embeddings:
        return
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    if name := next(
        (name for name, module in base.named_modules() if isinstance(module, LoraLayer) and module in ends), ""
    ):
        short = name.split(".")[-1]
        what = f"`{short}` shares its matrix with the other end of the model, and LoRA of one end cannot be merged"
        advice = f"leave it out, or train the matrix whole: `lora.modules_to_save: [{short}]`"
        raise UserError(what, where="`lora.target_modules`", advice=advice)


def _rows_to_train(model: PreTrainedModel, lora: Lora, tokens: Sequence[int]) -> dict[str, list[int]]:
    """The rows that peft is to train, by module; none of a matrix that is trained in full."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if any(module is layer for layer in layers)]
    whole = [name for name in names if any(_ends_with(name, saved) for saved in lora.modules_to_save)]
    if whole and model.config.get_text_config().tie_word_embeddings:
        return {}
    return {name: list(tokens) for name in names if tokens and name not in whole}


def _ends_with(name: str, wanted: str) -> bool:
    """Whether peft would match a module of this name."""
    return f".{name}".endswith(f".{wanted}")


def _require_targets(model: nn.Module, targets: str | list[str]) -> None:
    """Raises UserError: a name in `targets` matches no module. peft complains only if none of them does."""
    if targets == "all-linear":
        return
    names = [name for name, _ in model.named_modules()]
    if isinstance(targets, str):
        try:
            missing = [] if any(re.fullmatch(targets, name) for name in names) else [targets]
        except re.error as error:
            raise _no_target(model, f"{targets!r} is not a regular expression: {error}") from None
    else:
        missing = [target for target in targets if not any(_ends_with(name, target) for name in names)]
    if missing or not targets:
        raise _no_target(model, f"no module of the model is called {', '.join(map(repr, missing)) or 'nothing'}")


def _no_target(model: nn.Module, what: str) -> UserError:
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D))
    names = sorted({name.split(".")[-1] for name in linear})
    return UserError(what, where="`lora.target_modules`", expected=f"all-linear, or some of {', '.join(names)}")


def _require_modules(model: nn.Module, lora: Lora) -> None:
    """Raises UserError: a name in `modules_to_save` matches no module, or one whose weights cannot be trained."""
    modules = dict(model.named_modules())
    for wanted in lora.modules_to_save:
        meant = [module for name, module in modules.items() if _ends_with(name, wanted)]
        if not meant:
            known = sorted({name.split(".")[-1] for name in modules if name and not name.split(".")[-1].isdigit()})
            what, expected = f"no module of the model is called {wanted!r}", f"some of {', '.join(known)}"
            raise UserError(what, where="`lora.modules_to_save`", expected=expected)
        if not all(weight.is_floating_point() for module in meant for weight in module.parameters()):
            what = f"{wanted!r} is quantised, and quantised weights cannot be trained whole"
            raise UserError(what, where="`lora.modules_to_save`", expected="embeddings, head or norms")


# ---- from a folder ------------------------------------------------------------------------------------------------


def open_adapter(model: PreTrainedModel, folder: Path, *, is_trainable: bool = False) -> PeftModel:
    """Load the LoRA adapter of a folder onto its base.

    Raises:
        UserError: there is none, it is not LoRA as safetensors, it was made for another base, or has no score head for
            a model that scores conversations.
    """
    where = without_home(str(folder))
    config = _config_of(folder, where)
    _require_same_base(config, model, where)
    if score_layer(model) is not None and SCORE not in (config.get("modules_to_save") or ()):
        advice = "merge it, and train a reward model on the merged model"
        raise UserError("has no score head", where=where, expected="an adapter of a reward model", advice=advice)
    reason = ""
    try:
        with quiet():
            no_contents = model.device.type == "meta"
            adapted = PeftModel.from_pretrained(
                model,
                str(folder),
                is_trainable=is_trainable,
                torch_device="cpu" if no_contents else str(model.device),
                low_cpu_mem_usage=no_contents,
            )
            wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        with safe_open(folder / WEIGHTS, "pt") as file:
            stored = set(file.keys())
        if missing := wanted - stored:
            reason = f"it lacks {len(missing)} tensors, e.g. {min(missing)}"
        elif unknown := stored - wanted:
            reason = f"it holds {len(unknown)} tensors without a place, e.g. {min(unknown)}"
    except (*UNREADABLE, AttributeError) as error:
        # After a title, torch has a line for each tensor of another shape.
        reason = " ".join(str(error).splitlines()[1].split()) if "size mismatch" in str(error) else first_line(error)
    if reason:
        what = f"does not fit the model `{model.name_or_path}`: {reason}"
        raise UserError(what, where=where, expected="an adapter that was trained on this model")
    return adapted


def _config_of(folder: Path, where: str) -> dict[str, Any]:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            what = f"is not an adapter folder: {name} is missing"
            raise UserError(what, where=where, expected=f"{CONFIG} and {WEIGHTS}, e.g. a run's `adapter/`")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (ValueError, KeyError, TypeError):
        expected = "what peft's `save_pretrained` writes"
        raise UserError(f"{CONFIG} cannot be read", where=where, expected=expected) from None
    if kind != "LORA":
        raise UserError(f"is an adapter of kind {kind}", where=where, expected="a LoRA adapter")
    return cast("dict[str, Any]", config)


def _require_same_base(config: dict[str, Any], model: PreTrainedModel, where: str) -> None:
    """Raises UserError: the adapter names another base, or trains tokens beyond the vocabulary. Folders of bases do not
    count."""
    named = str(config.get("base_model_name_or_path") or "").rstrip("/")
    if named and Path(named).name.lower() != Path(str(model.name_or_path)).name.lower():
        what = f"is an adapter of `{without_home(named)}`, not of `{model.name_or_path}`"
        advice = f"name its base in `model.name`; if they are the same, correct `base_model_name_or_path` in {CONFIG}"
        raise UserError(what, where=where, advice=advice)
    tokens = config.get("trainable_token_indices") or []
    largest = max((max(ids) for ids in (tokens.values() if isinstance(tokens, dict) else [tokens]) if ids), default=0)
    if largest >= vocabulary_rows(model):
        what = f"trains token {largest}, which the vocabulary of the model does not have"
        raise UserError(what, where=where, advice="set `model.chat_template` as it was when the adapter was made")
