"""A head that gives scores: how it begins, and what its tokenizer pads with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_llama
from tiny_tokenizer import CHATML, make_tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from prefold.errors import UserError
from prefold.models.load import load_model
from prefold.models.score_head import pad_apart
from prefold.recipe import Model
from prefold.trees.head import score_layer


def head(folder: Path, seed: int, dtype: str = "float32") -> Tensor:
    model = load_model(Model(name=str(folder)), dtype=dtype, head_seed=seed)
    layer = score_layer(model)
    assert isinstance(layer, torch.nn.Linear)
    return layer.weight.detach()


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_head_is_that_of_its_seed(tmp_path: Path, tied: bool) -> None:
    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path)
    first = head(tmp_path, 1)
    torch.manual_seed(99)
    assert torch.equal(head(tmp_path, 1), first) and not torch.equal(head(tmp_path, 2), first)
    assert torch.equal(head(tmp_path, 1, "bfloat16"), first.bfloat16())
    assert first.shape == (1, 32) and 0.1 < first.std() < 0.3  # 0.2 in the configuration


def test_a_head_that_is_there_is_kept(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = load_model(Model(name=str(tmp_path / "base")), dtype="float32", head_seed=1)
    model.save_pretrained(tmp_path / "first")
    assert torch.equal(head(tmp_path / "first", 2), head(tmp_path / "base", 1))


def test_a_model_that_lacks_more_than_its_head_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    weights = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp" not in name}
    LlamaForCausalLM.save_pretrained(model, tmp_path, state_dict=weights)
    with pytest.raises(UserError, match="lack 3 tensors"):
        head(tmp_path, 1)


def test_padding_is_kept_apart_from_the_ends_of_conversations() -> None:
    tokenizer = make_tokenizer(CHATML, bos="<|begin|>")
    end, begin = tokenizer.eos_token_id, tokenizer.bos_token_id
    tokenizer.pad_token = tokenizer.eos_token
    pad_apart(tokenizer, {5})
    assert tokenizer.pad_token_id == end
    pad_apart(tokenizer, {end})
    assert tokenizer.pad_token_id == begin
    pad_apart(tokenizer, set(range(len(tokenizer))))
    assert tokenizer.pad_token is None
