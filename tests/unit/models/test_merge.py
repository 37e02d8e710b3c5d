"""Merging, and the checks that a merged model must pass."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from base_model import base_tokenizer, save_base
from peft import PeftModel
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from prefold.errors import StageError, UserError
from prefold.models import merge
from prefold.models.adapters import load_policy
from prefold.models.load import load_model
from prefold.models.merge import DEPTH, TOKENS, TOLERANCE, compared, merge_adapter, merge_dtype, remarks, tolerance_of
from prefold.models.merged_files import MergedTensors, write_merged
from prefold.models.messages import quiet
from prefold.models.tokenizer import tokenizer_of
from prefold.recipe import Lora, Model, make_recipe

ROWS = [list(range(60, 100)), [5, 9, 256, 33, 257], [70, 71]]
CASES: list[tuple[bool, str | None, dict[str, Any]]] = [
    (False, None, {"use_rslora": True}),
    (False, "chatml", {}),
    (False, "chatml", {"modules_to_save": ["lm_head"]}),
    (True, "chatml", {"use_dora": True}),
    (True, "chatml", {"modules_to_save": ["lm_head"]}),
]


def trained(base: Path, adapter: Path, lora: Lora | None = None, change: float = 0.1, **settings: Any) -> Model:
    """A section for `base`, and a trained adapter for it."""
    section = Model(name=str(base), **{"dtype": "float32", **settings})
    model = load_policy(section, lora or Lora(r=4), seed=0)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += change * torch.randn_like(parameter)
    model.save_pretrained(adapter, save_embedding_layers=False)
    return section


def merged(
    section: Model, folder: Path, dtype: str = "float32", quantised: torch.Tensor | None = None
) -> dict[str, Any]:
    tokenizer = tokenizer_of(section)
    return merge_adapter(section, folder / "adapter", folder / "merged", tokenizer, ROWS, dtype, trained=quantised)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(torch.tensor([row])).logits[0] for row in ROWS])


@pytest.mark.parametrize(("tied", "chat", "lora"), CASES)
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
    assert result["likeliest_equal"] == result["tokens_compared"] == sum(map(len, ROWS))
    assert result["adapter_kept"] == pytest.approx(1, abs=1e-3)
    assert result["difference_from_quantised"] is None
    assert len(remarks(result)) == 1
    again = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert again.get_vocab() == tokenizer_of(section).get_vocab()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("tied", "chat", "lora"), CASES)
def test_files_are_those_of_peft_and_transformers(
    tmp_path: Path, tied: bool, chat: str | None, lora: dict[str, Any], dtype: str
) -> None:
    """Byte by byte what `merge_and_unload` and `save_pretrained` make of the whole model."""
    base = save_base(tmp_path / "base", tie_word_embeddings=tied, rows=259)
    section = trained(base, tmp_path / "adapter", Lora(r=4, **lora), chat_template=chat)
    for write, name in ((merge._write_whole, "whole"), (write_merged, "by tensor")):
        (tmp_path / name).mkdir()
        with quiet():
            write(section, tmp_path / "adapter", tmp_path / name, dtype, None, 0)
    contents, wanted = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("by tensor", "whole"))  # fmt: skip  # noqa: E501
    assert contents == wanted and len(wanted) == 3


def sharded_base(folder: Path, **settings: Any) -> Path:
    model = AutoModelForCausalLM.from_pretrained(save_base(folder.with_name("whole"), **settings))
    model.save_pretrained(folder, max_shard_size="40KB")
    base_tokenizer().save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_several_files(tmp_path: Path) -> None:
    """The merged model's weights lie in files as the base's do, with an index that transformers could have written."""
    base = sharded_base(tmp_path / "base")
    section = trained(base, tmp_path / "adapter")
    result = merged(section, tmp_path)
    names = {path.name for path in base.glob("model-*.safetensors")}
    assert len(names) > 2 and result["relative_difference"] < 1e-5
    assert {path.name for path in (tmp_path / "merged").glob("*.safetensors")} == names
    index, wanted = (
        json.loads((path / "model.safetensors.index.json").read_text()) for path in (tmp_path / "merged", base)
    )
    assert index == wanted
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {path.name for path in base.iterdir()}


def test_a_merge_that_was_ended_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are whole are kept; one that was damaged meanwhile is written anew; another adapter starts over."""
    section = trained(sharded_base(tmp_path / "base"), tmp_path / "adapter")
    read, asked = MergedTensors.__getitem__, list[str]()

    def ends(self: MergedTensors, name: str) -> torch.Tensor:
        asked.append(name)
        if len(asked) == 20:
            raise KeyboardInterrupt
        return read(self, name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MergedTensors, "__getitem__", ends)
        merged(section, tmp_path)
    assert not (tmp_path / "merged").exists()
    aside = tmp_path / ".merged.unfinished"
    done = json.loads((aside / "written.json").read_text())
    assert 1 < len(done) < len(list((tmp_path / "base").glob("*.safetensors")))
    damaged, *kept = sorted(done)
    (aside / damaged).write_bytes(b"damaged")
    before = {name: (aside / name).stat().st_mtime_ns for name in kept}
    merged(section, tmp_path)
    assert {name: (tmp_path / "merged" / name).stat().st_mtime_ns for name in kept} == before
    resumed = contents(tmp_path / "merged")
    merged(section, tmp_path)
    assert contents(tmp_path / "merged") == resumed and not aside.exists()

    asked.clear()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MergedTensors, "__getitem__", ends)
        merged(section, tmp_path)
    trained(tmp_path / "base", tmp_path / "adapter", change=0.2)
    merged(section, tmp_path)
    other = contents(tmp_path / "merged")
    merged(section, tmp_path)
    assert contents(tmp_path / "merged") == other != resumed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_after_quantised_training(tmp_path: Path, dtype: str, bits: str) -> None:
    """Into the unquantised base; how far that is from what was trained is measured against it."""
    pytest.importorskip("bitsandbytes")
    section = trained(save_base(tmp_path / "base"), tmp_path / "adapter", **{bits: True})
    quantised = load_model(section, quantised=True)
    there = logits(PeftModel.from_pretrained(quantised, tmp_path / "adapter").eval())
    result = merged(section, tmp_path, dtype, there)
    assert result["dtype"] == dtype and result["relative_difference"] <= result["tolerance"]
    here = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32"))
    wanted = float((here - there).square().mean().sqrt() / there.square().mean().sqrt())
    assert result["difference_from_quantised"] == pytest.approx(wanted, rel=1e-3)
    assert 1e-3 < wanted < 0.5
    assert f"differ by {wanted:.1e}" in remarks(result)[1]


def test_rounding_of_the_base_is_told_from_an_adapter_that_is_lost(tmp_path: Path) -> None:
    """In bfloat16 a base is rounded by more than its adapter moves it, which is there all the same. Of one that is so
    small that hardly a weight of a base in bfloat16 changes, little is left."""
    base = save_base(tmp_path / "base")
    section = trained(base, tmp_path / "adapter", Lora(r=4), change=4e-5)
    result = merged(section, tmp_path, "bfloat16")
    assert min(result["relative_difference"], result["base_rounding"]) > result["adapter_effect"]
    assert 0.6 < result["adapter_kept"] < 1.2
    assert "further than the adapter" in remarks(result)[1]

    AutoModelForCausalLM.from_pretrained(base, dtype="bfloat16").save_pretrained(base)
    section = trained(base, tmp_path / "adapter", Lora(r=4), change=3e-6)
    with pytest.raises(StageError, match=r"merging into bfloat16 loses the adapter.*merge.dtype=float32"):
        merged(section, tmp_path, "bfloat16")
    result = merged(section, tmp_path, "float32")
    assert result["adapter_kept"] == pytest.approx(1, abs=0.02) and result["base_rounding"] == 0


def test_an_adapter_that_does_nothing(tmp_path: Path) -> None:
    section = trained(save_base(tmp_path / "base"), tmp_path / "adapter", change=0.0)
    result = merged(section, tmp_path, "bfloat16")
    assert result["adapter_effect"] == 0 and result["adapter_kept"] is None
    assert "too little to say" in remarks(result)[1]


def test_tokens_that_part_are_reported(tmp_path: Path) -> None:
    result = merged(trained(save_base(tmp_path / "base"), tmp_path / "adapter"), tmp_path)
    assert len(remarks(result)) == 1
    said = remarks({**result, "likeliest_equal": result["tokens_compared"] - 3})[-1]
    assert f"another one at 3 of {sum(map(len, ROWS))} tokens" in said


def test_a_model_that_does_not_fit_the_gpu_is_compared_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    section = trained(save_base(tmp_path / "base"), tmp_path / "adapter")
    wanted = merged(section, tmp_path)
    capfd.readouterr()
    monkeypatch.setattr(merge, "choose_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(merge, "free_on", lambda device: 0)
    assert merged(section, tmp_path) == wanted
    assert capfd.readouterr().err.count("compared on the CPU") == 1


def test_where_models_are_compared(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """On the GPU; on the CPU where memory there does not do, or runs out; any other error is one."""
    cuda, cpu = torch.device("cuda", 1), torch.device("cpu")
    tried: list[torch.device] = []

    def compute(device: torch.device, error: Exception | None = None) -> str:
        tried.append(device)
        if error and device == cuda:
            raise error
        return str(device)

    monkeypatch.setattr(merge, "choose_device", lambda: cuda)
    monkeypatch.setattr(merge, "free_on", lambda device: 100 if device == cuda else 0)
    assert merge.where_it_fits(compute, 60) == "cuda:1" and tried == [cuda]
    assert capfd.readouterr().err == ""
    assert merge.where_it_fits(compute, 70) == "cpu" and tried == [cuda, cpu]
    assert len(capfd.readouterr().err.splitlines()) == 1
    tried.clear()
    no_memory = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    assert merge.where_it_fits(partial(compute, error=no_memory), 60) == "cpu" and tried == [cuda, cpu]
    assert len(capfd.readouterr().err.splitlines()) == 1
    with pytest.raises(RuntimeError, match="other"):
        merge.where_it_fits(partial(compute, error=RuntimeError("other")), 60)
    monkeypatch.setattr(merge, "choose_device", lambda: torch.device("mps"))
    assert merge.where_it_fits(compute, 60) == "cpu" and capfd.readouterr().err == ""


def test_what_is_compared_is_bounded() -> None:
    rows = compared([list(range(10_000)), [1, 2, 3], list(range(200))])
    assert sum(map(len, rows)) <= TOKENS and rows[1] == [1, 2, 3]
    assert rows[0][-1] == 9_999 and len(rows[0]) == len(rows[2]) == TOKENS // 3


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
    monkeypatch.setattr(MergedTensors, "__getitem__", lambda self, name: self._base(name, self.shapes[name].dtype))
    fails(section, tmp_path, "not base \\+ adapter")


def test_a_lost_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 260 rows of the head."""
    section = trained(save_base(tmp_path / "base"), tmp_path / "adapter", chat_template="chatml")
    read = MergedTensors.__getitem__

    def loses_a_row(self: MergedTensors, name: str) -> torch.Tensor:
        tensor = read(self, name).clone()
        if name == "lm_head.weight":
            tensor[259] = 0
        return tensor

    monkeypatch.setattr(MergedTensors, "__getitem__", loses_a_row)
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


def test_changes_below_a_rounding_step_are_not_lost(tmp_path: Path) -> None:
    """Added up in float32 and rounded once: rounding the base first would lose most of such an adapter."""
    base = save_base(tmp_path / "base")
    section = trained(base, tmp_path / "adapter", Lora(r=4), change=3e-4)
    whole = merged(section, tmp_path)
    (tmp_path / "merged").rename(tmp_path / "whole")
    rounded = merged(section, tmp_path, "float16")
    kept, wanted = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="float32").state_dict()
        for name in ("merged", "whole")
    )
    assert all(torch.equal(kept[name], wanted[name].half().float()) for name in wanted)
    assert whole["adapter_kept"] == pytest.approx(1, abs=1e-3) and rounded["adapter_kept"] > 0.9
