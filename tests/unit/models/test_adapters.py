"""Going on with an adapter, and adapters that do not belong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from base_model import save_base
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import random_trees, tiny_llama
from transformers import MistralConfig, MistralForCausalLM

from prefold.errors import UserError
from prefold.models.adapters import add_lora, load_policy, load_start, open_adapter
from prefold.models.load import load_model
from prefold.recipe import Lora, Model
from prefold.trees.reference import _key, compute_reference
from prefold.trees.scorer import Scorer, reference_model

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama().save_pretrained(folder)
    return folder


def section(folder: Path, **settings: Any) -> Model:
    return Model(name=str(folder), **{"dtype": "float32", **settings})


def save_adapter(base: Path, folder: Path, seed: int = 0, **lora: Any) -> Path:
    """A trained one: no weight is zero."""
    model = add_lora(load_model(section(base)), Lora(r=4, **lora), seed)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def logprobs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return Scorer(model, 4096, "prefold_joined").score(random_trees(4)).tokens


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"lora_dropout": 0.5}])
def test_the_reference_is_the_adapter_as_it_came(base: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    folder = save_adapter(base, tmp_path / "adapter", **lora)
    plain = PeftModel.from_pretrained(load_model(section(base)), folder).eval()
    wanted = logprobs(plain)
    policy = load_policy(section(base, adapter=str(folder)), None, seed=0)
    scorer = Scorer(policy, 4096, "prefold_joined")
    torch.testing.assert_close(logprobs(policy.eval()), wanted)
    for parameter in policy.parameters():  # as training would
        if parameter.requires_grad:
            parameter.data += 0.1
    moved = logprobs(policy)
    assert not torch.allclose(moved, wanted, atol=1e-2)
    torch.testing.assert_close(torch.cat(compute_reference(scorer, random_trees(4))), wanted)
    assert torch.equal(logprobs(policy), moved)
    with policy.disable_adapter():
        assert not torch.allclose(logprobs(policy), wanted, atol=1e-3)  # not the bare base either


def test_the_weights_come_back_when_the_reference_fails(base: Path, tmp_path: Path) -> None:
    policy = load_policy(section(base, adapter=str(save_adapter(base, tmp_path))), None, seed=0)
    trained = next(parameter for parameter in policy.parameters() if parameter.requires_grad)
    trained.data += 1
    before = trained.data.clone()
    with pytest.raises(RuntimeError), reference_model(policy):
        raise RuntimeError
    assert torch.equal(trained.data, before) and trained.requires_grad


def test_the_key_of_the_reference_knows_the_adapter(base: Path, tmp_path: Path) -> None:
    def key(**settings: Any) -> str:
        lora = Lora(r=4) if not settings else None
        model = load_policy(section(base, **settings), lora, seed=0)
        return _key(Scorer(model, 64, None), torch.float32)

    first, second = save_adapter(base, tmp_path / "1"), save_adapter(base, tmp_path / "2", seed=1)
    louder = Path(shutil.copytree(first, tmp_path / "3"))
    change(louder, lora_alpha=64)
    keys = [key(), key(adapter=str(first)), key(adapter=str(second)), key(adapter=str(louder))]
    assert len(set(keys)) == 4
    assert key(adapter=str(first)) == keys[1]


def test_what_training_starts_from_has_the_adapter_in_it(base: Path, tmp_path: Path) -> None:
    folder = save_adapter(base, tmp_path)
    wanted = logprobs(PeftModel.from_pretrained(load_model(section(base)), folder).eval())
    start = load_start(section(base, adapter=str(folder)))
    assert not isinstance(start, PeftModel) and not start.training
    torch.testing.assert_close(logprobs(start), wanted)
    torch.testing.assert_close(logprobs(load_start(section(base))), logprobs(load_model(section(base))))


def test_an_adapter_that_was_taught_to_chat(tmp_path: Path) -> None:
    """It needs the same rows in the vocabulary, and says so."""
    base, folder = save_base(tmp_path / "base"), tmp_path / "adapter"
    settings = {"chat_template": "chatml"}
    model = load_policy(section(base, **settings), Lora(r=2), seed=0)
    model.save_pretrained(folder, save_embedding_layers=False)
    again = load_policy(section(base, adapter=str(folder), **settings), None, seed=0)
    ids = torch.tensor([[5, 258, 259]])
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, model.eval()(ids).logits)
    with pytest.raises(UserError, match="trains token 259") as caught:
        load_policy(section(base, adapter=str(folder)), None, seed=0)
    assert "model.chat_template" in caught.value.advice


# ---- adapters that do not belong --------------------------------------------------------------------------------


def change(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    weights = load_file(folder / WEIGHTS) | changes
    save_file({name: weight for name, weight in weights.items() if weight is not None}, folder / WEIGHTS)


def refusal(base: Path, adapter: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        open_adapter(load_model(section(base)), adapter)
    return caught.value


def test_no_adapter(base: Path, tmp_path: Path) -> None:
    assert "adapter_config.json is missing" in refusal(base, tmp_path / "nowhere").what
    folder = save_adapter(base, tmp_path / "adapter")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert f"{WEIGHTS} is missing" in refusal(base, folder).what


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_configuration(base: Path, tmp_path: Path, content: str) -> None:
    folder = save_adapter(base, tmp_path)
    (folder / "adapter_config.json").write_text(content)
    assert "cannot be read" in refusal(base, folder).what


def test_damaged_weights(base: Path, tmp_path: Path) -> None:
    folder = save_adapter(base, tmp_path)
    (folder / WEIGHTS).write_bytes(b"\xff" * 100)
    assert "does not fit the model" in refusal(base, folder).what


def test_another_kind(base: Path, tmp_path: Path) -> None:
    folder = save_adapter(base, tmp_path)
    change(folder, peft_type="IA3")
    assert "of kind IA3" in refusal(base, folder).what


def test_another_base_by_name(base: Path, tmp_path: Path) -> None:
    folder = save_adapter(base, tmp_path)
    change(folder, base_model_name_or_path="org/another-model")
    error = refusal(base, folder)
    assert "adapter of `org/another-model`" in error.what and "base_model_name_or_path" in error.advice
    change(folder, base_model_name_or_path="org/Tiny")  # the same model, wherever it lies
    open_adapter(load_model(section(base)), folder)


def test_another_base_by_shape(base: Path, tmp_path: Path) -> None:
    folder = save_adapter(base, tmp_path / "adapter")
    tiny_llama(intermediate_size=64).save_pretrained(tmp_path / "tiny")
    assert "does not fit the model" in refusal(tmp_path / "tiny", folder).what
    tiny_llama(num_hidden_layers=2).save_pretrained(tmp_path / "tiny")
    assert "tensors without a place, e.g. base_model.model.model.layers.2" in refusal(tmp_path / "tiny", folder).what
    tiny_llama(num_hidden_layers=4).save_pretrained(tmp_path / "tiny")
    assert "lacks 14 tensors, e.g. base_model.model.model.layers.3" in refusal(tmp_path / "tiny", folder).what


def test_another_family(base: Path, tmp_path: Path) -> None:
    folder = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    change(folder, target_modules=["c_attn"])
    assert "does not fit" in refusal(base, folder).what


def test_mistral_goes_on_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tiny_llama().config.to_dict() | {"sliding_window": 6}
    config.pop("model_type")
    MistralForCausalLM(MistralConfig(**config)).save_pretrained(tmp_path / "mistral")
    folder = save_adapter(tmp_path / "mistral", tmp_path / "adapter")
    policy = load_policy(section(tmp_path / "mistral", adapter=str(folder)), None, seed=0)
    scorer = Scorer(policy.eval(), 4096, "prefold_segments")
    with torch.no_grad():
        wanted = scorer.score(random_trees(4)).tokens
    torch.testing.assert_close(torch.cat(compute_reference(scorer, random_trees(4))), wanted)
