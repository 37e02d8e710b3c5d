"""A model as its configuration describes it: all shapes, no weights. Nothing is downloaded and nothing allocated.

It is put together by the same functions as the real one, on torch's meta device, so that what is trained and what is
quantised need no formulas by model family. For a pass its tensors become fake ones, which claim to be on a device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prefold.launch import launched
from prefold.models.adapters import add_lora, ready_to_train
from prefold.models.chat_format import MULTIPLE
from prefold.models.fetch import fetch
from prefold.models.load import chat_tokens, plain_attention, tokenizer_of, widen_residuals, without_dropout
from prefold.models.messages import UNREADABLE, quiet, unreadable
from prefold.recipe import Lora, Model, RecipeBase
from prefold.trees.attention import lower_right, unwrapped

BLOCK = 64
"""Weights that share a scale in 4 bits."""
BLOCK_OF_SCALES = 256
"""Scales that share one of their own, where scales are quantised too."""


@dataclass(frozen=True)
class Blueprint:
    """What is to be trained, and how.

    `config` is of the model; `dtype` what is computed in. With `lora: none` the weights are kept in float32.
    """

    recipe: RecipeBase
    config: Any
    dtype: torch.dtype

    @property
    def layers(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)

    @property
    def shards(self) -> int:
        """Processes that share the weights out among themselves, as far as they have been started."""
        return launched() if self.recipe.train.fsdp else 1

    @property
    def weights_dtype(self) -> torch.dtype:
        return torch.float32 if self.recipe.lora == "none" else self.dtype

    def policy(self, layers: int | None = None) -> nn.Module:
        """The model to train, of so many layers (unset: all of its own), on the meta device."""
        section, lora = self.recipe.model, self.recipe.lora
        base = empty_model(with_layers(self.config, layers), self.weights_dtype, section)
        if lora == "none":
            return base
        if section.load_in_4bit or section.load_in_8bit:
            for layer in quantised_layers(base):
                layer.__class__ = StandIn
        with torch.device("meta"):
            if section.adapter is None:
                return add_lora(base, lora or Lora(), self.recipe.train.seed, self.new_tokens)
            settings = LoraConfig.from_pretrained(str(Path(section.adapter).expanduser()))
            settings.inference_mode = False
            with quiet():
                adapted = get_peft_model(base, cast(LoraConfig, settings))
            ready_to_train(adapted)
            return adapted

    def base(self, dtype: torch.dtype, layers: int | None = None) -> PreTrainedModel:
        """The whole model in a dtype, as it is merged and evaluated."""
        return empty_model(with_layers(self.config, layers), dtype, self.recipe.model)

    @cached_property
    def identity(self) -> str:
        """All that its passes depend on, beside their rows."""
        recipe = self.recipe
        adapter = recipe.model.adapter and LoraConfig.from_pretrained(str(Path(recipe.model.adapter).expanduser()))
        parts = (recipe.model, recipe.lora, recipe.algorithm, recipe.train.gradient_checkpointing, adapter, self.dtype)
        return f"{self.config.to_json_string(use_diff=False)} {parts!r}"

    @cached_property
    def new_tokens(self) -> list[int]:
        return chat_tokens(self.recipe.model)

    @cached_property
    def sizes(self) -> Sizes:
        return sizes_of(self.policy(), self.recipe)


@dataclass(frozen=True)
class Sizes:
    """`parameters` of the model without an adapter; `trained` ones; bytes of the frozen `weights` as they are kept
    (quantised or not), and of the `trained_bytes`; `linear`, parameters of the layers that every token meets in a
    product, `adapter_products` those of the adapter, `head` those of the vocabulary matrix."""

    parameters: int
    trained: int
    weights: int
    trained_bytes: int
    linear: int
    adapter_products: int
    head: int


def sizes_of(policy: nn.Module, recipe: RecipeBase) -> Sizes:
    base, names = unwrapped(policy), _lora_names(policy)
    quantised = {id(layer.weight): layer for layer in policy.modules() if isinstance(layer, StandIn)}
    parameters = list(policy.named_parameters())
    frozen = [value for name, value in parameters if not value.requires_grad]
    trained = [value for name, value in parameters if value.requires_grad]
    own = [value for name, value in parameters if name not in names]
    head = cast(Any, base.get_output_embeddings()).weight.numel()
    products = sum(value.numel() for name, value in parameters if name in names and value.ndim == 2)
    return Sizes(
        parameters=sum(value.numel() for value in own),
        trained=sum(value.numel() for value in trained),
        weights=sum(
            quantised_bytes(value, recipe.model) if id(value) in quantised else value.nbytes for value in frozen
        ),
        trained_bytes=sum(value.nbytes for value in trained),
        linear=sum(_met_by_a_token(value, base.config) for value in own if value.ndim > 1) - _vocabulary(base),
        adapter_products=products,
        head=head,
    )


def _lora_names(policy: nn.Module) -> set[str]:
    return {name for name, value in policy.named_parameters() if "lora_" in name or "trainable_tokens" in name}


def _vocabulary(base: PreTrainedModel) -> int:
    matrices = (cast(Any, layer()).weight for layer in (base.get_input_embeddings, base.get_output_embeddings))
    return int(sum({id(matrix): matrix.numel() for matrix in matrices}.values()))


def _met_by_a_token(weight: Tensor, config: Any) -> int:
    """Of a stack of experts, those that a token is sent to."""
    text = config.get_text_config()
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    if weight.ndim < 3 or not experts or weight.shape[0] != experts:
        return int(weight.numel())
    return int(weight.numel()) // int(experts) * int(getattr(text, "num_experts_per_tok", 1))


# ---- models without contents ------------------------------------------------------------------------------------


@contextmanager
def without_contents() -> Iterator[FakeTensorMode]:
    """While open, tensors have shapes and dtypes and nothing in them."""
    lower_right.cache_clear()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield mode
    finally:
        lower_right.cache_clear()  # else a mask without contents would be used in earnest


def fill(model: nn.Module) -> None:
    """Let the tensors of a model on the meta device claim to be on the CPU. To be called with `without_contents`
    open."""
    done: dict[int, Tensor] = {}

    def claimed(tensor: Tensor) -> Tensor:
        if id(tensor) not in done:
            found = torch.empty(tensor.shape, dtype=tensor.dtype)
            done[id(tensor)] = nn.Parameter(found, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else found
        return done[id(tensor)]

    for module in model.modules():
        for group in (module._parameters, module._buffers):
            group.update({name: claimed(tensor) for name, tensor in group.items() if tensor is not None})  # type: ignore[misc]


def config_of(section: Model) -> Any:
    """The configuration of a model, its vocabulary grown if it is to learn a chat format. Needs no weights.

    Raises:
        UserError: there is no such model, or its configuration cannot be read.
    """
    folder = fetch(section.name, section.revision, weights=False)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except UNREADABLE as error:
        raise unreadable("its configuration cannot be read", error, section.name) from None
    text = config.get_text_config()
    if section.chat_template and (tokens := len(tokenizer_of(section))) > text.vocab_size:
        text.vocab_size = -(-tokens // MULTIPLE) * MULTIPLE
    return config


def with_layers(config: Any, layers: int | None) -> Any:
    """A copy of a configuration with the first so many of its layers."""
    copied = copy.deepcopy(config)
    text = copied.get_text_config()
    if layers is not None:
        text.num_hidden_layers = layers
        if vars(text).get("layer_types"):  # of some it is derived from their number
            text.layer_types = text.layer_types[:layers]
    return copied


def empty_model(config: Any, dtype: torch.dtype, section: Model) -> PreTrainedModel:
    with quiet(), torch.device("meta"):
        model = cast(Any, AutoModelForCausalLM).from_config(
            config, dtype=dtype, attn_implementation=plain_attention(section.attn_implementation, config)
        )
    without_dropout(model)
    widen_residuals(model)
    return cast(PreTrainedModel, model.eval())


# ---- quantised layers -------------------------------------------------------------------------------------------


def quantised_layers(model: PreTrainedModel) -> list[nn.Linear]:
    """Those that bitsandbytes takes: every linear layer but the head."""
    head = model.get_output_embeddings()
    return [layer for layer in model.modules() if type(layer) is nn.Linear and layer is not head]


def quantised_bytes(weight: Tensor, section: Model) -> int:
    """A matrix with its scales: one for 64 weights in 4 bits, one for each row in 8."""
    if section.load_in_8bit:
        return weight.numel() + 4 * weight.shape[0]
    scales = -(-weight.numel() // BLOCK)
    return weight.numel() // 2 + (
        scales + 4 * -(-scales // BLOCK_OF_SCALES) if section.bnb_4bit_use_double_quant else 4 * scales
    )


class StandIn(nn.Linear):
    """A quantised layer as far as memory goes: its weights are unpacked for each product, and its inputs not saved."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out: Tensor = _Unpacked.apply(x, self.out_features)
        return out


class _Unpacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, columns: int) -> Tensor:
        ctx.shape = (columns, x.shape[-1])
        return x @ x.new_empty(ctx.shape).T

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        [grad] = grad_outputs
        return grad @ grad.new_empty(ctx.shape), None
