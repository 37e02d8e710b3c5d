"""Merging, and the checks that a merged model must pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from base_model import base_tokenizer, save_base
from peft import PeftModel
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from prefold.errors import StageError, UserError
from prefold.models import merge
from prefold.models.adapters import load_policy
from prefold.models.load import load_model
from prefold.models.merge import DEPTH, TOLERANCE, merge_adapter, merge_dtype, remarks, tolerance_of
from prefold.models.tokenizer import tokenizer_of
from prefold.recipe import Lora, Model, make_recipe

ROWS = [list(range(60, 100)), [5, 9, 256, 33, 257], [70, 71]]
PROMPTS = [row[:2] for row in ROWS]


def trained(base: Path, adapter: Path, lora: Lora | None = None, **settings: Any) -> Model:
    """A section for `base`, and a trained adapter for it."""
    section = Model(name=str(base), **{"dtype": "float32", **settings})
    model = load_policy(section, lora or Lora(r=4), seed=0)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(adapter, save_embedding_layers=False)
    return section


def merged(section: Model, folder: Path, dtype: str = "float32") -> dict[str, Any]:
    target = folder / "merged"
    return merge_adapter(section, folder / "adapter", target, tokenizer_of(section), ROWS, dtype, PROMPTS)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(torch.tensor([row])).logits[0] for row in ROWS])


@pytest.mark.parametrize(
    ("tied", "chat", "lora"),
    [
        (False, None, {"use_rslora": True}),
        (False, "chatml", {}),
        (False, "chatml", {"modules_to_save": ["lm_head"]}),
        (True, "chatml", {"use_dora": True}),
        (True, "chatml", {"modules_to_save": ["lm_head"]}),
    ],
)
def test_what_is_saved_is_base_and_adapter(tmp_path: Path, tied: bool, chat: str | None, lora: dict[str, Any]) -> None:
    base = save_base(tmp_path / "base", tie_word_embeddings=tied, rows=259)
    section = trained(base, tmp_path / "adapter", Lora(r=4, **lora), chat_template=chat)
    wanted = logits(PeftModel.from_pretrained(load_model(section), tmp_path / "adapter").eval())
    result = merged(section, tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(saved), wanted, rtol=1e-4, atol=1e-4)
    assert saved.config.tie_word_embeddings == tied == (saved.lm_head.weight is saved.model.embed_tokens.weight)
    assert len(saved.lm_head.weight) == (320 if chat else 259)
    assert result["relative_difference"] < 3e-5 < result["adapter_effect"]
    assert result["answers_compared"] == result["answers_equal"] == 3
    assert result["difference_from_quantised"] is None
    assert len(remarks(result)) == 1
    again = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert again.get_vocab() == tokenizer_of(section).get_vocab()


def test_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base and merged model in shards."""
    model = AutoModelForCausalLM.from_pretrained(save_base(tmp_path / "whole"))
    base = tmp_path / "base"
    model.save_pretrained(base, max_shard_size="40KB")
    base_tokenizer().save_pretrained(base)
    assert len(list(base.glob("model-*.safetensors"))) > 2
    section = trained(base, tmp_path / "adapter")
    monkeypatch.setattr(merge, "SHARD", "40KB")
    result = merged(section, tmp_path)
    shards = list((tmp_path / "merged").glob("model-*.safetensors"))
    assert len(shards) > 2 and result["relative_difference"] < 1e-5
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_after_quantised_training(tmp_path: Path, dtype: str, bits: str) -> None:
    """Into the unquantised base; how far that is from what was trained is measured against it."""
    pytest.importorskip("bitsandbytes")
    section = trained(save_base(tmp_path / "base"), tmp_path / "adapter", **{bits: True})
    result = merged(section, tmp_path, dtype)
    assert result["dtype"] == dtype and result["relative_difference"] <= result["tolerance"]
    quantised = load_model(section, quantised=True)
    there = logits(PeftModel.from_pretrained(quantised, tmp_path / "adapter").eval())
    here = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)).float()
    wanted = float((here - there).square().mean().sqrt() / there.square().mean().sqrt())
    assert result["difference_from_quantised"] == pytest.approx(wanted, rel=1e-3)
    assert 1e-3 < wanted < 0.5
    assert f"differ by {wanted:.1e}" in remarks(result)[1]


def test_answers_that_part_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = trained(save_base(tmp_path / "base"), tmp_path / "adapter")
    calls: list[int] = []

    def parting(model: Any, prompts: Any) -> list[list[int]]:
        calls.append(1)
        return [[len(calls) if place == 0 else 7] for place, _ in enumerate(prompts)]

    monkeypatch.setattr(merge, "_answers", parting)
    result = merged(section, tmp_path)
    assert (result["answers_equal"], result["answers_compared"]) == (2, 3)
    assert "differ from those of base + adapter at 1 of 3 prompts" in remarks(result)[-1]


def fails(section: Model, folder: Path, message: str) -> None:
    with pytest.raises(StageError, match=message):
        merged(section, folder)
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert not (folder / "merged").exists() and not list(folder.glob(".merged*"))


@pytest.mark.parametrize(
    ("model", "setting", "wanted"),
    [
        ({}, "auto", torch.float32),
        ({}, "float16", torch.float16),
        ({"load_in_4bit": True}, "auto", torch.float32),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}, "auto", torch.bfloat16),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}, "float16", torch.float16),
    ],
)
def test_the_dtype_that_is_merged_into(model: dict[str, Any], setting: str, wanted: torch.dtype) -> None:
    values = {"method": "dpo", "data": {"train": [{"path": "a.jsonl"}]}, "output_dir": "runs/a"}
    recipe = make_recipe({**values, "model": {"name": "base", **model}, "merge": {"dtype": setting}})
    assert merge_dtype(recipe, torch.float32) == wanted


def test_rounding_is_allowed_by_the_root_of_the_depth() -> None:
    shallow, deep = tiny_llama(num_hidden_layers=2), tiny_llama(num_hidden_layers=4 * DEPTH, hidden_size=8)
    assert tolerance_of(shallow) == TOLERANCE[torch.float32]
    assert tolerance_of(deep.half()) == pytest.approx(2 * TOLERANCE[torch.float16])


def test_a_wrong_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = trained(save_base(tmp_path / "base"), tmp_path / "adapter")
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self, **settings: self.unload(), raising=False)
    fails(section, tmp_path, "not base \\+ adapter")


def test_a_lost_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 260 rows of the head."""
    section = trained(save_base(tmp_path / "base"), tmp_path / "adapter", chat_template="chatml")
    save = PreTrainedModel.save_pretrained

    def loses_a_row(self: Any, folder: Any, **settings: Any) -> None:
        self.lm_head.weight.data[259] = 0
        save(self, folder, **settings)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", loses_a_row)
    fails(section, tmp_path, "not base \\+ adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: setattr(saved, "eos_token", "a"), "another eos_token_id"),
        (lambda saved: setattr(saved, "chat_template", "{{ messages }}"), "another chat_template"),
        (lambda saved: saved.add_tokens(["ab"]), "other ids for the same text"),
    ],
)
def test_a_changed_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str) -> None:
    section = trained(save_base(tmp_path / "base"), tmp_path / "adapter", chat_template="chatml")
    save = PreTrainedTokenizerFast.save_pretrained

    def changed(self: Any, folder: Any) -> None:
        save(self, folder)
        saved = AutoTokenizer.from_pretrained(folder)
        change(saved)
        save(saved, folder)

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", changed)
    ROWS[0][:2] = base_tokenizer()("ab")["input_ids"]
    fails(section, tmp_path, message)


def test_an_adapter_of_another_base(tmp_path: Path) -> None:
    trained(save_base(tmp_path / "base"), tmp_path / "adapter")
    other = Model(name=str(save_base(tmp_path / "other")), dtype="float32")
    with pytest.raises(UserError, match="is an adapter of"):
        merged(other, tmp_path)
