"""Adapters folded into the weights, and packed weights: the same outputs, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama, with_lora
from torch import nn
from transformers import PreTrainedModel

from prefold.generation import weights
from prefold.generation.weights import fold_adapter, packed_weights
from prefold.trees.fused_layers import fuse_lora

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


def test_quantised_weights_stay_unmerged() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny_llama(hidden_size=64)
    projection = model.model.layers[0].self_attn.q_proj
    quantised = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
    quantised.weight = bnb.nn.Params4bit(projection.weight.data, requires_grad=False).to("cpu")
    model.model.layers[0].self_attn.q_proj = quantised
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    with fold_adapter(adapted):
        assert lora_products(adapted) == 1


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
