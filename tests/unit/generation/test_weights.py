"""Adapters folded into the weights, and packed weights: the same outputs, and nothing left behind."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny import tiny_llama, with_lora
from torch import nn
from transformers import PreTrainedModel

from prefold.generation import weights
from prefold.generation.weights import fold_adapter, packed_weights
from prefold.models.adapters import load_policy
from prefold.recipe import Lora, Model
from prefold.trees.fused_layers import fuse_lora
from prefold.trees.self_check import in_float32

IDS = torch.tensor([[1, 5, 9, 13]])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name


def lora_products(model: nn.Module) -> int:
    """How many adapter layers compute their own products in one pass."""
    calls = 0

    def count(*arguments: object) -> None:
        nonlocal calls
        calls += 1

    hooks = [
        module["default"].register_forward_hook(count)
        for name, module in model.named_modules()
        if name.endswith("lora_A")
    ]
    logits(model)
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_folded_is_unmerged_and_comes_back_byte_for_byte(fused: bool, dtype: torch.dtype) -> None:
    model = with_lora(tiny_llama(dtype)).eval()
    if fused:
        fuse_lora(model)
    wanted, before = logits(model), state(model)
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    forwards = [layer.__dict__.get("forward") for layer in layers]
    with fold_adapter(model):
        assert lora_products(model) == 0
        tolerance = 1e-4 if dtype == torch.float32 else 0.3
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=tolerance)
    assert_untouched(model, before)
    assert [layer.__dict__.get("forward") for layer in layers] == forwards
    assert torch.equal(logits(model), wanted)


def test_an_exception_leaves_the_weights_as_they_were() -> None:
    model = with_lora(tiny_llama()).eval()
    before = state(model)
    with pytest.raises(KeyboardInterrupt), fold_adapter(model):
        raise KeyboardInterrupt
    assert_untouched(model, before)


def test_a_broken_adapter_leaves_the_weights_as_they_were() -> None:
    model = with_lora(tiny_llama()).eval()
    *_, last = (module for name, module in model.named_modules() if name.endswith("lora_B"))
    last["default"].weight.data[0, 0] = float("nan")
    before = state(model)
    with pytest.raises(ValueError, match="NaN"), fold_adapter(model):
        pass
    assert_untouched(model, before)
    assert not any(module.merged for module in model.modules() if hasattr(module, "merged_adapters"))


def test_what_cannot_be_folded_stays_unmerged() -> None:
    tied = tiny_llama(tie_word_embeddings=True)
    model = get_peft_model(tied, LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)).eval()
    wanted, before = logits(model), state(model)
    with fold_adapter(model):
        assert lora_products(model) == 1
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-4)
    assert_untouched(model, before)
    dora = with_lora(tiny_llama(), use_dora=True).eval()
    wanted = logits(dora)
    with fold_adapter(dora):
        assert torch.equal(logits(dora), wanted)
    with model.disable_adapter():
        wanted = logits(model)
        with fold_adapter(model):
            assert torch.equal(logits(model), wanted)


# ---- 4 bits -----------------------------------------------------------------------------------------------------


def quantised_policy(folder: Path, dtype: str, lora: dict[str, Any] | None = None, **bits: Any) -> Any:
    """Trained a little, so that its adapter counts."""
    pytest.importorskip("bitsandbytes")
    tiny_llama(hidden_size=128, intermediate_size=192, attention_bias=True).save_pretrained(folder)
    section = Model(name=str(folder), dtype=dtype, **(bits or {"load_in_4bit": True}))
    model = load_policy(section, Lora(r=4, **(lora or {})), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    return model.eval()


def calls_of_bitsandbytes(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> int:
    from bitsandbytes import nn as layers

    made: list[nn.Module] = []
    forward = layers.Linear4bit.forward

    def counted(self: nn.Module, x: torch.Tensor) -> Any:
        made.append(self)
        return forward(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(layers.Linear4bit, "forward", counted)
        logits(model)
    return len(made)


NESTED = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}


@pytest.mark.parametrize("bits", [{"load_in_4bit": True}, NESTED], ids=["nf4", "fp4, nested"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]], ids=["all", "some"])
def test_4_bits_are_unpacked_and_folded(
    targets: Any, bits: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly those of the model that trains, where it computes in float32."""
    model = quantised_policy(tmp_path, "float32", {"target_modules": targets}, **bits)
    wanted, before = logits(model), state(model)
    assert calls_of_bitsandbytes(model, monkeypatch) == 3 * 7
    with model.disable_adapter():
        assert not torch.allclose(logits(model), wanted, atol=0.1)
    with fold_adapter(model):
        assert calls_of_bitsandbytes(model, monkeypatch) == lora_products(model) == 0
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-4)
    assert_untouched(model, before)
    assert torch.equal(logits(model), wanted) and calls_of_bitsandbytes(model, monkeypatch) == 3 * 7


@pytest.mark.parametrize("autocast", [True, False])
def test_unpacked_in_16_bits(autocast: bool, tmp_path: Path) -> None:
    """No further from float32 than the model that trains, about."""
    model = quantised_policy(tmp_path, "bfloat16")
    with in_float32(model):
        exact = logits(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        trains = logits(model)
        with fold_adapter(model):
            found = logits(model)
            with torch.autocast("cpu", enabled=False), in_float32(model):
                checked = logits(model)
    assert found.dtype == trains.dtype
    off, usual = (float((each.float() - exact).norm() / exact.norm()) for each in (found, trains))
    assert 0 < usual < 0.1 and off < 1.5 * usual
    # What the self-check sees has the rounding of the weights alone.
    assert 0 < float((checked - exact).norm() / exact.norm()) < off


@pytest.mark.parametrize("kept", ["memory", "8 bits", "another order"])
def test_what_stays_quantised(kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantised_policy(tmp_path, "float32", **({"load_in_8bit": True} if kept == "8 bits" else {}))
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        vars(layer).pop("forward")  # the fused one, which calls no module that could be counted
    if kept == "memory":
        size = 4 * 3 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 192)
        for available, folds in ((2 * size, True), (2 * size - 1, False)):
            monkeypatch.setattr(weights, "available", lambda available=available: available)
            with fold_adapter(model):
                assert (lora_products(model) == 0) == folds
    if kept == "another order":
        for module in model.modules():
            if weights._is_in_4_bits(module):
                module.weight.quant_state.packing_format_for_cpu = True
    wanted = lora_products(model)
    with fold_adapter(model):
        assert lora_products(model) == wanted == 3 * 7


@pytest.mark.parametrize("what", ["dora", "bias", "off"])
def test_an_adapter_that_cannot_be_folded_is_computed_beside_unpacked_weights(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantised_policy(tmp_path, "float32", {"use_dora": what == "dora"})
    if what == "bias":
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.lora_bias["default"] = True
                module.lora_B["default"].bias = nn.Parameter(torch.ones(module.out_features))
    with model.disable_adapter() if what == "off" else nullcontext():
        wanted = logits(model)
        with fold_adapter(model):
            assert calls_of_bitsandbytes(model, monkeypatch) == 0
            torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-4)


def test_what_goes_wrong_leaves_4_bits_as_they_were(tmp_path: Path) -> None:
    model = quantised_policy(tmp_path, "float32")
    before, wanted = state(model), logits(model)
    with pytest.raises(KeyboardInterrupt), fold_adapter(model):
        raise KeyboardInterrupt
    assert_untouched(model, before)
    assert torch.equal(logits(model), wanted)


# ---- packed weights ---------------------------------------------------------------------------------------------


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if type(module) is nn.Linear]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_weights_compute_the_same(dtype: torch.dtype) -> None:
    model = tiny_llama(dtype, attention_bias=True).eval()
    wanted = logits(model)
    with packed_weights(model):
        assert all("forward" in layer.__dict__ for layer in linears(model))
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert logits(model).isfinite().all()
    assert not any("forward" in layer.__dict__ for layer in linears(model))
    assert torch.equal(logits(model), wanted)


def test_folded_weights_are_packed() -> None:
    model = with_lora(tiny_llama()).eval()
    wanted = logits(model)
    with fold_adapter(model), packed_weights(model):
        assert lora_products(model) == 0
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-4)


def test_no_second_copy_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model: PreTrainedModel = tiny_llama()
    monkeypatch.setattr(weights, "available", lambda: 1000)
    with packed_weights(model):
        assert not any("forward" in layer.__dict__ for layer in linears(model))
