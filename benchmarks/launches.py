"""Kernels that a GPU of CUDA is asked for in a step, counted without one.

    python -m benchmarks.launches

A step of sampling for 1, 4 and 16 prompts of 8 completions, draws included, and a step of training: forward and
backward passes of a row. Random weights of SmolLM2-135M's shape, on torch's meta device, where tensors have shapes and
nothing in them: the engine's own code as on CUDA in bfloat16, where asking the device for a value is an error. What
variable-length attention does is one kernel. Prints a table and, as its last line, JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.results import quieten
from prefold.generation.engine import decode, prefill
from prefold.generation.kv_cache import VariableLength
from prefold.generation.sampling import Sampling
from prefold.generation.sequences import GenerationRequest
from prefold.models.adapters import add_lora
from prefold.models.load import prepare_forward
from prefold.plan.meta_model import move_to_cpu
from prefold.plan.passes import attention_on
from prefold.recipe import Lora
from prefold.trees.attention import using_attention
from prefold.trees.logprobs import packed_logprobs
from prefold.trees.packing import TokenTree, pack

PROMPTS, GROUP = (1, 4, 16), 8
PROMPT_TOKENS, NEW_TOKENS = 48, 32
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}
"""Beside views: what only makes a tensor with nothing in it, or gives one back."""


class Launches(TorchDispatchMode):
    """While open, counts the operations that compute a tensor, a kernel each, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, int] = {}

    @property
    def kernels(self) -> int:
        return sum(self.names.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, made = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        if any(isinstance(each, Tensor) for each in tree_leaves(made)) and not func.is_view and name not in NO_KERNEL:
            self.names[name] = self.names.get(name, 0) + 1
        return made


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    quieten()
    model = model_of(shape_of(options))
    decoding = {str(prompts): decode_step(model, prompts).kernels for prompts in PROMPTS}
    training = training_step(model).kernels
    table = Table("a step of", "kernels")
    for prompts, kernels in decoding.items():
        table.add_row(f"sampling, {prompts} x {GROUP}", f"{kernels:,}")
    table.add_row("training", f"{training:,}")
    Console().print(table)
    print(json.dumps({"decode_step": decoding, "training_step": training}))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    first_line = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=first_line)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--key-heads", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    return parser.parse_args(arguments)


def shape_of(options: argparse.Namespace) -> LlamaConfig:
    width = 64 * options.heads
    return LlamaConfig(
        num_hidden_layers=options.layers,
        hidden_size=width,
        num_attention_heads=options.heads,
        num_key_value_heads=options.key_heads,
        intermediate_size=width * 8 // 3,
        vocab_size=options.vocabulary,
        tie_word_embeddings=True,
    )


def model_of(config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.eval()
    return model


def decode_step(model: PreTrainedModel, prompts: int) -> Launches:
    """The second token of 8 completions of each prompt, drawn at temperature 1."""
    ids = [[1] * (PROMPT_TOKENS + i) for i in range(prompts)]
    settings = Sampling(NEW_TOKENS, GROUP, temperature=1.0)
    request = GenerationRequest(ids, settings, cast(Any, None), (), range(prompts), None)
    batch, logits = prefill(model, ids, settings, VariableLength)
    drawing = request.begin(range(prompts))
    drawing.draw(logits.repeat_interleave(GROUP, 0))
    launches = Launches()
    with launches:
        drawing.draw(decode(model, [batch], drawing.newest))
    return launches


def training_step(model: PreTrainedModel) -> Launches:
    """Log-probs of a row of two pairs and their gradients by LoRA weights on all linear layers, under autocast."""
    with torch.device("meta"):
        policy = add_lora(prepare_forward(model), Lora(r=16), seed=0).train()
    trees = [TokenTree((1,) * PROMPT_TOKENS, ((1,) * NEW_TOKENS, (2,) * NEW_TOKENS))] * 2
    launches = Launches()
    with FakeTensorMode(allow_non_fake_inputs=True), launches:
        move_to_cpu(policy)
        launches.names.clear()
        with using_attention(policy, attention_on("cuda", torch.bfloat16)), torch.autocast("cpu", torch.bfloat16):
            logprobs = packed_logprobs(policy, pack(trees)).tokens
        logprobs.sum().backward()
    return launches


if __name__ == "__main__":
    main()
