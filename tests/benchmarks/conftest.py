from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_tokenizer import save_chat_model


@pytest.fixture(scope="session")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random chat model with room for a benchmark's rows, whose tokens are bytes here."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return save_chat_model(folder, max_position_embeddings=8192, num_hidden_layers=2)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Say word {i}", "chosen": f"WORD {i}!", "rejected": f"word {i}, maybe"} for i in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
