"""The CUDA backends against the plain path, on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dense import outcome
from families import family
from tiny import random_trees, tiny_llama, with_lora

from prefold.models.adapters import load_policy
from prefold.recipe import Lora, Model
from prefold.trees.attention import candidates
from prefold.trees.packing import TokenTree, pack
from prefold.trees.reference import compute_reference
from prefold.trees.scorer import Scorer, choose_scorer
from prefold.trees.self_check import choose_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
FAMILIES = ["llama", "mistral", "qwen3", "gemma2", "gemma3_text", "phi", "gpt_neox", "cohere2"]
SHAPE = {"hidden_size": 64, "head_dim": 16}


def trees() -> list[TokenTree]:
    return random_trees(8, seed=4)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("backend", ["prefold_segments", "prefold_block_mask"])
def test_float32(name: str, backend: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    model = with_lora(family(name, **SHAPE)).cuda()
    wanted = outcome(model, lambda: Scorer(model, 4096, None).score(trees()).tokens)
    scorer = Scorer(model, 4096, backend)
    with scorer.in_place():
        found = outcome(model, lambda: scorer.score(trees()).tokens)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-4)
    for key, gradient in wanted[1].items():
        assert (found[1][key] - gradient).norm() <= 1e-3 * gradient.norm(), key


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("backend", candidates(torch.device("cuda"), torch.bfloat16))
def test_bfloat16(name: str, backend: str) -> None:
    """No further from float32 than the plain path in bfloat16."""
    model = with_lora(family(name, **SHAPE)).cuda()
    exact = Scorer(model, 4096, None).score(trees()).tokens.detach()
    model.to(torch.bfloat16)
    plain = Scorer(model, 4096, None).score(trees()).tokens.detach()
    found = Scorer(model, 4096, backend).score(trees()).tokens.detach()
    assert (found - exact).norm() <= 1.5 * (plain - exact).norm()


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_quantised(bits: str, tmp_path: Path) -> None:
    """Packed over quantised weights, the reference equal to the policy, and a gradient through every layer."""
    pytest.importorskip("bitsandbytes")
    family("llama", hidden_size=256, intermediate_size=512, head_dim=64).save_pretrained(tmp_path)
    section = Model(name=str(tmp_path), dtype="bfloat16", **{bits: True})
    model = load_policy(section, Lora(r=4), seed=0)
    scorer = choose_scorer(model, trees(), 4096, "trees")
    reference = torch.cat(compute_reference(scorer, trees(), torch.bfloat16))
    with torch.autocast("cuda", torch.bfloat16), scorer.in_place():
        policy = scorer.score(trees()).tokens
    torch.testing.assert_close(policy.detach().cpu(), reference, rtol=1e-3, atol=0.05)
    policy.sum().backward()
    layers = [weight for name, weight in model.named_parameters() if "lora_B" in name]
    assert layers and all(weight.grad is not None and weight.grad.norm() > 0 for weight in layers)


@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_attention_of_a_head_width(width: int, dtype: torch.dtype, softcap: float | None, window: int | None) -> None:
    """Variable-length attention for every width; without it the last one at least, whatever FlexAttention comes to."""
    model = tiny_llama(dtype, head_dim=width, attn_logit_softcapping=softcap, sliding_window=window)
    model.config.layer_types = ["sliding_attention"] * 3
    names = candidates(torch.device("cuda"), dtype, model.config)
    row = pack([TokenTree(tuple(range(90)) * 2, ((5,) * 32, (7,) * 20)), *trees()], "cuda")
    chosen = choose_attention(model.cuda(), names, [row], dtype)
    assert chosen == names[0] if len(names) == 3 else chosen in names


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_a_backend_is_chosen(weights: torch.dtype) -> None:
    """Float32 weights under autocast are those of full fine-tuning."""
    model = family("llama", weights, **SHAPE).cuda()
    scorer = choose_scorer(model, trees(), 4096, dtype=torch.bfloat16)
    assert scorer.attention == "prefold_variable_length"
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        found, wanted = (each.score(trees()).tokens for each in (scorer, Scorer(model, 4096, None)))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=0.1)
