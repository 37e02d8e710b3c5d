"""Whole runs over quantised weights, from an adapter, and from a base model that has no chat format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from base_model import base_tokenizer, save_base
from peft import AutoPeftModelForCausalLM
from run_files import lines
from safetensors.torch import load_file
from tiny import SHAPE
from tiny_tokenizer import CHATML
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, MistralForCausalLM

import prefold
from prefold.errors import StageError, UserError
from prefold.models.adapters import open_adapter
from prefold.models.load import load_model
from prefold.models.merge import logits_of
from prefold.recipe import RecipeBase
from prefold.runs.context import Run
from prefold.runs.opened import compared_rows, trained_logits
from prefold.training.loop import TrainingLoop
from prefold.trees.fused_layers import fuse_lora

pytest.importorskip("bitsandbytes")

MakeRecipe = Callable[..., RecipeBase]
FOUR = {"load_in_4bit": True}


def merge_record(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "merge.json").read_text())
    return record


# ---- 4 and 8 bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "dtype"),
    [(FOUR, "float32"), (FOUR, "bfloat16"), ({"load_in_8bit": True}, "float32")],
    ids=["4bit-float32", "4bit-bfloat16", "8bit-float32"],
)
def test_quantised_training_ends_in_a_whole_model(
    recipe: MakeRecipe, tiny_model: Path, model: dict[str, Any], dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = recipe(model={**model, "dtype": dtype})
    folder = prefold.run(made)
    assert "plain path" not in caplog.text
    metrics = lines(folder / "metrics.jsonl")
    assert metrics[0]["loss"] == pytest.approx(0.6931472, abs=1e-5 if dtype == "float32" else 5e-3)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert not hasattr(merged.config, "quantization_config")
    assert torch.equal(merged.lm_head.weight.to(getattr(torch, dtype)), base.lm_head.weight.to(getattr(torch, dtype)))
    record = merge_record(folder)
    assert record["dtype"] == dtype
    assert 0 < record["difference_from_quantised"] < 1
    trained = open_adapter(load_model(made.model, quantised=True), folder / "adapter")
    fuse_lora(trained)  # as it is in training: PEFT's own layers round otherwise
    rows = compared_rows(made, Run(made).checked_data().train)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        torch.testing.assert_close(trained_logits(folder), logits_of(trained, rows), rtol=1e-4, atol=1e-4)
    assert 0 < record["likeliest_equal"] <= record["tokens_compared"]


# ---- a base model learns a chat format --------------------------------------------------------------------------


def learns_to_chat(recipe: MakeRecipe, base: Path, **changes: Any) -> Path:
    settings = {"lora": {"lora_dropout": 0.0, "r": 16}, "train": {"max_steps": 40, "learning_rate": 2e-2}, **changes}
    model = {"name": str(base), "chat_template": "chatml", "attn_implementation": "trees"}
    return prefold.run(recipe(model=model, **settings))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_base_model_learns_where_its_turns_end(recipe: MakeRecipe, tmp_path: Path, tied: bool) -> None:
    """The merged model, in plain transformers, answers and stops by itself; so does base + adapter in plain peft."""
    base = save_base(tmp_path / "base", tie_word_embeddings=tied)
    folder = learns_to_chat(recipe, base)
    tokenizer = AutoTokenizer.from_pretrained(folder / "merged")
    model = AutoModelForCausalLM.from_pretrained(folder / "merged")
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    known = len(base_tokenizer())
    assert (start, end, len(tokenizer)) == (known, known + 1, known + 2)
    assert tokenizer.eos_token_id == model.config.eos_token_id == end
    assert model.generation_config.eos_token_id == [end, base_tokenizer().eos_token_id]
    assert tokenizer.pad_token_id == model.config.pad_token_id == base_tokenizer().eos_token_id
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == 320
    assert model.config.tie_word_embeddings == tied

    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    trained = {name.split(".")[-3]: rows.shape for name, rows in weights.items() if "token" in name}
    assert trained == dict.fromkeys(["embed_tokens"] if tied else ["embed_tokens", "lm_head"], (2, 32))
    assert max(tensor.numel() for tensor in weights.values()) < 258 * 32
    before = AutoModelForCausalLM.from_pretrained(base)
    for layer in ("get_input_embeddings", "get_output_embeddings"):
        rows = getattr(model, layer)().weight
        assert torch.equal(rows[:known], getattr(before, layer)().weight)  # the rest of the matrix stays as it was
        assert (rows[start] - rows[-1]).norm() > 0.1 * rows[-1].norm() + 0.01
        assert (rows[end] - rows[-1]).norm() > 0.1 * rows[-1].norm() + 0.01

    turns = [{"role": "user", "content": "Say word 3"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**prompt, max_new_tokens=60, do_sample=False)[0]
    assert written[-1] == end and len(written) < prompt["input_ids"].shape[1] + 60

    assert AutoTokenizer.from_pretrained(folder / "adapter").get_vocab() == tokenizer.get_vocab()
    adapted = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")  # resizes by the adapter's tokenizer
    with torch.no_grad():
        found, wanted = (each(input_ids=prompt["input_ids"]).logits[..., : known + 2] for each in (adapted, model))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [MistralForCausalLM, LlamaForCausalLM])
def test_orpo_teaches_a_base_model_in_shards_to_chat(recipe: MakeRecipe, tmp_path: Path, kind: Any) -> None:
    base = save_base(tmp_path / "base")
    shape = {**SHAPE, "vocab_size": len(base_tokenizer()), "initializer_range": 0.05, "tie_word_embeddings": False}
    torch.manual_seed(0)
    kind(kind.config_class(**shape, eos_token_id=base_tokenizer().eos_token_id)).save_pretrained(
        base, max_shard_size="40KB"
    )
    (base / "model.safetensors").unlink()
    merged = learns_to_chat(recipe, base, method="orpo") / "merged"
    files = {path.name for path in base.glob("model-*.safetensors")}
    assert {path.name for path in merged.glob("*.safetensors")} == files and len(files) > 2
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    assert type(model) is kind
    turns = [{"role": "user", "content": "Say word 3"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**prompt, max_new_tokens=60, do_sample=False)[0]
    assert written[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert len(written) < prompt["input_ids"].shape[1] + 60


def test_a_stopped_run_that_learns_to_chat_ends_with_the_same_bytes(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"model": {"name": str(save_base(tmp_path / "base")), "chat_template": "chatml", **FOUR}}
    straight = prefold.train(recipe(**settings, output_dir=str(tmp_path / "straight")))
    stop_at(3, lambda: prefold.train(recipe(**settings)), monkeypatch)
    resumed = prefold.train(recipe(**settings))
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (resumed / name).read_bytes() == (straight / name).read_bytes(), name


def stop_at(stop: int, run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    step = TrainingLoop.step

    def stopping(self: TrainingLoop) -> None:
        if self.state.global_step == stop:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            run()


def test_full_fine_tuning_of_a_base_model(recipe: MakeRecipe, tmp_path: Path) -> None:
    model = {"name": str(save_base(tmp_path / "base")), "chat_template": "chatml"}
    folder = prefold.run(recipe(model=model, lora="none", train={"learning_rate": 1e-3}))
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert merged.config.vocab_size == 320 and merged.config.eos_token_id == 259
    assert AutoTokenizer.from_pretrained(folder / "merged").eos_token_id == 259


def test_a_base_model_without_the_setting(recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no chat template") as caught:
        prefold.run(recipe(model={"name": str(save_base(tmp_path / "base"))}))
    assert "model.chat_template" in caught.value.advice


# ---- going on from an adapter -----------------------------------------------------------------------------------


def test_training_goes_on_from_an_adapter(recipe: MakeRecipe, tmp_path: Path) -> None:
    """The second run begins where the first ended, and its reference is the first run's result, not the bare base."""
    first = prefold.run(recipe(lora={"lora_dropout": 0.0}, model=FOUR, output_dir=str(tmp_path / "first")))
    second = prefold.run(recipe(model={**FOUR, "adapter": str(first / "adapter")}, lora=None))
    metrics = lines(second / "metrics.jsonl")
    assert metrics[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)  # policy and reference are one at first
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    start, end = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (first, second))
    assert start.keys() == end.keys() and any(not torch.equal(start[name], end[name]) for name in start)
    assert "lora: null" in (second / "recipe.yaml").read_text()
    scores = [json.loads((folder / "evaluation" / "heldout.json").read_text()) for folder in (first, second)]
    assert scores[1]["before"]["margin"] == pytest.approx(scores[0]["after"]["margin"], rel=1e-4)


def test_a_stopped_run_from_an_adapter_keeps_its_reference(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prefold.train(recipe(output_dir=str(tmp_path / "first")))
    settings: dict[str, Any] = {"model": {"adapter": str(first / "adapter")}, "lora": None}
    straight = prefold.train(recipe(**settings, output_dir=str(tmp_path / "straight")))
    stop_at(3, lambda: prefold.train(recipe(**settings)), monkeypatch)
    monkeypatch.setenv("PREFOLD_CACHE", str(tmp_path / "another cache"))  # so that the reference is computed again
    resumed = prefold.train(recipe(**settings))
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (resumed / name).read_bytes() == (straight / name).read_bytes(), name


# ---- LoRA's kin, optimizers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lora",
    [
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True, "bits": "load_in_4bit"},
    ],
    ids=lambda lora: "-".join(lora),
)
def test_kinds_of_lora_train_and_merge(
    recipe: MakeRecipe, lora: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    lora = dict(lora)
    model = {lora.pop("bits"): True} if "bits" in lora else {}
    folder = prefold.run(recipe(lora={**lora, "lora_dropout": 0.0}, model={**model, "attn_implementation": "trees"}))
    metrics = lines(folder / "metrics.jsonl")
    assert metrics[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert merge_record(folder)["relative_difference"] < 1e-4


def test_dora_over_8_bits_needs_a_gpu(recipe: MakeRecipe) -> None:
    with pytest.raises(UserError, match="DoRA over 8-bit weights"):
        prefold.train(recipe(lora={"use_dora": True}, model={"load_in_8bit": True}))


def test_tied_modules_that_are_saved_stay_tied(recipe: MakeRecipe, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    (base / "chat.jinja").write_text(CHATML)
    settings = {"modules_to_save": ["embed_tokens"], "lora_dropout": 0.0}
    folder = prefold.run(recipe(lora=settings, model={"name": str(base), "chat_template": "chatml"}))
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert merged.config.tie_word_embeddings and merged.lm_head.weight is merged.model.embed_tokens.weight
    moved = (merged.lm_head.weight[:258] - AutoModelForCausalLM.from_pretrained(base).lm_head.weight).abs().amax(-1)
    assert (moved > 0).sum() > 200


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "lion_8bit"])
def test_optimizers_of_bitsandbytes(
    recipe: MakeRecipe, tmp_path: Path, optim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"train": {"optim": optim, "learning_rate": 1e-3}}
    straight = prefold.train(recipe(**settings, output_dir=str(tmp_path / "straight")))
    assert lines(straight / "metrics.jsonl")[-1]["loss"] < 0.6931
    stop_at(3, lambda: prefold.train(recipe(**settings)), monkeypatch)
    resumed = prefold.train(recipe(**settings))
    assert (resumed / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("optim", ["adamw_torch_4bit", "grokadamw", "adamw_anyprecision"])
def test_optimizers_that_cannot_be_had(recipe: MakeRecipe, optim: str) -> None:
    with pytest.raises(UserError, match=f"`train.optim`: `{optim}` is not available here"):
        prefold.train(recipe(train={"optim": optim}))


# ---- merging ----------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_changes_on_disk_fails_the_stage(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedTokenizerFast

    save = PreTrainedTokenizerFast.save_pretrained

    def forgets_the_template(self: Any, folder: Any, **settings: Any) -> Any:
        found = save(self, folder, **settings)
        (Path(folder) / "chat_template.jinja").unlink()
        return found

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", forgets_the_template)
    with pytest.raises(StageError, match="saved tokenizer has another chat_template"):
        prefold.run(recipe())
    folder = recipe().run_folder
    assert (folder / "adapter").is_dir() and not (folder / "merged").exists()


# ---- a real model -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.real_model
def test_smollm2_in_4_bits(smollm2: Path, tmp_path: Path) -> None:
    """A few steps of QLoRA on the demo's data: packed, learning, and merged into the whole weights."""
    overrides = {
        "model.name": str(smollm2),
        "model.load_in_4bit": "true",
        "model.bnb_4bit_use_double_quant": "true",
        "model.attn_implementation": "trees",
        "data.train.0.count": "16",
        "data.eval.0.count": "8",
        "train.max_steps": "4",
        "train.batch_size": "4",
        "train.optim": "paged_adamw_8bit",
        "evaluate.prompts": "1",
        "output_dir": str(tmp_path / "run"),
    }
    folder = prefold.run("demo", [f"{name}={value}" for name, value in overrides.items()])
    metrics = lines(folder / "metrics.jsonl")
    assert metrics[-1]["rewards/margins"] > metrics[0]["rewards/margins"]
    record = merge_record(folder)
    assert record["relative_difference"] <= record["tolerance"]
    assert 0.01 < record["difference_from_quantised"] < 1  # 4 bits cost a model this small much
