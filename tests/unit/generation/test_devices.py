"""Sampling on devices that this machine lacks: the draws of a CPU, and attention in half precision that is checked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from emulated_devices import emulated, put
from families import family
from tiny import tiny_llama
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prefold.device import is_half
from prefold.generation import engine, kv_cache
from prefold.generation.engine import LocalEngine, failed_check, failed_half
from prefold.generation.sampling import Sampling
from prefold.models.load import prepare_forward

TOKENIZER: Any = SimpleNamespace(eos_token_id=2, decode=lambda ids, **how: " ".join(map(str, ids)))
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], list(range(20, 50))]
DRAWN = Sampling(12, 3, temperature=0.9, top_p=0.9, top_k=50, min_p=0.01, repetition_penalty=1.1)
GREEDY = Sampling(12, 1)


def texts(model: Any, how: Sampling) -> list[str]:
    groups = LocalEngine(model, TOKENIZER).sample(PROMPTS, how)
    return [completion.text for group in groups for completion in group]


@pytest.fixture
def no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "generate_plainly", None)


# ---- MPS: no float64, no products of half precision that leave float32 ------------------------------------------


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("how", [DRAWN, GREEDY], ids=["drawn", "greedy"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_on_mps_the_completions_are_those_of_a_cpu(name: str, how: Sampling, dtype: torch.dtype) -> None:
    wanted, model = texts(family(name, dtype), how), family(name, dtype)
    with emulated():
        found = texts(put(model, {"": "mps"}), how)
    assert len(found) == len(wanted)
    # In half precision values are rounded before they are widened, which may part two completions.
    assert found == wanted if dtype == torch.float32 else sum(map(str.__eq__, found, wanted)) > len(wanted) // 2


def test_on_mps_transformers_own_generate_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, model = texts(family("llama"), DRAWN), family("llama")
    monkeypatch.setattr(engine, "why_not_shared", lambda *_: "for this test")
    monkeypatch.setattr(torch, "Event", MagicMock())
    with emulated():
        assert texts(put(model, {"": "mps"}), DRAWN) == wanted


# ---- half precision -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_half_precision_passes_the_check(name: str, dtype: torch.dtype) -> None:
    model = family(name)
    with emulated():
        assert failed_half(put(model, {"": "cuda"}), dtype) is None


def wrong(monkeypatch: pytest.MonkeyPatch) -> str:
    part = kv_cache.attention_part

    def swapped(query: Tensor, *states: Any) -> Any:
        out, normaliser = part(query, *states)
        return out, -normaliser if is_half(query.dtype) else normaliser

    monkeypatch.setattr(kv_cache, "attention_part", swapped)
    return "its attention in torch.bfloat16 is off by"


def without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> str:
    part = kv_cache.attention_part

    def refused(query: Tensor, *states: Any) -> Any:
        if is_half(query.dtype):
            raise NotImplementedError("Could not run 'aten::bmm.dtype'\nmore of it")
        return part(query, *states)

    monkeypatch.setattr(kv_cache, "attention_part", refused)
    return "its attention in torch.bfloat16 failed (Could not run 'aten::bmm.dtype')"


@pytest.mark.parametrize("fault", [wrong, without_a_kernel])
def test_the_check_sees_what_is_wrong_in_half_precision_alone(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said, model, prompt = fault(monkeypatch), family("llama", torch.bfloat16), list(range(20))
    assert failed_check(model, prompt) is None  # on a CPU, which attends in float32
    with emulated():
        reason = failed_check(put(model, {"": "cuda"}), prompt)
    assert reason is not None and reason.startswith(said)


def test_autocast_counts_as_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 weights, as in full fine-tuning: the check itself is in float32, and the dtype of autocast is checked."""
    model, checked = prepare_forward(tiny_llama()), []
    monkeypatch.setattr(engine, "attends_in", lambda dtype, device: True)
    monkeypatch.setattr(engine, "failed_half", lambda model, dtype, *how: checked.append(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert failed_check(model, list(range(40))) is None
    assert checked == [torch.bfloat16]


class Products(TorchDispatchMode):
    """Dtypes that attention computes its products in."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "bmm" in str(func) or "attention" in str(func):
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_cpu_attends_in_float32_under_autocast_too(name: str, weights: torch.dtype) -> None:
    model = prepare_forward(family(name, weights))
    with torch.autocast("cpu", torch.bfloat16), Products() as products:
        batch, _ = engine.prefill(model, PROMPTS[:1], Sampling(4, 2))
        engine.decode(model, [batch], torch.tensor([1, 2]))
    assert products.dtypes == {torch.float32}
