"""Loading a base model by the name that a recipe gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.core_model_loading import GLOBAL_WORKERS
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.pytorch_utils import Conv1D

from prefold import ranks
from prefold.device import choose_device, choose_dtype, is_half
from prefold.errors import UserError
from prefold.files import without_home
from prefold.models.chat_format import fit_vocabulary
from prefold.models.fetch import fetch, is_hub_id, require_safetensors_on_hub, weight_files
from prefold.models.gate import require_known_tokens, require_usable
from prefold.models.messages import quiet, reading
from prefold.models.quantised import UNPACKED, prepare_quantised, quantisation, quantise_in_pieces, quantised_bytes
from prefold.models.score_head import set_up_head
from prefold.models.tokenizer import has_tokenizer, load_tokenizer, tokenizer_of
from prefold.recipe import Model
from prefold.terminal import busy
from prefold.trees.memory import returning_allocations

LINEAR = (nn.Linear, Conv1D)
NOTHING_AMISS: dict[str, Any] = {"missing_keys": (), "unexpected_keys": (), "mismatched_keys": ()}
"""transformers' loading report for a model whose tensors are all there."""


def read_config(section: Model, folder: Path, **settings: Any) -> Any:
    """Raises UserError if the configuration in the folder cannot be read."""
    with reading("its configuration cannot be read", section.name):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **settings)


@returning_allocations()
def load_model(
    section: Model,
    *,
    dtype: str | None = None,
    quantised: bool = False,
    head_seed: int | None = None,
    shards: int = 1,
    contents: bool = True,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """The base model on its device, in eval mode, with the attention of the plain path; no adapter on it.

    Args:
        dtype: instead of the section's.
        quantised: with weights in 4 or 8 bits if the section says so; otherwise they are unquantised.
        head_seed: if given, the model scores conversations: a sequence classifier with one label, whose head is
            initialised with this seed if the files have none.
        shards: over how many processes every weight is divided (FSDP2). Each loads and keeps its part, and all of
            them must call this; if there are more of them, each group of so many holds a copy.
        contents: without them the model has shapes alone, on the meta device. It is refused for the same reasons, but
            no weight is read or downloaded.
        device: instead of the best available, or of the section's `device_map`.

    Raises:
        UserError: the model cannot be fetched, is of a kind that cannot be used, needs code of its own, lacks some of
            its weights, or has a tokenizer with tokens that it does not know.
    """
    folder = fetch(section.name, section.revision, weights=contents or not _on_hub(section))
    spread, device = None if device else section.device_map, device or choose_device()
    chosen = choose_dtype(dtype or section.dtype, device)
    bits = quantisation(section, chosen) if quantised else None
    scores = head_seed is not None
    kind: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    config = read_config(section, folder, **({"num_labels": 1} if scores else {}))
    require_usable(config, folder, section.name, scores)
    if has_tokenizer(folder) and not section.chat_template:
        require_known_tokens(config, load_tokenizer(folder), folder, section.name)
    attention = plain_attention(section.attn_implementation, config)
    settings: dict[str, Any] = {"config": config, "dtype": chosen, "attn_implementation": attention}
    if contents:
        if bits:
            quantise_in_pieces()
        placed = {"": device} if bits or (device.type != "cpu" and shards == 1) else None
        # With a device map each tensor goes from its file to its device; on the CPU, without a cast, it stays mapped.
        settings |= {"device_map": spread or placed, "quantization_config": bits}
        settings["distributed_config"] = _distribution(shards) if shards > 1 and not bits else None
        with busy(f"loading {without_home(section.name)}"):
            model, report = _from_files(kind, folder, section.name, settings)
    else:
        model, report = _shapes_alone(kind, folder, section, settings)
    if head_seed is not None:
        report = set_up_head(model, report, head_seed, section.name)
    _require_complete(report, section.name)
    if section.chat_template:
        with quiet():
            fit_vocabulary(model, tokenizer_of(section), known=len(load_tokenizer(folder)))
    if bits and contents:
        prepare_quantised(model)
        model = _divided(model, shards) if shards > 1 else model
    # What adapters and merged models name as their base: the model's own name, not a folder of this machine.
    model.name_or_path = model.config.name_or_path = without_home(section.name)
    return prepare_forward(model)


def _distribution(shards: int) -> DistributedConfig:
    copies = ranks.processes() // shards
    if copies > 1 and not hasattr(DistributedConfig, "dp_replicate_size"):
        what = f"needs transformers 5.23 or newer, and {transformers.__version__} is installed"
        raise UserError(what, where="`train.fsdp: hybrid`", advice="update it, or set `train.fsdp: true`")
    replicas: dict[str, Any] = {"dp_replicate_size": copies} if copies > 1 else {}
    return DistributedConfig(fsdp_size=shards, **replicas)


def _divided(model: Any, shards: int) -> Any:
    """A model that is loaded whole, sharded. transformers divides weights as it reads them: it would quantise each part
    of a weight, and take it for the whole."""
    if head := model.get_output_embeddings():
        head.weight = nn.Parameter(head.weight.data)  # tied weights are sharded apart, and tied again
    known = {layer: vars(layer.weight) for layer in model.modules() if hasattr(layer, "quant_state")}
    distribution, _, mesh = model.prepare_distribute_model(_distribution(shards))
    model = model.maybe_distribute_model(model, distribution, mesh)
    for layer, facts in known.items():
        vars(layer.weight).update(facts)  # peft reads them
    model.tie_weights()
    return model


def require_model(section: Model, head_seed: int | None = None) -> None:
    """Raises UserError: the model cannot be used, as far as that can be known without reading its weights."""
    load_model(section, head_seed=head_seed, contents=False)


def _on_hub(section: Model) -> bool:
    return is_hub_id(section.name) and not Path(section.name).expanduser().exists()


def _from_files(kind: Any, folder: Path, name: str, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A model with transformers' report about its tensors."""
    with reading("cannot be loaded", name):
        return kind.from_pretrained(  # type: ignore[no-any-return]
            folder,
            **settings,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # `_require_complete` names them
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )


def _shapes_alone(kind: Any, folder: Path, section: Model, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The same on the meta device, without contents; if the weights have not been fetched, by the configuration."""
    if weight_files(folder):
        return _from_files(kind, folder, section.name, {**settings, "device_map": {"": "meta"}})
    require_safetensors_on_hub(section.name, section.revision)
    with reading("cannot be loaded", section.name), torch.device("meta"):
        return kind.from_config(**settings), NOTHING_AMISS


def prepare_forward(model: PreTrainedModel) -> PreTrainedModel:
    """Prepare a model for every pass: in eval mode, without dropout of its own, and under autocast with the residual
    stream in float32, as it is with float32 weights.

    Rounding the stream in every layer changes log-probs most: over 600 tokens, by twice as much as the products do.
    """

    def widened(module: nn.Module, inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        return embedded.float() if torch.is_autocast_enabled(embedded.device.type) else embedded

    without_dropout(model)
    embeddings: Any = model.get_input_embeddings()
    if is_half(embeddings.weight.dtype):
        embeddings.register_forward_hook(widened)
    return cast(PreTrainedModel, model.eval())


def without_dropout(model: torch.nn.Module) -> None:
    """Switch a model's own dropout off, as TRL does: a loss that compares two passes needs the same function in both.

    Its configuration keeps the values; a dropout that the recipe gives to LoRA is added later and stays.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)


def plain_attention(setting: str, config: Any) -> str | None:
    """The attention of the plain path: what the recipe says; eager if the model has a soft-cap, which sdpa would leave
    out; else None, which is sdpa for every model that supports it. Raises UserError: sdpa for such a model."""
    is_capped = bool(getattr(config.get_text_config(), "attn_logit_softcapping", None))
    if is_capped and setting == "sdpa":
        what = "`model.attn_implementation` is sdpa, which would leave out the soft-cap of this model's attention"
        raise UserError(what, advice="take `trees` or `eager`")
    if setting in ("sdpa", "eager"):
        return setting
    return "eager" if is_capped else None


def _require_complete(report: dict[str, Any], name: str) -> None:
    """Raises UserError: the model's tensors and those of its files are not the same."""
    mismatched = [str(entry[0]) for entry in report.get("mismatched_keys", ())]
    for keys, problem in (
        (report.get("missing_keys", ()), "lack {count} tensors that its configuration calls for"),
        (mismatched, "have another shape than its configuration says for {count} tensors"),
        (report.get("unexpected_keys", ()), "hold {count} tensors that its configuration has no place for"),
    ):
        if keys:
            what = f"its weights {problem.format(count=len(keys))}, e.g. {min(keys)}"
            advice = "the download may be incomplete, or the config.json of another model"
            raise UserError(what, where=name, advice=advice)


def vocabulary_before(section: Model) -> tuple[int, int]:
    """Tokens of the tokenizer and rows of the vocabulary before a chat format is added."""
    folder = fetch(section.name, section.revision, weights=False)
    return len(load_tokenizer(folder)), read_config(section, folder).get_text_config().vocab_size


class Loading(NamedTuple):
    """Peak memory of loading in bytes: on the `host`, without mapped files, and on the `device`."""

    host: int
    device: int


def loading_peak(
    shapes: PreTrainedModel, section: Model, stored: torch.dtype, device: str, quantised: bool = False
) -> Loading:
    """Peak memory of `load_model`: the weights that stay, and temporary tensors.

    Args:
        shapes: the model from `load_model` without contents, in the dtype to be loaded.
        stored: dtype of the files.
        device: its type.
    """
    head, on_cpu = shapes.get_output_embeddings(), device == "cpu"
    quantised = quantised and (section.load_in_4bit or section.load_in_8bit)
    linear = {id(layer.weight) for layer in shapes.modules() if type(layer) in LINEAR and layer is not head}
    embedded = {id(layer.weight) for layer in (shapes.get_input_embeddings(), head) if layer is not None}
    known, rows = vocabulary_before(section) if section.chat_template else (0, 0)
    stays, temporary, cast_on_host = 0, [0], [0]
    for weight in shapes.parameters():
        if quantised and id(weight) in linear:
            stays += quantised_bytes(weight, section)
            temporary.append(weight.numel() * (UNPACKED[section.load_in_4bit] if on_cpu else stored.itemsize))
            continue
        fitted = bool(section.chat_template) and id(weight) in embedded
        grown = fitted and weight.shape[0] > rows
        stays += 0 if on_cpu and weight.dtype == stored and not grown else weight.nbytes
        if fitted:  # float32 copies of the known rows, for their mean and deviation; and the matrix as it was
            temporary.append(8 * weight[:known].numel() + (weight.nbytes if grown else 0))
        cast_on_host.append(weight.nbytes if weight.dtype != stored else 0)
    if on_cpu:
        return Loading(stays + max(temporary), 0)
    return Loading(GLOBAL_WORKERS * max(cast_on_host), stays + max(temporary))


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """The number of trained parameters and of all; tied weights count once, quantised ones by their original size."""
    trainable, total = 0, 0
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)
        count = state.shape.numel() if state is not None else weight.numel()
        total += count
        trainable += count if weight.requires_grad else 0
    return trainable, total
