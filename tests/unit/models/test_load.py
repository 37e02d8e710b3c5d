"""Loading a base model and its tokenizer, and putting LoRA weights on it."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from tiny_gguf import tokens
from tiny_tokenizer import CHATML, save_chat_model
from tokenizers import Tokenizer, models
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from prefold.data.chat import render
from prefold.data.templates import keywords_of
from prefold.device import choose_device, choose_dtype
from prefold.errors import UserError
from prefold.models import load
from prefold.models.adapters import add_lora
from prefold.models.load import load_model, trainable_parameters
from prefold.models.tokenizer import load_tokenizer, tokenizer_of
from prefold.recipe import Lora, Model
from prefold.trees.memory import free_memory


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def section(folder: Path, **settings: Any) -> Model:
    return Model(name=str(folder), **{"dtype": "float32", **settings})


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """`None` removes a tensor; in names `__` stands for a dot."""
    file = folder / "model.safetensors"
    weights = load_file(file) | {name.replace("__", "."): weight for name, weight in changes.items()}
    save_file({name: weight for name, weight in weights.items() if weight is not None}, file, {"format": "pt"})


def load_error(folder: Path, **settings: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        load_model(section(folder, **settings))
    return caught.value


# ---- device and dtype -------------------------------------------------------------------------------------------


def test_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device() == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device() == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert choose_device() == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device() == torch.device("cuda", 3)


@pytest.mark.parametrize(
    ("device", "able", "wanted"),
    [
        ("cuda", (9, 0), torch.bfloat16),
        ("cuda", (8, 0), torch.bfloat16),
        ("cuda", (7, 5), torch.float16),
        ("cpu", {"avx512_bf16": True}, torch.bfloat16),
        ("cpu", {"amx_bf16": True}, torch.bfloat16),
        ("cpu", {"avx512_bf16": False, "avx2": True}, torch.float32),
        ("mps", None, torch.float32),
    ],
)
def test_auto_is_what_the_device_computes_in(
    device: str, able: Any, wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: able)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert choose_dtype("auto", torch.device(device)) == wanted
    assert choose_dtype("float16", torch.device(device)) == torch.float16


@pytest.mark.parametrize("bits", [{}, {"load_in_4bit": True}], ids=["whole", "quantised"])
def test_tensors_go_straight_to_an_accelerator(
    folder: Path, bits: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a map, with which each goes from its file to its device; on a CPU they stay mapped. A device that is named
    goes before the section's own map."""
    if bits:
        pytest.importorskip("bitsandbytes")
    maps: list[Any] = []

    def loaded(kind: Any, folder: Path, name: str, settings: dict[str, Any]) -> Any:
        maps.append(settings["device_map"])
        return tiny_llama(), load.NOTHING_AMISS

    monkeypatch.setattr(load, "_from_files", loaded)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    cuda, cpu = torch.device("cuda", 1), torch.device("cpu")
    for best in (cuda, torch.device("mps"), cpu):
        monkeypatch.setattr(load, "choose_device", lambda best=best: best)
        load_model(section(folder, **bits), quantised=True)
    assert maps == [{"": cuda}, {"": torch.device("mps")}, {"": cpu} if bits else None]
    maps.clear()
    for device in (None, cuda):
        load_model(section(folder, device_map="auto", **bits), quantised=True, device=device)
    assert maps == ["auto", {"": cuda}]


# ---- model ------------------------------------------------------------------------------------------------------


def test_the_model_is_the_saved_one_and_loads_quietly(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = load_model(section(folder))
    for name, weight in tiny_llama().state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert not model.training and model.dtype == torch.float32 and model.device == torch.device("cpu")
    assert capfd.readouterr() == ("", "")


def test_the_dtype_of_the_caller_goes_before_the_recipes(folder: Path) -> None:
    assert load_model(section(folder, dtype="float16")).dtype == torch.float16
    assert load_model(section(folder, dtype="float16"), dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("setting", "wanted"), [("auto", "sdpa"), ("trees", "sdpa"), ("sdpa", "sdpa"), ("eager", "eager")]
)
def test_the_attention(folder: Path, setting: str, wanted: str) -> None:
    assert load_model(section(folder, attn_implementation=setting)).config._attn_implementation == wanted


def test_a_soft_cap_gets_eager_attention(tmp_path: Path) -> None:
    config = Gemma2Config(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    assert load_model(section(tmp_path)).config._attn_implementation == "eager"
    capped = SimpleNamespace(get_text_config=lambda: SimpleNamespace(attn_logit_softcapping=50.0))
    assert load.plain_attention("trees", capped) == "eager"
    assert "would leave out the soft-cap" in load_error(tmp_path, attn_implementation="sdpa").what


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load_model(section(tmp_path))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_that_do_not_fit_the_configuration(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change_weights(folder, model__norm__weight=None)
    assert "lack 1 tensors" in load_error(folder).what and "model.norm.weight" in load_error(folder).what
    change_weights(folder, model__norm__weight=torch.ones(33))
    error = load_error(folder)
    assert "another shape" in error.what and "e.g. model.norm.weight" in error.what
    change_weights(folder, model__norm__weight=torch.ones(32), v_head__weight=torch.ones(3))
    assert "no place for" in load_error(folder).what and "e.g. v_head.weight" in load_error(folder).what
    assert capfd.readouterr() == ("", "")


def test_a_model_with_code_of_its_own(folder: Path) -> None:
    change_config(
        folder, model_type="homemade", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.M"}
    )
    (folder / "code.py").write_text("raise SystemExit('ran')")
    error = load_error(folder)
    assert "Python code of its own" in error.what and "trust_remote_code" not in str(error)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"{}"),
        ("config.json", b'{"model_type": "llama", "hidden_size": "wide"}'),
        ("config.json", b'{"model_type": "bert"}'),
        ("model.safetensors", b""),
        ("model.safetensors", b"\xff" * 100),
    ],
)
def test_a_damaged_folder_is_the_users_to_mend(folder: Path, file: str, content: bytes) -> None:
    (folder / file).write_bytes(content)
    error = load_error(folder)
    assert error.where == str(folder) and "\n" not in error.what


# ---- tokenizer --------------------------------------------------------------------------------------------------


def tokenizer_folder(folder: Path, **special: str) -> Path:
    vocabulary = {token: place for place, token in enumerate(tokens())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder


def test_a_missing_pad_token_becomes_the_end_token_in_memory_only(tmp_path: Path) -> None:
    tokenizer_folder(tmp_path, eos_token="<|im_end|>")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert load_tokenizer(tmp_path).pad_token_id == 2
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_pad_token_of_its_own_is_kept(tmp_path: Path) -> None:
    tokenizer_folder(tmp_path, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    assert load_tokenizer(tmp_path).pad_token_id == 0


def test_no_tokenizer(folder: Path) -> None:
    for config in ("{}", '{"tokenizer_class": "LlamaTokenizer"}'):
        (folder / "tokenizer_config.json").write_text(config)
        with pytest.raises(UserError, match="has no tokenizer"):
            load_tokenizer(folder)


@pytest.mark.parametrize("content", ["{", "{}", '{"version": "1.0", "added_tokens": [], "model": {"type": "Unheard"}}'])
def test_a_tokenizer_that_cannot_be_read(tmp_path: Path, content: str) -> None:
    (tokenizer_folder(tmp_path) / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


# ---- LoRA -------------------------------------------------------------------------------------------------------


def adapter(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def test_lora_is_the_same_for_the_same_seed_and_leaves_the_global_numbers_alone() -> None:
    torch.manual_seed(5)
    first = adapter(add_lora(tiny_llama(), Lora(), seed=1))
    torch.manual_seed(6)
    expected = torch.rand(3, generator=torch.Generator().manual_seed(6))
    model = tiny_llama()
    torch.manual_seed(6)
    second = adapter(add_lora(model, Lora(), seed=1))
    assert torch.equal(torch.rand(3), expected)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    other = adapter(add_lora(tiny_llama(), Lora(), seed=2))
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_lora_is_float32_quiet_and_changes_nothing_at_first(recwarn: pytest.WarningsRecorder) -> None:
    ids = torch.arange(9)[None]
    model = tiny_llama(torch.bfloat16).eval()
    before = model(ids).logits
    adapted = add_lora(model, Lora(lora_dropout=0.5), seed=0)
    assert {weight.dtype for weight in adapter(adapted).values()} == {torch.float32}
    assert torch.equal(adapted.eval()(ids).logits, before)
    assert not recwarn.list


def test_lora_takes_the_recipes_settings() -> None:
    settings = {"r": 3, "lora_alpha": 5.5, "lora_dropout": 0.25, "target_modules": ["q_proj", "layers.1.mlp.up_proj"]}
    model = add_lora(tiny_llama(), Lora(**settings), seed=0)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.task_type) == (3, 5.5, 0.25, "CAUSAL_LM")
    adapted = {name.split(".lora_")[0].removeprefix("base_model.model.model.") for name in adapter(model)}
    assert adapted == {*(f"layers.{layer}.self_attn.q_proj" for layer in range(3)), "layers.1.mlp.up_proj"}


def test_a_regular_expression_of_targets() -> None:
    model = add_lora(tiny_llama(), Lora(target_modules=r".*\.[qv]_proj"), seed=0)
    assert len(adapter(model)) == 3 * 2 * 2


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        (["q_porj"], "'q_porj'"),
        (["q_proj", "q_porj"], "'q_porj'"),
        ([], "nothing"),
        (r".*\.nothing", "no module of the model is called"),
        ("*", "not a regular expression"),
        (["mlp"], "cannot be adapted"),
    ],
)
def test_targets_that_fit_nothing_list_what_there_is(targets: str | list[str], wanted: str) -> None:
    with pytest.raises(UserError) as caught:
        add_lora(tiny_llama(), Lora(target_modules=targets), seed=0)
    assert wanted in caught.value.what
    assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in caught.value.expected


def test_convolutions_that_are_linear_layers_are_listed() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(UserError, match="c_attn, c_fc, c_proj, lm_head"):
        add_lora(model, Lora(target_modules=["q_proj"]), seed=0)


def test_kinds_of_lora() -> None:
    model = add_lora(tiny_llama(), Lora(r=4, use_rslora=True, use_dora=True), seed=0)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert layer.scaling["default"] == 32 / 4**0.5
    assert "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector.default.weight" in adapter(model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("saved", [[], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_whole_modules_and_single_rows_in_float32(tied: bool, saved: list[str]) -> None:
    model = add_lora(tiny_llama(torch.bfloat16, tie_word_embeddings=tied), Lora(modules_to_save=saved), 0, [3, 5])
    trained = {name: weight for name, weight in adapter(model).items() if "lora_" not in name}
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    rows = [name for name, weight in trained.items() if weight.shape == (2, 32)]
    whole = [name for name, weight in trained.items() if weight.shape == (97, 32)]
    if tied:  # one matrix: whole, or the same rows at both ends
        assert (len(rows), len(whole)) == ((0, 1) if saved else (1, 0))
    else:
        assert (len(rows), len(whole)) == (2 - len(saved), len(saved))
    assert len(rows) + len(whole) == len(trained)


@pytest.mark.parametrize(
    ("lora", "tokens", "message"),
    [
        ({"modules_to_save": ["lm_haed"]}, [], "no module of the model is called 'lm_haed'"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, [3], "beside `model.chat_template`"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["q_proj"]}, [], "cannot be adapted"),
    ],
)
def test_modules_that_cannot_be_trained(lora: dict[str, Any], tokens: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_lora(tiny_llama(), Lora(**lora), 0, tokens)


# ---- counting and releasing -------------------------------------------------------------------------------------


def test_parameters_are_counted_once_and_unpacked() -> None:
    layer = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    tied = 97 * 32 + 3 * layer + 32
    assert trainable_parameters(tiny_llama(tie_word_embeddings=True)) == (tied, tied)
    model = add_lora(tiny_llama(tie_word_embeddings=True), Lora(r=2, target_modules=["q_proj"]), seed=0)
    added = 3 * 2 * (32 + 32)
    assert trainable_parameters(model) == (added, tied + added)


def test_quantised_weights_count_unpacked() -> None:
    packed = nn.Linear(1, 1, bias=False)
    packed.weight = nn.Parameter(torch.zeros(256, 1, dtype=torch.uint8), requires_grad=False)
    packed.weight.quant_state = SimpleNamespace(shape=torch.Size([16, 32]))  # type: ignore[attr-defined]
    assert trainable_parameters(packed) == (0, 512)


def test_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append("cuda"))
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: emptied.append("mps"))
    free_memory()
    assert emptied == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    free_memory()
    assert emptied == ["cuda", "mps"]


# ---- what the chat template is given ----------------------------------------------------------------------------

WISHES = "{% if not style is defined %}{% set style = 'plain' %}{% endif %}{{ style }} {{ strftime_now('%d %b %Y') }}\n"
QUESTION = [{"role": "user", "content": "Why?"}]


def test_the_template_is_given_what_the_recipe_says_and_is_saved_as_it_was(tmp_path: Path) -> None:
    save_chat_model(tmp_path / "model", WISHES + CHATML)
    keywords = {"style": "brief", "strftime_now": "2025-06-30"}
    section = Model(name=str(tmp_path / "model"), chat_template_kwargs=keywords)
    tokenizer = tokenizer_of(section)
    assert str(tokenizer.apply_chat_template(QUESTION, tokenize=False)).startswith("brief 30 Jun 2025\n")
    assert tokenizer.decode(render(QUESTION, tokenizer)).startswith("brief 30 Jun 2025\n")
    # A row's own go before those of the recipe.
    assert tokenizer.decode(render(QUESTION, tokenizer, given={"style": "long"})).startswith("long 30 Jun 2025\n")
    again = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHATML
    assert str(again.apply_chat_template(QUESTION, tokenize=False)).startswith("brief 30 Jun 2025\n")
    again.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").chat_template == WISHES + CHATML
    assert section.whole(tmp_path / "saved").chat_template_kwargs == keywords
    # Without the recipe's section, as for reward models, there is nothing that it is given.
    bare = load_tokenizer(tmp_path / "model")
    assert str(bare.apply_chat_template(QUESTION, tokenize=False)).startswith("plain ") and keywords_of(bare) == {}
    assert keywords_of(again) == keywords


@pytest.mark.parametrize(
    "keywords, words",
    [
        ({"styel": "brief"}, "`styel` is not read by the chat template"),
        ({"styel": "brief"}, "did you mean `style`?"),
        ({"styel": "brief"}, "expected: one of strftime_now, style"),
        ({"tokenize": True}, "`tokenize` is what prefold itself gives"),
        ({"messages": []}, "`messages` is what prefold itself gives"),
        ({"add_generation_prompt": True}, "`add_generation_prompt` is what prefold itself gives"),
        ({"tools": []}, "`tools` is not read"),
    ],
)
def test_keywords_that_the_template_does_not_read(tmp_path: Path, keywords: dict[str, Any], words: str) -> None:
    save_chat_model(tmp_path / "model", WISHES + CHATML)
    with pytest.raises(UserError) as caught:
        tokenizer_of(Model(name=str(tmp_path / "model"), chat_template_kwargs=keywords))
    assert words in str(caught.value) and "model.chat_template_kwargs" in str(caught.value)
