"""The fused LoRA layer gives PEFT's values and gradients, and leaves alone what it cannot do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import Outcome, assert_same
from families import family
from peft import LoraConfig, get_peft_model
from tiny import gradients, with_lora
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from prefold.models.adapters import load_policy
from prefold.recipe import Lora, Model
from prefold.trees.attention import CHECKPOINTING, unwrapped
from prefold.trees.fused_layers import fuse_lora


def outcome(model: nn.Module) -> Outcome:
    """With the same dropout masks every time."""
    model.zero_grad()
    torch.manual_seed(5)
    logits = model(input_ids=torch.arange(3, 24).view(3, 7)).logits
    (logits * torch.linspace(-1, 2, logits.numel()).view(logits.shape)).sum().backward()
    return logits.detach(), gradients(model)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt_neox", "gemma3_text"])  # without and with biases
def test_equal_to_peft(name: str) -> None:
    model = with_lora(family(name, torch.float64), lora_alpha=7)
    fused = copy.deepcopy(model)
    assert fuse_lora(fused) == sum(key.endswith("lora_A.default.weight") for key in model.state_dict()) > 0
    wanted, found = outcome(model), outcome(fused)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-6, atol=1e-6)  # the family's norms are float32
    assert found[1].keys() == wanted[1].keys()
    for key, gradient in wanted[1].items():
        assert (found[1][key] - gradient).norm() <= 1e-6 * gradient.norm(), key
    with model.disable_adapter(), fused.disable_adapter():
        torch.testing.assert_close(outcome_without(fused), outcome_without(model), rtol=0, atol=0)


def outcome_without(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.arange(3, 24).view(3, 7)).logits
    return logits


def test_autocast() -> None:
    """In bfloat16 over float32 weights, the distance to float32 is no larger than PEFT's, over several draws."""
    theirs = ours = 0.0
    for seed in range(8):
        model = with_lora(family("llama"))
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        fused = copy.deepcopy(model)
        fuse_lora(fused)
        exact = outcome_without(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            theirs += float((outcome_without(model) - exact).norm())
            ours += float((outcome_without(fused) - exact).norm())
    assert ours <= 1.05 * theirs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {gradient.dtype for gradient in outcome(fused)[1].values()} == {torch.float32}


@contextmanager
def as_pefts(model: nn.Module) -> Iterator[None]:
    """While open, the layers that are fused compute as PEFT has it."""
    forwards = {module: vars(module).pop("forward") for module in model.modules() if "forward" in vars(module)}
    assert forwards
    try:
        yield
    finally:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward


def test_dropout_is_pefts() -> None:
    """The masks are drawn alike: one for each layer, on the input of A alone; none in evaluation."""
    model = with_lora(family("llama", torch.float64), lora_dropout=0.3)
    fuse_lora(model)
    with as_pefts(model.train()):
        wanted = outcome(model)
    assert_same(outcome(model), wanted, 1e-6)
    assert not torch.allclose(outcome(model.eval())[0], wanted[0])


FOUR: dict[str, Any] = {"load_in_4bit": True}
BITS: dict[str, dict[str, Any]] = {
    "nf4": FOUR,
    "fp4-double": {**FOUR, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "8bit": {"load_in_8bit": True},
    "16bit": {},
}
Policy = Callable[..., nn.Module]


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    """A model for training, its LoRA weights random."""

    def make(bits: str, dtype: str = "float32", dropout: float = 0.0, name: str = "llama", **more: Any) -> nn.Module:
        if BITS[bits]:
            pytest.importorskip("bitsandbytes")
        model = family(name, torch.bfloat16, hidden_size=64, intermediate_size=96, head_dim=16)
        model.save_pretrained(tmp_path)  # in numbers that float32 has as well
        section = Model(name=str(tmp_path), dtype=dtype, **BITS[bits], **more)
        model = load_policy(section, Lora(r=4, lora_dropout=dropout), seed=0)
        torch.manual_seed(1)
        for key, weight in model.named_parameters():
            weight.data += 0.1 * torch.randn_like(weight) if "lora_" in key else 0
        layers = [module for module in model.modules() if hasattr(module, "lora_A")]
        assert layers and all("forward" in vars(layer) for layer in layers)
        return model.train()

    return make


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("bits", "name"), [("nf4", "llama"), ("nf4", "qwen2"), ("fp4-double", "llama"), ("8bit", "llama")]
)
def test_quantised_equal_to_peft(policy: Policy, bits: str, name: str, dropout: float) -> None:
    model = policy(bits, dropout=dropout, name=name)
    with as_pefts(model):
        wanted = outcome(model)
    assert_same(outcome(model), wanted, 1e-4)
    with model.disable_adapter(), as_pefts(model):
        off = outcome_without(model)
    with model.disable_adapter():
        assert torch.equal(outcome_without(model), off)


def errors(layer: nn.Module, exact: nn.Module) -> torch.Tensor:
    """Of one layer in bfloat16 under a float32 stream, against another in float32, relative: of its output, and of the
    gradients of its input, A and B."""
    x = torch.randn(2, 11, layer.in_features, generator=torch.Generator().manual_seed(2))
    found = []
    for each, dtype in ((exact, torch.float32), (layer, torch.bfloat16)):
        each.zero_grad()
        torch.manual_seed(3)
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            out = each(given).float()
        out.backward(torch.linspace(-1, 2, out.numel()).view(out.shape))
        found.append([out.detach(), given.grad, *gradients(each).values()])
    return torch.stack([(given - right).norm() / right.norm() for right, given in zip(*found, strict=True)])


@pytest.mark.parametrize("bits", ["nf4", "8bit", "16bit"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_bfloat16_under_a_float32_stream(policy: Policy, bits: str, dropout: float) -> None:
    """About as far from float32 as PEFT's, over all layers of a model."""
    models = [policy(bits, dtype, dropout) for dtype in ("bfloat16", "float32")]
    layers, exact = ([module for module in model.modules() if hasattr(module, "lora_A")] for model in models)
    with as_pefts(models[0]):
        of_peft = sum(map(errors, layers, exact))
    of_ours = sum(map(errors, layers, exact))
    assert of_ours.max() < 0.02 * len(layers)
    assert (of_ours <= 1.25 * of_peft).all()


def test_states_are_cast_once_and_never_stale(policy: Policy) -> None:
    model, casts = policy("16bit", "bfloat16"), []
    first, *_ = (module for module in model.modules() if hasattr(module, "q_proj"))
    states = torch.randn(1, 6, 64)

    def outputs(*layers: nn.Module) -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16), CountedCasts(casts):
            return [layer(states) for layer in layers]

    before = outputs(first.q_proj, first.k_proj, first.v_proj)
    assert casts.count(states.shape) == 1
    states += 1
    after = outputs(first.q_proj)[0]
    states = states.clone()
    assert torch.equal(after, outputs(first.q_proj)[0]) and not torch.equal(after, before[0])


class CountedCasts(TorchDispatchMode):
    """Notes the shape of everything that is brought into another dtype."""

    def __init__(self, casts: list[torch.Size]):
        super().__init__()
        self.casts = casts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.casts.append(args[0].shape)
        return func(*args, **(kwargs or {}))


def test_checkpointing_gives_the_same_numbers(policy: Policy) -> None:
    """The masks are drawn again, and the states cast again."""
    model = policy("nf4", "bfloat16", dropout=0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = outcome(model)
        getattr(unwrapped(model), f"{CHECKPOINTING}_enable")({"use_reentrant": False})
        assert_same(outcome(model), wanted, 0)


def test_another_compute_dtype_takes_pefts_path(policy: Policy) -> None:
    model = policy("nf4", "bfloat16", bnb_4bit_compute_dtype="float32")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outcome(model)
        with as_pefts(model):
            wanted = outcome(model)
    assert_same(found, wanted, 1e-12)


def test_4_bit_weights_are_unpacked_again(policy: Policy) -> None:
    """Nothing of a weight's size is kept for the backward pass."""
    model, kept = policy("nf4"), []
    [layer, *_] = (module for module in model.modules() if hasattr(module, "lora_A"))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor
    ):
        layer(torch.randn(1, 5, 64, requires_grad=True)).sum().backward()
    assert sorted(kept) == [(4, 64), (5, 4), (5, 64), (64, 4)]


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_others_keep_pefts(settings: dict[str, Any]) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    assert fuse_lora(get_peft_model(family("llama"), config)) == 0


def test_second_adapter_takes_pefts_path() -> None:
    model = get_peft_model(family("llama"), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    fuse_lora(model)
    with_first = outcome_without(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.set_adapter("second")
    assert not torch.allclose(outcome_without(model), with_first)
    model.set_adapter("default")
    torch.testing.assert_close(outcome_without(model), with_first)
