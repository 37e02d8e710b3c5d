"""Tokenizers are read without the classes of their models' configurations, and are what transformers makes of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_tokenizer import save_chat_model
from transformers import AutoTokenizer

from prefold.models.tokenizer import load_tokenizer

TEXT = "  What is 2+2?\n\tÉtude, 東京."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=64, num_hidden_layers=1)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "gpt2", "gemma2", "phi3", "never_heard_of"])
@pytest.mark.parametrize(
    "named",
    ["PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer", ""],
)
def test_it_is_the_one_that_transformers_makes(folder: Path, tmp_path: Path, model_type: str, named: str) -> None:
    for file in folder.glob("*[!s].json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | {"model_type": model_type}
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True), load_tokenizer(tmp_path)
    assert type(ours) is type(theirs)
    assert ours(TEXT)["input_ids"] == theirs(TEXT)["input_ids"]
    assert ours.special_tokens_map == theirs.special_tokens_map | {"pad_token": ours.pad_token}


def test_no_code_of_models_is_imported(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from prefold.models.tokenizer import load_tokenizer\n"
        "load_tokenizer(Path(sys.argv[1])); sys.exit('transformers.modeling_utils' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == 0
