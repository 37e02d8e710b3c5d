"""Fixtures of the data tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import CHATML, make_tokenizer
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def chatml() -> PreTrainedTokenizerFast:
    return make_tokenizer(CHATML, bos="<|im_start|>")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write rows (or raw text, or bytes) to a file and return its path."""

    def write_file(name: str, content: list[Any] | str | bytes) -> str:
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write_file
