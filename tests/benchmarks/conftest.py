from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from tiny_tokenizer import save_chat_model

from prefold.terminal import console


@pytest.fixture(autouse=True)
def talking_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A benchmark silences the process that it runs in; here other tests follow."""
    monkeypatch.setattr(console, "quiet", console.quiet)
    verbosity = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


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
