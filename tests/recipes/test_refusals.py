"""Models, adapters and settings that cannot work: `check` and `run` say the same in one message, and write nothing."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SHAPE, tiny_llama
from tiny_tokenizer import CHATML, make_tokenizer, save_chat_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

import prefold
from prefold.cli import main
from prefold.errors import UserError
from prefold.models.adapters import add_lora
from prefold.recipe import Lora, RecipeBase, as_dict

MakeRecipe = Callable[..., RecipeBase]
Changes = dict[str, Any]
TOKENIZER = make_tokenizer(CHATML, bos="<|im_start|>")
TEXT = {**SHAPE, "vocab_size": len(TOKENIZER), "eos_token_id": TOKENIZER.eos_token_id, "bos_token_id": 0}


def described(kind: str, *classes: str, **settings: Any) -> Callable[[Path], Changes]:
    """A model of which config.json says enough: its weights are one number."""

    def build(folder: Path) -> Changes:
        folder.mkdir()
        config = {"model_type": kind, "architectures": list(classes), "vocab_size": len(TOKENIZER), **settings}
        (folder / "config.json").write_text(json.dumps(config))
        save_file({"weight": torch.ones(1)}, folder / "model.safetensors")
        TOKENIZER.save_pretrained(folder)
        return {}

    return build


def real(kind: str, change: Callable[[Path], Any] | None = None, **settings: Any) -> Callable[[Path], Changes]:
    """A random model of a family, and what was done to its folder afterwards."""

    def build(folder: Path) -> Changes:
        own = settings.pop("changes", {})
        shape = {"n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 2} if kind == "gpt2" else TEXT
        config = AutoConfig.for_model(kind, **{**shape, "vocab_size": len(TOKENIZER), **settings})
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        TOKENIZER.save_pretrained(folder)
        if change is not None:
            change(folder)
        return dict(own)

    return build


def llama(change: Callable[[Path], Any] | None = None, **changes: Any) -> Callable[[Path], Changes]:
    """A sound model, something done to its folder, and changes of the recipe."""

    def build(folder: Path) -> Changes:
        save_chat_model(folder, **changes.pop("model_settings", {}))
        told = change(folder) if change is not None else None
        return {**changes, **(told if isinstance(told, dict) else {})}

    return build


def config(**values: Any) -> Callable[[Path], None]:
    return values_in("config.json", **values)


def values_in(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | values))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})

    return write


def in_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return write


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def sharded(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {
        "lm_head.weight": "model-00002-of-00002.safetensors",
        "model.norm.weight": "model-00001-of-00002.safetensors",
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def more_tokens(folder: Path) -> None:
    """Chat tokens were added to the tokenizer alone."""
    tokenizer = make_tokenizer(CHATML.replace("<|im_start|>", "<|turn|>"))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|turn|>"]})
    tokenizer.save_pretrained(folder)


def token_in_data(folder: Path) -> Changes:
    """The tokenizer has a token that the model has no row for, and one text holds it."""
    tokenizer = make_tokenizer(CHATML)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|image|>"]}, replace_extra_special_tokens=False)
    tokenizer.save_pretrained(folder)
    rows = [
        {"prompt": f"Say {i}", "chosen": "A <|image|>" if i == 7 else f"Yes {i}!", "rejected": "no"} for i in range(20)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data": {"train": [{"path": str(folder / "rows.jsonl")}]}}


def classifier(labels: int, **more: Any) -> Callable[[Path], Changes]:
    def build(folder: Path) -> Changes:
        LlamaForSequenceClassification(LlamaConfig(**TEXT, num_labels=labels)).save_pretrained(folder)
        TOKENIZER.save_pretrained(folder)
        return more

    return build


def adapter(base: Path, change: Callable[[Path], Any] | None = None, **settings: Any) -> Changes:
    """A LoRA adapter of a model like that in the folder `base`, or what was made of it."""
    shape = settings.pop("shape", {})
    model = add_lora(tiny_llama(**{**TEXT, **shape}), Lora(r=2, **settings), 0)
    folder = base.with_name("adapter")
    model.save_pretrained(folder)
    values_in("adapter_config.json", base_model_name_or_path=base.name)(folder)
    if change is not None:
        change(folder)
    return {"model": {"adapter": str(folder)}, "lora": None}


def without_base(folder: Path) -> None:
    """As training saves it: peft adds the embeddings under LoRA to the file."""
    file = folder / "adapter_model.safetensors"
    save_file({name: weight for name, weight in load_file(file).items() if "base_layer" not in name}, file)


def an_adapter_itself(folder: Path) -> None:
    adapter(folder)
    shutil.rmtree(folder)
    folder.with_name("adapter").rename(folder)


def sampled(**changes: Any) -> Changes:
    return {"method": "grpo", "rewards": [{"name": "length", "target": 20}], "train": {"batch_size": 2}, **changes}


def scored_by(build: Callable[[Path], Changes]) -> Callable[[Path], Changes]:
    """A sound model whose completions are scored by another one."""

    def both(folder: Path) -> Changes:
        build(folder.with_name("judge"))
        save_chat_model(folder)
        return sampled(rewards=[{"name": "reward_model", "model": str(folder.with_name("judge"))}])

    return both


TIED = {"model_settings": {"tie_word_embeddings": True}}

MODELS: dict[str, tuple[Callable[[Path], Changes], str]] = {
    # Kinds that are none to train.
    "t5": (described("t5", "T5ForConditionalGeneration"), "is an encoder-decoder"),
    "bart": (described("bart", "BartForConditionalGeneration"), "is an encoder-decoder"),
    "marian": (described("marian", "MarianMTModel"), "is an encoder-decoder"),
    "whisper": (described("whisper", "WhisperForConditionalGeneration"), "is an encoder-decoder"),
    "bert": (real("bert"), "every token sees those after it"),
    "bert masked": (described("bert", "BertForMaskedLM"), "every token sees those after it"),
    "roberta": (described("roberta", "RobertaForCausalLM"), "every token sees those after it"),
    "electra": (described("electra", "ElectraForMaskedLM"), "every token sees those after it"),
    "xlnet": (described("xlnet", "XLNetLMHeadModel"), "every token sees those after it"),
    "modernbert": (described("modernbert", "ModernBertForMaskedLM"), "every token sees those after it"),
    "two ways": (
        described("gemma3_text", "Gemma3TextModel", use_bidirectional_attention=True),
        "every token sees those after it",
    ),
    "vit": (described("vit", "ViTForImageClassification"), "it is none that writes text"),
    "classifier": (classifier(1), "is a sequence classifier: it scores texts and writes none"),
    "tagger": (described("llama", "LlamaForTokenClassification"), "is a token classifier"),
    "questions": (described("llama", "LlamaForQuestionAnswering"), "marks answers in a text"),
    "trunk": (described("llama", "LlamaModel"), r"has no head that writes tokens \(LlamaModel\)"),
    "embeddings": (llama(values_in("modules.json", idx=0)), "is a model for embeddings of texts"),
    # More than text.
    "gemma3": (described("gemma3", "Gemma3ForConditionalGeneration"), r"more than a text model \(vision\)"),
    "qwen3.5": (described("qwen3_5", "Qwen3_5ForConditionalGeneration"), r"more than a text model \(vision\)"),
    "llava": (described("llava", "LlavaForConditionalGeneration"), r"more than a text model \(vision\)"),
    "qwen2 audio": (
        described("qwen2_audio", "Qwen2AudioForConditionalGeneration"),
        r"more than a text model \(audio\)",
    ),
    "phi4": (described("phi4_multimodal", "Phi4MultimodalForCausalLM"), r"more than a text model \(audio, vision\)"),
    # Stored quantised.
    "gptq": (described("llama", quantization_config={"quant_method": "gptq", "bits": 4}), r"stored quantised \(gptq\)"),
    "awq": (described("llama", quantization_config={"quant_method": "awq", "bits": 4}), r"stored quantised \(awq\)"),
    "fp8": (described("llama", quantization_config={"quant_method": "fp8"}), r"stored quantised \(fp8\)"),
    "mxfp4": (described("gpt_oss", quantization_config={"quant_method": "mxfp4"}), r"stored quantised \(mxfp4\)"),
    "bitsandbytes": (
        described("llama", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        r"stored quantised \(bitsandbytes\)",
    ),
    "fp8 unsaid": (
        llama(weights(lambda w: w.update({"lm_head.weight": w["lm_head.weight"].to(torch.float8_e4m3fn)}))),
        r"stored quantised \(F8_E4M3\)",
    ),
    # Configurations and files.
    "own code": (
        described("homemade", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}),
        "Python code",
    ),
    "unknown type": (described("homemade"), "its configuration cannot be read"),
    "damaged config": (llama(lambda folder: (folder / "config.json").write_text("{")), "configuration cannot be read"),
    "pickled": (llama(pickled), "holds pickled weights only"),
    "no weights": (llama(lambda folder: (folder / "model.safetensors").unlink()), r"holds no \*.safetensors"),
    "missing shard": (llama(sharded), "1 of 2 weight files are missing, e.g. model-00002"),
    "empty file": (llama(in_bytes(lambda content: b"")), "model.safetensors is no file of safetensors"),
    "cut off": (llama(in_bytes(lambda content: content[:-9])), "has 163,679 bytes, its header calls for 163,688"),
    "cut-off header": (llama(in_bytes(lambda content: content[:99])), "its header is cut off"),
    "garbage": (llama(in_bytes(lambda content: b"\xff" * 99)), "is no file of safetensors"),
    "missing tensor": (
        llama(weights(lambda w: w.pop("model.norm.weight"))),
        "lack 1 tensors .* e.g. model.norm",
    ),
    "left-over tensor": (llama(weights(lambda w: w.update(v_head=torch.ones(2)))), "hold 1 tensors .* e.g. v_head"),
    "other width": (llama(config(hidden_size=48, head_dim=8)), "have another shape than its configuration says"),
    "other vocabulary": (llama(config(vocab_size=999)), "another shape .* e.g. lm_head.weight"),
    "no tokenizer": (llama(without_tokenizer), "has no tokenizer"),
    "adapter as model": (llama(an_adapter_itself), "is an adapter, not a model"),
    # Vocabulary and positions.
    "chat tokens": (llama(more_tokens), r"the token '<\|turn\|>' has the id 264, .* have 264 rows"),
    "token in data": (
        llama(token_in_data),
        r"rows.jsonl, row 8: the token '<\|image\|>' has the id 264, ",
    ),
    "end token": (
        llama(values_in("generation_config.json", eos_token_id=[2, 5000])),
        "has the id 5,000, .* have 264 rows",
    ),
    "padding": (llama(config(bos_token_id=264)), "`bos_token_id` of config.json: .* has the id 264"),
    "gpt2 positions": (real("gpt2"), r"tokens in a row, and the model's table of positions has 16 rows"),
    "opt positions": (
        real("opt", max_position_embeddings=32, ffn_dim=32, word_embed_proj_dim=32),
        r"tokens in a row, and the model's table of positions has 32 rows",
    ),
    "answers' positions": (
        real("gpt2", n_positions=128, changes={"evaluate": {"max_new_tokens": 99}}),
        "prompt 1 of `evaluate` and its answer: 1.. tokens in a row",
    ),
    "samples' positions": (
        real("gpt2", n_positions=256, changes=sampled(grpo={"max_completion_length": 240})),
        "lower `grpo.max_completion_length`",
    ),
    # Models that score.
    "two labels": (classifier(2, method="reward"), "is a classifier with several labels"),
    "bert scores": (described("bert", "BertForSequenceClassification"), "every token sees those after it"),
    "reward that writes": (scored_by(lambda folder: save_chat_model(folder) and {}), "is not a reward model"),
    "reward of two labels": (scored_by(classifier(2)), "has 2 labels, not one"),
}

ADAPTERS: dict[str, tuple[Callable[[Path], Changes], str]] = {
    "tied embeddings": (
        llama(**TIED, lora={"r": 2, "target_modules": ["q_proj", "embed_tokens"]}),
        r"(?s)`embed_tokens` shares its matrix .* `lora.modules_to_save: \[embed_tokens\]`",
    ),
    "tied head": (llama(**TIED, lora={"r": 2, "target_modules": ["lm_head"]}), "`lm_head` shares its matrix"),
    "tied by pattern": (
        llama(**TIED, lora={"r": 2, "target_modules": ".*(q_proj|tokens)"}),
        "`embed_tokens` shares its",
    ),
    "dropout on experts": (
        real("mixtral", num_local_experts=2),
        "`lora.lora_dropout`: there is no dropout for LoRA on",
    ),
    "no target": (llama(lora={"target_modules": ["q_porj"]}), "no module of the model is called 'q_porj'"),
    "no module": (llama(lora={"modules_to_save": ["haed"]}), "no module of the model is called 'haed'"),
    "no folder": (llama(model={"adapter": "nowhere"}, lora=None), "is not an adapter folder"),
    "other base": (
        llama(lambda f: adapter(f, values_in("adapter_config.json", base_model_name_or_path="acme/other"))),
        "is an adapter of `acme/other`, not of",
    ),
    "other shape": (
        llama(lambda f: adapter(f, shape={"hidden_size": 64})),
        "does not fit the model .*: size mismatch for",
    ),
    "other layers": (llama(lambda f: adapter(f, shape={"num_hidden_layers": 4})), "tensors without a place"),
    "other kind": (
        llama(lambda f: adapter(f, values_in("adapter_config.json", peft_type="LOKR"))),
        "is an adapter of kind LOKR",
    ),
    "no score head": (llama(lambda f: {**adapter(f), "method": "reward"}), "has no score head"),
    "tied adapter": (
        llama(lambda f: adapter(f, without_base, target_modules=["embed_tokens"]), **TIED),
        "`embed_tokens` shares its matrix",
    ),
}

SETTINGS: dict[str, tuple[Changes, str]] = {
    "galore": ({"train": {"optim": "galore_adamw"}}, "`galore_adamw` needs `optim_target_modules`"),
    "apollo": ({"train": {"optim": "apollo_adamw"}}, "`apollo_adamw` needs `optim_target_modules`"),
    "lomo": ({"train": {"optim": "lomo"}}, "`lomo` changes weights during the backward pass"),
    "adalomo": ({"train": {"optim": "adalomo"}}, "`adalomo` changes weights"),
    "schedule-free": ({"train": {"optim": "schedule_free_adamw"}}, "trains on other weights than it evaluates"),
    "torchao": ({"train": {"optim": "adamw_torch_4bit"}}, "`adamw_torch_4bit` is not available here: .*torchao"),
    "grokadamw": ({"train": {"optim": "grokadamw"}}, "`grokadamw` is not available here: .*grokadamw"),
    "no floor": ({"train": {"lr_scheduler_type": "cosine_with_min_lr"}}, "One of min_lr or min_lr_rate should be set"),
    "no decay": ({"train": {"lr_scheduler_type": "warmup_stable_decay"}}, "num_decay_steps"),
    "idle settings": (
        {"train": {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"num_cycles": 2}}},
        "would be ignored: `constant` has no settings",
    ),
}


@pytest.fixture
def refused(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[Path, Changes], str]:
    """What both commands say of a recipe, after both have exit code 2, no traceback and nothing written."""
    monkeypatch.delenv("PREFOLD_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)

    def call(model: Path, changes: Changes) -> str:
        values = as_dict(recipe())
        values["output_dir"] = "runs/refused"
        if changes.get("method", "dpo") != "dpo":
            values.pop("dpo")
        if changes.get("method") == "reward":
            values.pop("evaluate")
        for name, change in {**changes, "model": {"name": str(model), **changes.get("model", {})}}.items():
            values[name] = {**values[name], **change} if isinstance(values.get(name), dict) and change else change
        (tmp_path / "recipe.yaml").write_text(json.dumps(values))
        before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
        said = []
        for command in ("check", "run"):
            monkeypatch.setattr(sys, "argv", ["prefold", command, "recipe.yaml"])
            capfd.readouterr()
            with pytest.raises(SystemExit) as stop:
                main()
            err = capfd.readouterr().err
            assert stop.value.code == 2 and "Traceback" not in err, err
            said.append(err[err.index("prefold: ") :])
        assert said[0] == said[1]
        assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before
        return said[0]

    return call


@pytest.mark.parametrize("case", [*MODELS, *ADAPTERS])
def test_models_and_adapters(case: str, refused: Callable[[Path, Changes], str], tmp_path: Path) -> None:
    build, wanted = {**MODELS, **ADAPTERS}[case]
    said = refused(tmp_path / "base", build(tmp_path / "base"))
    assert re.search(wanted, said), said


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(case: str, refused: Callable[[Path, Changes], str], tiny_model: Path) -> None:
    changes, wanted = SETTINGS[case]
    said = refused(tiny_model, changes)
    assert re.search(wanted, said), said


# ---- the same everywhere ----------------------------------------------------------------------------------------

COMMANDS = {
    "generate": ["generate", "MODEL", "Hello"],
    "chat": ["chat", "MODEL"],
    "compare": ["compare", "MODEL", "OTHER", "--tasks", "everyday_facts"],
    "pairs": ["pairs", "prompts.jsonl", "--model", "MODEL", "--output", "pairs.jsonl", "--reward", "length:target=20"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("case", ["bert", "gptq", "cut off", "chat tokens"])
def test_every_command(
    command: str,
    case: str,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    build, wanted = MODELS[case]
    build(tmp_path / "base")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hello"}\n{"prompt": "Well"}\n')
    names = {"MODEL": str(tmp_path / "base"), "OTHER": str(tiny_model)}
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    monkeypatch.setattr(sys, "argv", ["prefold", *(names.get(word, word) for word in COMMANDS[command])])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capfd.readouterr().err
    assert stop.value.code == 2 and re.search(wanted, said) and "Traceback" not in said, said
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before


def test_a_model_to_compare_with(refused: Callable[[Path, Changes], str], tiny_model: Path, tmp_path: Path) -> None:
    MODELS["bert"][0](tmp_path / "other")
    evaluate = {"tasks": ["everyday_facts"], "compare_with": [str(tmp_path / "other")]}
    assert "every token sees those after it" in refused(tiny_model, {"evaluate": evaluate})


def test_a_prompt_of_a_token_without_a_row(tmp_path: Path) -> None:
    """It is said of the prompt that has it; others are answered."""
    token_in_data(save_chat_model(tmp_path / "base"))
    assert prefold.generate(tmp_path / "base", "Hello", max_new_tokens=2)
    with pytest.raises(UserError, match=r"prompt 1: the token '<\|image\|>' has the id 264"):
        prefold.generate(tmp_path / "base", "Hello <|image|>", max_new_tokens=2)


def test_a_prompt_without_positions_for_its_answer(tmp_path: Path) -> None:
    real("gpt2", n_positions=128)(tmp_path / "base")
    assert prefold.generate(tmp_path / "base", "Hello", max_new_tokens=2)
    with pytest.raises(UserError, match=r"prompt 1 and 120 new tokens: 1\d\d tokens in a row"):
        prefold.generate(tmp_path / "base", "Hello", max_new_tokens=120)


# ---- what works is not refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"]])
def test_one_matrix_at_both_ends_is_trained_whole(saved: list[str], recipe: MakeRecipe, tmp_path: Path) -> None:
    """What the refusal of LoRA on it advises."""
    save_chat_model(tmp_path / "base", tie_word_embeddings=True)
    lora = {"target_modules": ["q_proj"], "modules_to_save": saved}
    folder = prefold.run(recipe(model={"name": str(tmp_path / "base")}, lora=lora))
    merged, base = (load_file(path / "model.safetensors") for path in (folder / "merged", tmp_path / "base"))
    assert "lm_head.weight" not in merged
    assert not torch.equal(merged["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


def test_a_decoder_of_a_family_of_encoders(recipe: MakeRecipe, tmp_path: Path) -> None:
    real("bert", is_decoder=True, max_position_embeddings=256)(tmp_path / "base")
    assert prefold.check(recipe(model={"name": str(tmp_path / "base")})).ok


def test_masks_that_older_files_hold(recipe: MakeRecipe, tmp_path: Path) -> None:
    """In 8 bits, and no sign of quantised weights; transformers leaves them out."""
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 128, 128, dtype=torch.uint8)}
    real("gpt2", weights(lambda tensors: tensors.update(mask)), n_positions=128)(tmp_path / "base")
    assert prefold.check(recipe(model={"name": str(tmp_path / "base")}, evaluate={"max_new_tokens": 2})).ok


def test_a_token_without_a_row_that_nothing_holds(recipe: MakeRecipe, tmp_path: Path) -> None:
    token_in_data(save_chat_model(tmp_path / "base"))
    assert prefold.check(recipe(model={"name": str(tmp_path / "base")})).ok


def test_the_best_checkpoint_at_any_two_intervals(recipe: MakeRecipe) -> None:
    train = {"eval_steps": 2, "save_steps": 3, "load_best_model_at_end": True, "max_steps": 5}
    folder = prefold.train(recipe(train=train))
    state = json.loads((folder / "checkpoints" / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["best_global_step"] in (2, 4, 5)


# ---- findings ---------------------------------------------------------------------------------------------------

FINDINGS: dict[str, tuple[Changes, str]] = {
    "warmup_too_long": (
        {"train": {"warmup_steps": 100, "max_steps": 2}},
        "the warm-up takes 100 steps and the run has 2: the full rate is never reached",
    ),
    "warmup_ignored": (
        {"train": {"warmup_steps": 1, "lr_scheduler_type": "constant"}},
        "`train.warmup_steps: 1` has no effect",
    ),
    "objective": (
        sampled(grpo={"importance_sampling_level": "sequence", "loss_type": "bnpo"}),
        "`loss_type: bnpo`, which sums over tokens",
    ),
}


@pytest.mark.parametrize("kind", FINDINGS)
def test_what_is_said(kind: str, recipe: MakeRecipe) -> None:
    changes, wanted = FINDINGS[kind]
    found = {finding.kind: finding for finding in prefold.check(recipe(**changes)).prepared.report.findings}
    assert wanted in found[kind].message and found[kind].severity == "warning"


@pytest.mark.parametrize("kind", [*FINDINGS, "beyond_positions", "router_loss"])
def test_nothing_is_said_without_reason(kind: str, recipe: MakeRecipe) -> None:
    assert kind not in {finding.kind for finding in prefold.check(recipe()).prepared.report.findings}


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({}, 16),
        ({"rope_type": "linear", "factor": 2.0}, 32),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10}, 40),
        ({"rope_type": "yarn", "factor": 999.0, "original_max_position_embeddings": 16}, None),
    ],
)
def test_rotary_positions(rope: Changes, limit: int | None, recipe: MakeRecipe, tmp_path: Path) -> None:
    save_chat_model(tmp_path / "base", max_position_embeddings=16, rope_parameters={"rope_theta": 1e4, **rope})
    found = prefold.check(recipe(model={"name": str(tmp_path / "base")})).prepared.report.findings
    said = [finding for finding in found if finding.kind == "beyond_positions"]
    assert bool(said) == bool(limit)
    if limit:
        assert f"is made for {limit} positions" in said[0].message and said[0].count and said[0].rows


def test_the_loss_of_a_router(recipe: MakeRecipe, tmp_path: Path) -> None:
    real("mixtral", num_local_experts=2, output_router_logits=True, router_aux_loss_coef=0.25)(tmp_path / "base")
    checked = prefold.check(recipe(model={"name": str(tmp_path / "base")}, lora={"lora_dropout": 0.0}))
    found = checked.prepared.report.findings
    assert any("is trained as well, times 0.25" in finding.message for finding in found)
