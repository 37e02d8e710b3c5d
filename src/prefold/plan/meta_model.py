"""A model as its configuration describes it: all shapes, no weights. No weight is downloaded or allocated.

It is built by the same functions as the real one, on torch's meta device, so that no formula by model family is needed
for what is trained and what is quantised. For a pass, its tensors become fake ones, which claim to be on the CPU.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from prefold.launch import shards
from prefold.models.adapters import add_lora, ready_to_train
from prefold.models.chat_format import MULTIPLE
from prefold.models.fetch import fetch
from prefold.models.load import plain_attention, prepare_forward, read_config
from prefold.models.messages import quiet
from prefold.models.quantised import quantised_bytes
from prefold.models.tokenizer import chat_tokens, tokenizer_of
from prefold.recipe import Lora, Model, RecipeBase
from prefold.trees.attention import unwrapped


class Sizes(NamedTuple):
    """`parameters` of the model without an adapter, and `trained` ones.

    Bytes: `weights` of the frozen weights as they are kept, of which `whole` are not quantised; `trained_bytes` of the
    trained ones. Parameters by use: `linear` of the layers that every token is multiplied with, `adapter_products`
    those of the adapter, `head` of the vocabulary matrix, `vocabulary` of embeddings and head, `widest` the most that a
    single module has, `adapted` of those with LoRA.
    """

    parameters: int
    trained: int
    weights: int
    trained_bytes: int
    linear: int
    adapter_products: int
    head: int
    vocabulary: int
    widest: int
    adapted: int
    whole: int


@dataclass(frozen=True, eq=False)
class MetaModel:
    """What is to be trained, and how: `config` is the model's, `dtype` the one that is computed in.

    Two are equal if their passes are.
    """

    recipe: RecipeBase
    config: Any
    dtype: torch.dtype

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MetaModel) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @cached_property
    def _identity(self) -> str:
        recipe = self.recipe
        settings = (recipe.model, recipe.lora, recipe.algorithm, recipe.train.gradient_checkpointing, self.dtype)
        return f"{self.config.to_json_string(use_diff=False)} {settings!r} {self._started_adapter!r}"

    @cached_property
    def _started_adapter(self) -> LoraConfig | None:
        """Settings of the adapter that training continues."""
        if self.recipe.model.adapter is None:
            return None
        settings = LoraConfig.from_pretrained(str(Path(self.recipe.model.adapter).expanduser()))
        settings.inference_mode = False
        return cast(LoraConfig, settings)

    @cached_property
    def _new_tokens(self) -> list[int]:
        return chat_tokens(self.recipe.model)

    @property
    def text_config(self) -> Any:
        return self.config.get_text_config()

    @property
    def layers(self) -> int:
        return int(self.text_config.num_hidden_layers)

    @property
    def trains_all(self) -> bool:
        """Full fine-tuning, whose weights are kept in float32."""
        return self.recipe.lora == "none"

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """The dtype of the weights in their files; None if the configuration does not say it."""
        named = getattr(self.config, "dtype", None)
        return getattr(torch, named, None) if isinstance(named, str) else named

    @property
    def is_quantised(self) -> bool:
        return self.recipe.model.load_in_4bit or self.recipe.model.load_in_8bit

    @property
    def weights_dtype(self) -> torch.dtype:
        return torch.float32 if self.trains_all else self.dtype

    @property
    def shards(self) -> int:
        """The number of started processes over which the weights are sharded."""
        return shards(self.recipe.train.fsdp)

    def own(self, trained: int) -> int:
        """This process's part of what is kept for the trained parameters; LoRA weights are not sharded."""
        return trained // (self.shards if self.trains_all else 1)

    def policy(self, layers: int | None = None) -> nn.Module:
        """The model to train, with its first `layers` layers (unset: all), on the meta device."""
        base = self.base(self.weights_dtype, layers)
        if self.trains_all:
            return base
        if self.is_quantised:
            # bitsandbytes quantises every linear layer but the head.
            head = base.get_output_embeddings()
            for layer in base.modules():
                if type(layer) is nn.Linear and layer is not head:
                    layer.__class__ = QuantisedLinear
        with torch.device("meta"):
            if self._started_adapter is None:
                lora = cast("Lora | None", self.recipe.lora)
                return add_lora(base, lora or Lora(), self.recipe.train.seed, self._new_tokens)
            with quiet():
                adapted = get_peft_model(base, copy.deepcopy(self._started_adapter))
            ready_to_train(adapted)
            return adapted

    def base(self, dtype: torch.dtype, layers: int | None = None) -> PreTrainedModel:
        """The model without an adapter, as it is merged and evaluated, with its first `layers` layers (unset: all)."""
        config = copy.deepcopy(self.config)
        if layers is not None:
            text = config.get_text_config()
            text.num_hidden_layers = layers
            if vars(text).get("layer_types"):  # some configurations derive it from the number of layers
                text.layer_types = text.layer_types[:layers]
        attention = plain_attention(self.recipe.model.attn_implementation, config)
        with quiet(), torch.device("meta"):
            model = cast(Any, AutoModelForCausalLM).from_config(config, dtype=dtype, attn_implementation=attention)
        return prepare_forward(model)

    @property
    def sizes(self) -> Sizes:
        return sizes_of(self)


@lru_cache(maxsize=64)
def sizes_of(meta: MetaModel) -> Sizes:
    policy = meta.policy()
    base = unwrapped(policy)
    quantised = {id(layer.weight) for layer in policy.modules() if isinstance(layer, QuantisedLinear)}
    sizes = dict.fromkeys(Sizes._fields, 0)
    for name, weight in policy.named_parameters():
        size = weight.numel()
        if weight.requires_grad:
            sizes["trained"] += size
            sizes["trained_bytes"] += weight.nbytes
        else:
            is_whole = id(weight) not in quantised
            sizes["weights"] += weight.nbytes if is_whole else quantised_bytes(weight, meta.recipe.model)
            sizes["whole"] += weight.nbytes if is_whole else 0
        if "lora_" not in name and "trainable_tokens" not in name:
            sizes["parameters"] += size
            sizes["linear"] += _met_by_a_token(weight, meta.text_config) if weight.ndim > 1 else 0
        elif weight.ndim == 2:
            sizes["adapter_products"] += size
    embeddings, head = (cast(Any, layer()).weight for layer in (base.get_input_embeddings, base.get_output_embeddings))
    sizes["head"], sizes["vocabulary"] = head.numel(), head.numel() + (0 if embeddings is head else embeddings.numel())
    sizes["linear"] -= sizes["vocabulary"]
    adapted = [module.get_base_layer() for module in base.modules() if isinstance(module, BaseTunerLayer)]
    for name, modules in (("widest", list(base.modules())), ("adapted", adapted)):
        own = (sum(weight.numel() for weight in module.parameters(recurse=False)) for module in modules)
        sizes[name] = max(own, default=0)
    return Sizes(**sizes)


def _met_by_a_token(weight: Tensor, text_config: Any) -> int:
    """The parameters that a token is multiplied with: of a stack of experts, those that it is routed to."""
    experts = getattr(text_config, "num_local_experts", None) or getattr(text_config, "num_experts", None)
    if weight.ndim < 3 or not experts or weight.shape[0] != experts:
        return weight.numel()
    return weight.numel() // int(experts) * int(getattr(text_config, "num_experts_per_tok", 1))


def config_of(section: Model) -> Any:
    """The configuration of a model, with the vocabulary that its chat format needs; no weights are needed. Raises
    UserError: there is no such model, or its configuration cannot be read."""
    config = read_config(section, fetch(section.name, section.revision, weights=False))
    text = config.get_text_config()
    if section.chat_template and (tokens := len(tokenizer_of(section))) > text.vocab_size:
        text.vocab_size = -(-tokens // MULTIPLE) * MULTIPLE
    return config


def move_to_cpu(model: nn.Module) -> None:
    """Replace a meta model's tensors by fake ones on the CPU, in place. To be called with a `FakeTensorMode` open."""
    moved: dict[int, Tensor] = {}

    def on_cpu(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype)
            moved[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
        return moved[id(tensor)]

    for module in model.modules():
        for group in (module._parameters, module._buffers):
            group.update({name: on_cpu(tensor) for name, tensor in group.items() if tensor is not None})  # type: ignore[misc]


class QuantisedLinear(nn.Linear):
    """Takes as much memory as a quantised layer: weights are unpacked for each product, and inputs are not saved."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out: Tensor = _Unpacked.apply(x, self.out_features)
        return out

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        return self.weight.new_empty(self.weight.shape, dtype=dtype)


class _Unpacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, columns: int) -> Tensor:
        ctx.shape = (columns, x.shape[-1])
        return x @ x.new_empty(ctx.shape).T

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        [grad] = grad_outputs
        return grad @ grad.new_empty(ctx.shape), None
