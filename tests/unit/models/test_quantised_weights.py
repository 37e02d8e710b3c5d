"""Weights in 4 and 8 bits: what is asked of bitsandbytes, and that training and evaluation compute alike."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_trees, tiny_llama
from torch import nn

from prefold.errors import UserError
from prefold.models import quantised
from prefold.models.adapters import load_policy
from prefold.models.load import load_model, trainable_parameters
from prefold.models.quantised import PIECE, quantisation, quantise_in_pieces
from prefold.recipe import Lora, Model, dump_recipe, make_recipe, parse_yaml
from prefold.trees.reference import _key, compute_reference
from prefold.trees.scorer import Scorer, choose_scorer

pytest.importorskip("bitsandbytes")

FOUR: dict[str, Any] = {"load_in_4bit": True}
EIGHT: dict[str, Any] = {"load_in_8bit": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 64 weights and more, as real layers have."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(hidden_size=128, intermediate_size=192).save_pretrained(folder)
    return folder


def section(folder: Path, **settings: Any) -> Model:
    return Model(name=str(folder), **{"dtype": "float32", **settings})


# ---- the recipe -------------------------------------------------------------------------------------------------


def recipe(**model: Any) -> Any:
    data = {"train": [{"path": "pairs.jsonl"}]}
    return make_recipe({"method": "dpo", "model": {"name": "a", **model}, "data": data, "output_dir": "runs/x"})


def test_the_resolved_recipe_names_the_number_format() -> None:
    resolved = parse_yaml(dump_recipe(recipe(**FOUR)), "dumped")
    assert resolved["model"]["bnb_4bit_quant_type"] == "nf4"
    assert resolved["model"]["bnb_4bit_compute_dtype"] == "auto"
    assert resolved["model"]["bnb_4bit_use_double_quant"] is False
    assert make_recipe(resolved) == recipe(**FOUR)
    plain = parse_yaml(dump_recipe(recipe()), "dumped")
    assert plain["model"]["bnb_4bit_quant_type"] is None and make_recipe(plain) == recipe()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {**FOUR, **EIGHT}}, "either `load_in_4bit` or `load_in_8bit`"),
        (
            {"model": {"bnb_4bit_quant_type": "nf4"}},
            "`bnb_4bit_quant_type` would be ignored without `load_in_4bit: true`",
        ),
        ({"model": {**EIGHT, "bnb_4bit_use_double_quant": False}}, "`bnb_4bit_use_double_quant` would be ignored"),
        ({"model": {**FOUR, "bnb_4bit_quant_type": "nf5"}}, "'nf4' or 'fp4'"),
        ({"model": {**FOUR, "bnb_4bit_compute_dtype": "fp8"}}, "`model.bnb_4bit_compute_dtype` is 'fp8'"),
        ({"model": FOUR, "lora": "none"}, "`lora: none` trains all weights"),
        ({"model": {"adapter": "a"}, "lora": {"r": 4}}, "a section `lora` beside `model.adapter` would be ignored"),
        ({"model": {"adapter": "a"}, "lora": "none"}, "a section `lora` beside `model.adapter` would be ignored"),
        ({"lora": None}, "`lora` is empty"),
        ({"model": {"chat_template": "chatlm"}}, "write `chatml`, or name a file"),
        (
            {"model": {"chat_template": "chatml"}, "data": {"template": "none"}},
            "would be ignored beside `data.template",
        ),
        ({"model": {"load_in_4bits": True}}, "did you mean `load_in_4bit`?"),
    ],
)
def test_settings_that_would_be_ignored_are_errors(changes: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {"method": "dpo", "output_dir": "runs/x"}
    sections = {"model": {"name": "a"}, "data": {"train": [{"path": "pairs.jsonl"}]}, "lora": {}}
    for name, defaults in sections.items():
        change = changes.get(name, {})
        values[name] = {**defaults, **change} if isinstance(change, dict) else change
    if not values["lora"] and "lora" not in changes:
        del values["lora"]
    with pytest.raises(UserError) as caught:
        make_recipe(values)
    assert message in str(caught.value)


def test_what_is_asked_of_bitsandbytes() -> None:
    assert quantisation(Model(name="a"), torch.bfloat16) is None
    four = quantisation(Model(name="a", **FOUR), torch.bfloat16)
    assert four is not None and four.quantization_method() == "nf4"
    assert four.bnb_4bit_compute_dtype == torch.bfloat16 and not four.bnb_4bit_use_double_quant
    settings = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float16"}
    other = quantisation(Model(name="a", **FOUR, **settings), torch.bfloat16)
    assert other is not None and other.quantization_method() == "fp4"
    assert other.bnb_4bit_compute_dtype == torch.float16 and other.bnb_4bit_use_double_quant
    eight = quantisation(Model(name="a", **EIGHT), torch.bfloat16)
    assert eight is not None and eight.quantization_method() == "llm_int8"


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        quantised, "find_spec", lambda name: None if name == "bitsandbytes" else importlib.util.find_spec(name)
    )
    with pytest.raises(UserError, match="needs the package bitsandbytes"):
        quantisation(Model(name="a", **FOUR), torch.bfloat16)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantising_in_pieces_gives_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    import bitsandbytes  # noqa: F401  # makes the operator known

    quantise_in_pieces()
    operator, otherwise = torch.ops.bitsandbytes.quantize_4bit.default, torch._C.DispatchKey.CompositeExplicitAutograd
    for shape in ((3 * PIECE // 64, 64), (100, 64), (7, 31)):
        weights = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        weights[0] = 0
        asked = (weights, 64, kind, torch.uint8)
        wanted = operator.redispatch(torch._C.DispatchKeySet(otherwise), *asked)
        assert all(map(torch.equal, operator(*asked), wanted))


# ---- the model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bits", [FOUR, {**FOUR, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}, EIGHT]
)
def test_layers_are_quantised_for_training_alone(folder: Path, bits: dict[str, Any]) -> None:
    whole = load_model(section(folder, **bits))
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.float32}
    model = load_policy(section(folder, **bits), Lora(r=2, target_modules=["q_proj"]), seed=0)
    base = model.get_base_model()
    assert base.model.layers[0].mlp.up_proj.weight.dtype == (torch.uint8 if "load_in_4bit" in bits else torch.int8)
    assert type(base.lm_head) is nn.Linear and type(base.model.embed_tokens) is nn.Embedding
    trained, total = trainable_parameters(model)
    added = 3 * 2 * (128 + 128)
    assert (trained, total) == (added, trainable_parameters(whole)[1] + added)


@pytest.mark.parametrize("bits", [FOUR, EIGHT], ids=["4bit", "8bit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_computes_as_the_policy_does(folder: Path, bits: dict[str, Any], dtype: str) -> None:
    """Left to itself, bitsandbytes computes otherwise in evaluation mode, and from then on without gradients."""
    trees = random_trees(5)
    model = load_policy(section(folder, dtype=dtype, **bits), Lora(r=4), seed=0)
    scorer = choose_scorer(model, trees[:3], 4096, "trees")
    reference = torch.cat(compute_reference(scorer, trees, getattr(torch, dtype)))
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        policy = scorer.score(trees).tokens
    assert torch.equal(policy, reference)
    policy.sum().backward()
    whole = model.get_base_model().model.layers[0]
    assert whole.self_attn.q_proj.lora_B["default"].weight.grad.norm() > 0
    hidden = torch.randn(1, 5, 128, requires_grad=True)
    model.eval()
    whole.mlp(hidden).sum().backward()
    assert hidden.grad is not None and hidden.grad.norm() > 0


@pytest.mark.parametrize("bits", [FOUR, EIGHT], ids=["4bit", "8bit"])
def test_the_self_check_is_exact_over_quantised_weights(folder: Path, bits: dict[str, Any]) -> None:
    model = load_policy(section(folder, dtype="bfloat16", **bits), Lora(r=4), seed=0)
    assert choose_scorer(model, random_trees(3), 4096).attention == "prefold_joined"
    packed = Scorer(model, 4096, "prefold_joined")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, wanted = (each.score(random_trees(6)).tokens for each in (packed, Scorer(model, 4096, None)))
    assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_under_autocast_layers_take_half_and_the_stream_stays_wide(folder: Path) -> None:
    model = load_policy(section(folder, dtype="bfloat16", **FOUR), Lora(r=4), seed=0)
    seen: dict[str, torch.dtype] = {}
    for name, module in model.named_modules():
        if name.endswith(("layers.1.input_layernorm", "layers.1.self_attn.v_proj")):
            module.register_forward_hook(lambda _, __, out, name=name: seen.update({name.split(".")[-1]: out.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.arange(9)[None])
    assert seen == {"input_layernorm": torch.float32, "v_proj": torch.bfloat16}


def test_the_key_of_the_reference_knows_the_bits(folder: Path) -> None:
    """Same tensors in memory, another dtype to compute in: another reference."""
    keys = set()
    for settings in (
        {},
        FOUR,
        {**FOUR, "bnb_4bit_compute_dtype": "bfloat16"},
        {**FOUR, "bnb_4bit_quant_type": "fp4"},
        EIGHT,
    ):
        model = load_policy(section(folder, **settings), Lora(r=2), seed=0)
        keys.add(_key(Scorer(model, 64, "prefold_joined"), torch.float32))
    assert len(keys) == 5


def test_quantised_modules_cannot_be_trained_whole(folder: Path) -> None:
    with pytest.raises(UserError, match="'up_proj' is quantised"):
        load_policy(section(folder, **FOUR), Lora(modules_to_save=["up_proj"]), seed=0)
    load_policy(section(folder, **FOUR), Lora(modules_to_save=["lm_head"]), seed=0)


def test_a_base_that_is_quantised_already(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    bits = BitsAndBytesConfig(load_in_4bit=True)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=bits).save_pretrained(tmp_path)
    for settings in ({}, FOUR):
        with pytest.raises(UserError, match="stored quantised") as caught:
            load_model(section(tmp_path, **settings), quantised=True)
        assert "unquantised" in caught.value.expected
