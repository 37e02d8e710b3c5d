"""Memory of a GPU: what is free, what a token takes, and how an allocation failure is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulated_devices import emulated, put
from tiny import tiny_llama
from transformers import LlamaConfig

from prefold.generation.engine import cache_tokens
from prefold.trees.memory import auto_max_tokens, budget_for, free_on, is_out_of_memory, token_bytes

FREE = {"mem_get_info": (1000, 9000), "memory_reserved": 5000, "memory_allocated": 4200}


def patched(monkeypatch: pytest.MonkeyPatch, **figures: Any) -> None:
    for name, figure in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, figure=figure: figure)


def test_what_the_allocator_holds_of_freed_tensors_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, **FREE)
    assert free_on(torch.device("cuda")) == 1000 + 5000 - 4200


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)], ids=str)
def test_half_of_it_holds_keys_and_values(dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, mem_get_info=(10**5, 10**9), memory_reserved=10**6, memory_allocated=10**5)
    model = tiny_llama(dtype)
    with emulated():
        tokens = cache_tokens(put(model, {"": "cuda"}))
    assert tokens == 10**6 // 2 // (3 * 2 * 2 * 8 * size)


def test_a_checkpointed_layer_keeps_a_float32_state() -> None:
    shape = {"hidden_size": 64, "intermediate_size": 100, "num_attention_heads": 4}
    one, two = (token_bytes(LlamaConfig(num_hidden_layers=layers, **shape), True) for layers in (1, 2))
    assert two - one == 4 * 64


def test_a_budget_is_that_of_all_devices_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, get_device_properties=SimpleNamespace(total_memory=2 * 10**8))
    model = tiny_llama()
    weights = sum(weight.nbytes for weight in model.parameters())
    wanted = [budget_for(model.config, weights, total, False) for total in (2 * 10**8, 4 * 10**8)]
    with emulated():
        found = [
            auto_max_tokens(put(model, devices), False)
            for devices in ({"": "cuda:0"}, {"": "cuda:0", "model.layers.2": "cuda:1"})
        ]
    assert found == wanted and wanted[0] < wanted[1]


class OutOfResources(Exception):
    """As Triton names what does not fit the memory of a multiprocessor."""


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:126] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB)"),
    RuntimeError("InductorError: out of resource: triton_tem_fused_0 Required: 114688 Hardware limit:101376"),
    OutOfResources("out of resource: shared memory, Required: 114688, Hardware limit: 101376."),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_out_of_memory(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED"), ValueError("out of memory"), OutOfResources("other")],
    ids=str,
)
def test_other_errors(error: Exception) -> None:
    assert not is_out_of_memory(error)
