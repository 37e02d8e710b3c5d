"""GGUF files: what is written is read back as the model that it was, by transformers and by prefold's own loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from exportable import LLAMA3, PLAIN_TEXTS, TEXTS, byte_level, save_model, sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from prefold.errors import StageError, UserError
from prefold.models.fetch import fetch
from prefold.models.load import load_model
from prefold.models.tokenizer import load_tokenizer
from prefold.publishing import gguf as export
from prefold.publishing.gguf import export_gguf, interleaved, require_exportable, write_gguf
from prefold.recipe import Model

IDS = torch.tensor([[60, 61, 200, 5, 17, 99, 3, 250]])


@pytest.fixture(autouse=True)
def on_cpu_with_own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PREFOLD_CACHE", str(tmp_path / "cache"))
    # Collecting garbage takes longer than all else that these small models need.
    monkeypatch.setattr(export, "free_memory", lambda: None)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as far as an export needs it; its model is saved by the test."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "merge.json").write_text("{}")
    return folder


def exported(run: Path, *kinds: str, texts: list[str] = TEXTS) -> list[dict[str, Any]]:
    return export_gguf(run / "merged", run / "gguf", "tiny", kinds, texts)


def metadata(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 16}),
        ("llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 65536}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}}),
        ("mistral", {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
        ("qwen3", {"attention_bias": True}),
    ],
    ids=str,
)
def test_the_file_holds_the_model(run: Path, family: str, changes: dict[str, Any]) -> None:
    """A float16 model is in F16 what it was, to the bit; what reads it is prefold's loading of GGUF files."""
    save_model(run / "merged", family, dtype=torch.float16, **changes)
    [check] = exported(run, "F16")
    assert check["relative_difference"] < 1e-6
    file = run / "gguf" / check["file"]
    assert file.stat().st_size == check["bytes"]
    again, model = (load_model(Model(name=str(path), dtype="float32")) for path in (file, run / "merged"))
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
    assert load_tokenizer(fetch(str(file))).chat_template == byte_level("smollm").chat_template


def test_what_is_not_read_back_would_be_noticed(run: Path) -> None:
    """Positions matter in these models: the scaled ones are told from unscaled."""
    scaled = save_model(run / "merged", rope_parameters=LLAMA3, max_position_embeddings=65536)
    plain = save_model(run / "plain", rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    with torch.no_grad():
        assert not torch.allclose(scaled(IDS).logits, plain(IDS).logits, atol=1e-3)


@pytest.mark.parametrize(("kind", "largest"), [("F16", 2e-3), ("Q8_0", 3e-2)])
def test_rounding_is_measured(run: Path, kind: str, largest: float) -> None:
    save_model(run / "merged", "mistral", sliding_window=None)
    [check] = exported(run, kind)
    assert 1e-5 < check["relative_difference"] < largest
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(run / "gguf" / check["file"]).tensors}
    # 48 columns of the down projection are no whole number of blocks.
    assert kinds == ({"F32", "F16"} if kind == "F16" else {"F32", "F16", "Q8_0"})


@pytest.mark.parametrize("cuts", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_byte_level_tokenizers(run: Path, cuts: str) -> None:
    save_model(run / "merged", tokenizer=byte_level(cuts, bos="<|im_start|>" if cuts == "tekken" else None))
    [check] = exported(run, "F16")
    found = metadata(run / "gguf" / check["file"])
    assert found["tokenizer.ggml.pre"] == cuts and found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.add_bos_token"] == (cuts == "tekken")
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert tokens[found["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"
    assert [token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL] == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    ]


def test_sentencepiece_tokenizers(run: Path) -> None:
    save_model(run / "merged", "mistral", tokenizer=sentencepiece(), sliding_window=None)
    [check] = exported(run, "F16", texts=PLAIN_TEXTS)
    found = metadata(run / "gguf" / check["file"])
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_space_prefix"] is True
    score = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    kind = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"], strict=True))
    assert score["th"] > score["\u2581th"] > score["the"] > score["\u2581then"] > score["at"] > score["a"]
    assert (kind["<unk>"], kind["<s>"], kind["<0x0A>"], kind["th"]) == (2, 3, 6, 1)


def test_rows_without_a_token_get_one(run: Path) -> None:
    rows = len(byte_level("smollm")) + 5
    save_model(run / "merged", rows=rows)
    [check] = exported(run, "F16")
    tokens = metadata(run / "gguf" / check["file"])["tokenizer.ggml.tokens"]
    assert len(tokens) == rows and tokens[-1] == f"[PAD{rows - 1}]"


def test_a_sliding_window_bounds_the_context(run: Path) -> None:
    save_model(run / "merged", "mistral", sliding_window=64)
    [check] = exported(run, "F16")
    assert metadata(run / "gguf" / check["file"])["llama.context_length"] == 64


def test_an_export_is_made_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(run / "merged")
    first = exported(run, "F16", "Q8_0")
    monkeypatch.setattr(export, "write_gguf", lambda *_: pytest.fail("written again"))
    assert exported(run, "Q8_0", "F16") == first
    monkeypatch.undo()
    (run / "merge.json").write_text("{}")  # it was merged again
    before = (run / "gguf" / "tiny-F16.gguf").stat().st_mtime_ns
    exported(run, "F16")
    assert (run / "gguf" / "tiny-F16.gguf").stat().st_mtime_ns > before
    assert not (run / "gguf" / "tiny-Q8_0.gguf").exists()


def test_a_file_that_is_not_the_model_is_not_kept(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(run / "merged")
    monkeypatch.setattr(export, "interleaved", lambda weight, heads: weight)
    with pytest.raises(StageError, match=r"tiny-F16\.gguf is not the merged model: its logits differ"):
        exported(run, "F16")
    assert not (run / "gguf").exists() and [path.name for path in run.iterdir() if "tmp" in path.name] == []


def test_a_tokenizer_that_is_read_otherwise_is_not_kept(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(run / "merged", tokenizer=byte_level("llama-bpe"))
    monkeypatch.setattr("prefold.publishing.gguf_tokenizer.SPLITS", dict.fromkeys(export_splits(), "qwen2"))
    with pytest.raises(StageError, match="writes other ids"):
        exported(run, "F16")


def export_splits() -> dict[str, str]:
    from prefold.publishing.gguf_tokenizer import SPLITS

    return SPLITS


def test_numbers_beyond_f16(run: Path) -> None:
    model = save_model(run / "merged")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    model.save_pretrained(run / "merged")
    with pytest.raises(StageError, match=r"layers\.0\.mlp\.up_proj\.weight holds numbers that F16 does not"):
        exported(run, "F16")


def test_interleaved_rows() -> None:
    rows = torch.arange(8)[:, None]
    assert interleaved(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


# ---- what cannot be written -------------------------------------------------------------------------------------


def refused(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, *kinds: str) -> UserError:
    with pytest.raises(UserError) as caught:
        require_exportable(folder, tokenizer or AutoTokenizer.from_pretrained(folder), kinds or ("F16",), "my/model")
    return caught.value


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_other_families_are_refused_by_name(tmp_path: Path) -> None:
    save_model(tmp_path)
    change_config(tmp_path, model_type="gemma2")
    error = refused(tmp_path)
    assert "family gemma2" in error.what and "llama, mistral, qwen2, qwen3" in error.expected


def test_other_scalings_are_refused_by_name(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    save_model(tmp_path, "qwen2", rope_parameters=yarn)
    assert "`yarn`" in refused(tmp_path).what


def test_tokenizers_that_llama_cpp_has_not(tmp_path: Path) -> None:
    from base_model import base_tokenizer

    save_model(tmp_path)
    error = refused(tmp_path, base_tokenizer())
    assert "cuts text in a way that has no name" in error.what and "leave `gguf` out" in error.advice


def test_k_quants_need_llama_cpp(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save_model(run / "merged")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    error = refused(run / "merged", None, "F16", "Q4_K_M")
    assert "Q4_K_M is made by llama.cpp's `llama-quantize`" in error.what and "PATH" in error.advice


def quantizer(folder: Path, script: str) -> str:
    """A program that stands in for llama.cpp's; it writes down its arguments."""
    folder.mkdir()
    program = folder / "llama-quantize"
    program.write_text(f'#!/bin/sh\necho "$@" >> "{folder}/calls"\n{script}\n')
    program.chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


@pytest.mark.parametrize("kinds", [("Q4_K_M",), ("Q4_K_M", "F16")])
def test_k_quants_are_made_from_f16_and_checked(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, ...]
) -> None:
    save_model(run / "merged")
    monkeypatch.setenv("PATH", quantizer(tmp_path / "bin", 'cp "$1" "$2"'))
    checks = exported(run, *kinds)
    assert {check["kind"] for check in checks} == set(kinds)
    source, target, kind = (tmp_path / "bin" / "calls").read_text().split()
    assert Path(source).name == "tiny-F16.gguf" and Path(target).name == "tiny-Q4_K_M.gguf" and kind == "Q4_K_M"
    names = {path.name for path in (run / "gguf").iterdir()}
    assert names == {"checks.json", *(f"tiny-{kind}.gguf" for kind in kinds)}


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ('echo "unsupported" >&2; exit 1', "could not make Q4_K_M: unsupported"),
        ("exit 0", "could not make Q4_K_M: exit code 0"),
        ('head -c 5000 "$1" > "$2"', "tiny-Q4_K_M.gguf cannot be loaded back"),
    ],
)
def test_a_program_that_fails(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    save_model(run / "merged")
    monkeypatch.setenv("PATH", quantizer(tmp_path / "bin", script))
    with pytest.raises(StageError, match=message):
        exported(run, "Q4_K_M")
    assert not (run / "gguf").exists()


# ---- reading files of others ------------------------------------------------------------------------------------


def test_a_scaling_that_is_unknown_is_not_left_out(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(run / "merged", rope_parameters=LLAMA3, max_position_embeddings=65536)
    odd = LLAMA3 | {"original_max_position_embeddings": 4096}
    change_config(run / "merged", rope_parameters=odd)
    write_gguf(run / "merged", run / "odd.gguf", "F16", "odd")
    with pytest.raises(UserError, match="not Llama 3's"):
        fetch(str(run / "odd.gguf"))
