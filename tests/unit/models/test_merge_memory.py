"""A model of many files is merged in the memory of a layer, and ended at any moment it goes on to the same bytes."""

from __future__ import annotations

import multiprocessing
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from base_model import base_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from prefold.models.adapters import load_policy
from prefold.models.load import load_model, loading_peak
from prefold.models.merge import merge_adapter
from prefold.models.tokenizer import tokenizer_of
from prefold.recipe import Lora, Model
from prefold.trees.memory import arrange_allocations, free_memory

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["prefold.models.merge"])
SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16}
ROWS = [list(range(60, 100)), [70, 71]]
MATRIX = 4 * 16_000 * 1024
"""Bytes of the largest matrix in float32, in which the proof computes."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads anonymous memory from /proc")


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """374 MB in bfloat16, in seven files, and an adapter beside them."""
    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=16_000, **SHAPE)).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for name, weight in model.named_parameters():
        torch.nn.init.ones_(weight) if "norm" in name else torch.nn.init.normal_(weight, std=0.02)
    model.save_pretrained(folder / "base", max_shard_size="64MB")
    base_tokenizer().save_pretrained(folder / "base")
    section = Model(name=str(folder / "base"), dtype="bfloat16")
    policy = load_policy(section, Lora(r=4), seed=0)
    for weight in policy.parameters():
        if weight.requires_grad:
            weight.data += 0.02 * torch.randn_like(weight)
    policy.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return section


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def perform(section: Model, target: Path, peak: Any) -> None:
    merge_watched = threading.Thread(target=watch, args=(peak,), daemon=True)
    torch.ones(64) @ torch.ones(64)
    merge_watched.start()
    merge_adapter(section, adapter(section), target, tokenizer_of(section), ROWS, "bfloat16")


def watch(peak: Any) -> None:
    before = anonymous()
    while True:
        peak.value = max(peak.value, anonymous() - before)
        time.sleep(0.001)


def adapter(section: Model) -> Path:
    return Path(section.name).with_name("adapter")


def merge(section: Model, target: Path, seconds: float | None = None) -> int:
    """In a process of its own, ended so many seconds after it has begun to write; bytes of anonymous memory at most."""
    peak = CONTEXT.Value("q", 0)
    process = CONTEXT.Process(target=perform, args=(section, target, peak))
    process.start()
    if seconds is not None:
        while not (target.parent / f".{target.name}.unfinished").exists():
            time.sleep(0.01)
        time.sleep(seconds)
        process.kill()
    process.join()
    assert process.exitcode == (0 if seconds is None else -9)
    return int(peak.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_memory_is_that_of_a_layer(section: Model, tmp_path: Path) -> None:
    """Of a matrix and what is added to it, both in float32, beside the file that is written."""
    sizes = [file.stat().st_size for file in Path(section.name).glob("*.safetensors")]
    assert len(sizes) > 5 and sum(sizes) > 350e6
    peak = merge(section, tmp_path / "merged")
    assert 0 < peak < 2 * MATRIX + max(sizes) < 0.6 * sum(sizes)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(section: Model, tmp_path: Path) -> None:
    merge(section, tmp_path / "straight")
    draw = random.Random(0)
    for _ in range(3):
        merge(section, tmp_path / "killed", draw.uniform(0.5, 4))
        print(sorted(file.name for file in (tmp_path / ".killed.unfinished").iterdir()))
    assert not (tmp_path / "killed").exists()
    merge(section, tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


def load(section: Model, peak: Any) -> None:
    arrange_allocations(kept=True)
    blocks = [torch.ones(size * 2**18) for size in range(1, 30)]
    del blocks[::2]  # holes of many sizes, as a stage before leaves them
    load_model(section, quantised=True)  # what libraries allocate once
    free_memory()
    threading.Thread(target=watch, args=(peak,), daemon=True).start()
    time.sleep(0.1)
    load_model(section, quantised=True)


@pytest.mark.slow  # a figure of its own only where nothing else runs
@pytest.mark.parametrize("bits", [{"load_in_4bit": True}, {"dtype": "float32"}, {}])
def test_loading_takes_what_is_planned(section: Model, bits: dict[str, Any]) -> None:
    """In a process that keeps what is freed, as one that trains on a CPU does."""
    pytest.importorskip("bitsandbytes")
    asked = Model(**{**section.model_dump(), **bits})
    shapes = load_model(asked, contents=False)
    planned = loading_peak(shapes, asked, torch.bfloat16, "cpu", quantised=True)
    peak = CONTEXT.Value("q", 0)
    process = CONTEXT.Process(target=load, args=(asked, peak))
    process.start()
    process.join()
    assert process.exitcode == 0 and planned.device == 0
    assert peak.value == pytest.approx(planned.host, rel=0.15, abs=12e6)
