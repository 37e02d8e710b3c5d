"""Sampling on a GPU: variable-length attention passes the check, and writes what products do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import family
from tiny import tiny_llama

from prefold.generation.engine import LocalEngine, ModelState, failed_check
from prefold.generation.kv_cache import VariableLength
from prefold.generation.sampling import Sampling

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
TOKENIZER: Any = SimpleNamespace(eos_token_id=2, decode=lambda ids, **how: " ".join(map(str, ids)))
PROMPTS = [[(7 * i + j) % 80 + 10 for j in range(length)] for i, length in enumerate((1, 30, 5, 12, 3, 20))]
ENDS = tuple(range(10, 18))


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [64, 128, 256])
def test_the_check_passes(width: int, dtype: torch.dtype, window: int | None, caplog: pytest.LogCaptureFixture) -> None:
    """Its steps reach beyond the window."""
    model = tiny_llama(dtype, head_dim=width, sliding_window=window, layer_types=["sliding_attention"] * 3)
    assert failed_check(model.cuda().eval(), PROMPTS[1]) is None
    assert ModelState.of(model).variable_length == {dtype} and not caplog.records


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma3_text", "phi", "gpt2"])
def test_completions(name: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of products, as far as rounding lets them; the same in every batch likewise."""
    how, found = Sampling(14, 3, temperature, end_tokens=ENDS), list[Any]()
    for fits, tokens in ((True, 500), (True, 150), (False, 500)):
        monkeypatch.setattr(VariableLength, "fits", lambda config, fits=fits: fits)
        model = family(name, torch.float16).cuda()
        groups = LocalEngine(model, TOKENIZER, max_tokens=tokens).sample(PROMPTS, how)
        assert bool(ModelState.of(model).variable_length) == fits
        found.append([completion.token_ids for group in groups for completion in group])
    for others in found[1:]:
        assert sum(one == other for one, other in zip(found[0], others, strict=True)) > len(found[0]) // 2
