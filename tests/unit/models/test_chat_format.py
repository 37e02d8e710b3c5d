"""Templates, tokens, end tokens and rows for base models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from base_model import BEGIN, END, base_tokenizer, save_base
from families import family
from tiny import tiny_llama
from tiny_tokenizer import LLAMA3, NO_END, make_tokenizer
from transformers import AutoTokenizer

from prefold.errors import UserError
from prefold.models.chat_format import fit_vocabulary, set_chat_format
from prefold.models.load import load_model
from prefold.models.tokenizer import chat_tokens, tokenizer_of
from prefold.recipe import Model

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def test_chatml_adds_its_tokens_and_ends_turns_with_one() -> None:
    tokenizer = base_tokenizer()
    known = len(tokenizer)
    assert set_chat_format(tokenizer, "chatml") == [known, known + 1]
    ids = tokenizer.apply_chat_template(TURNS, tokenize=True, return_dict=False)
    assert tokenizer.decode(ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
    assert ids.count(tokenizer.eos_token_id) == 2 and tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == END
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nHi\nassistant\nHo\n"


def test_the_padding_is_not_the_end_of_a_turn() -> None:
    tokenizer = base_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    set_chat_format(tokenizer, "chatml")
    assert tokenizer.pad_token == END != tokenizer.eos_token
    tokenizer = base_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = None
    set_chat_format(tokenizer, "chatml")
    assert tokenizer.pad_token == "<|im_end|>"


def test_a_tokenizer_that_begins_texts_goes_on_doing_so_once() -> None:
    tokenizer = base_tokenizer(adds_bos=True)
    set_chat_format(tokenizer, "chatml")
    assert tokenizer.apply_chat_template(TURNS, tokenize=False).startswith(BEGIN + "<|im_start|>user")
    ids = tokenizer.apply_chat_template(TURNS, tokenize=True, return_dict=False)
    assert ids.count(tokenizer.bos_token_id) == 1


def test_the_template_survives_saving(tmp_path: Path) -> None:
    tokenizer = base_tokenizer()
    set_chat_format(tokenizer, "chatml")
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == tokenizer.chat_template and again.eos_token_id == tokenizer.eos_token_id
    assert again.apply_chat_template(TURNS) == tokenizer.apply_chat_template(TURNS)


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    """Its special tokens are trained but for the one that texts begin with, and the end of its turn ends answers."""
    (tmp_path / "llama3.jinja").write_text(LLAMA3)
    tokenizer = make_tokenizer(None, eos="<|text_end|>", bos="<|begin|>")
    known = len(tokenizer)
    trained = set_chat_format(tokenizer, str(tmp_path / "llama3.jinja"))
    assert tokenizer.convert_ids_to_tokens(trained) == ["<|start|>", "<|end_header|>", "<|eot|>"]
    assert tokenizer.eos_token == "<|eot|>" and len(tokenizer) == known


def test_a_template_without_special_tokens(tmp_path: Path) -> None:
    (tmp_path / "words.jinja").write_text("{{ bos_token }}" + NO_END)
    tokenizer = base_tokenizer()
    assert set_chat_format(tokenizer, str(tmp_path / "words.jinja")) == []
    assert tokenizer.eos_token == END


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"\xff\xfe", "cannot be read"),
        (b"{% for", "cannot write"),
        (b"{{ a.b.c }}", "cannot write"),
    ],
)
def test_bad_templates(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "bad.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        set_chat_format(base_tokenizer(), str(file))
    assert caught.value.where == str(file)


# ---- rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_begin_near_the_mean_and_the_old_ones_stay(tied: bool) -> None:
    tokenizer = base_tokenizer()
    known = len(tokenizer)
    model = tiny_llama(vocab_size=known, tie_word_embeddings=tied)
    before = [layer.weight.clone() for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    set_chat_format(tokenizer, "chatml")
    torch.manual_seed(3)
    fit_vocabulary(model, tokenizer, known)
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(3)))
    assert model.config.vocab_size == 320 and (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for layer, old in zip((model.get_input_embeddings(), model.get_output_embeddings()), before, strict=True):
        rows = layer.weight
        assert torch.equal(rows[:known], old)
        assert (rows[known:] - old.mean(0)).abs().max() < 0.1 * old.std(0).mean()
        assert not torch.equal(rows[known], rows[known + 1])


def test_the_new_tokens_take_no_probability() -> None:
    tokenizer = base_tokenizer()
    known, ids = len(tokenizer), torch.arange(12)[None]
    model = tiny_llama(vocab_size=known)
    before = model(ids).logits.log_softmax(-1)
    set_chat_format(tokenizer, "chatml")
    fit_vocabulary(model, tokenizer, known)
    after = model(ids).logits.log_softmax(-1)[..., :known]
    assert (before - after).max() < 0.5 and (after > before + 1e-5).sum() == 0


def test_room_that_is_there_is_used() -> None:
    tokenizer = base_tokenizer()
    known = len(tokenizer)
    model = tiny_llama(vocab_size=known + 6)
    before = model.lm_head.weight.clone()
    set_chat_format(tokenizer, "chatml")
    fit_vocabulary(model, tokenizer, known)
    assert len(model.lm_head.weight) == known + 6
    changed = (model.lm_head.weight != before).any(-1).nonzero().flatten().tolist()
    assert changed == [known, known + 1]


def test_a_head_with_a_bias() -> None:
    tokenizer = base_tokenizer()
    known = len(tokenizer)
    model = family("phi", vocab_size=known)
    old = model.lm_head.bias.clone()
    set_chat_format(tokenizer, "chatml")
    fit_vocabulary(model, tokenizer, known)
    assert len(model.lm_head.bias) == 320
    assert torch.equal(model.lm_head.bias[:known], old)
    assert (model.lm_head.bias[known:] - old.mean()).abs().max() < 0.1 * old.std()


def test_model_and_tokenizer_by_recipe(tmp_path: Path) -> None:
    """Padded rows of the base are not the tokenizer's: the numbers of its new tokens follow its own."""
    section = Model(name=str(save_base(tmp_path, rows=300)), dtype="float32", chat_template="chatml")
    tokenizer, model = tokenizer_of(section), load_model(section)
    assert chat_tokens(section) == [258, 259] and len(model.lm_head.weight) == 300
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert model.config.eos_token_id == 259
    again = load_model(section)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
