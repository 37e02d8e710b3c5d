"""prefold aligns language models with preferences: one recipe file in, an aligned, merged and evaluated model out.

    import prefold
    prefold.run("demo")

The functions have the names of the commands. They are imported on first use, since torch and transformers take seconds.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

# Threads that wait for one another by spinning make a CPU run several times slower as soon as another program wants a
# core. OpenMP reads this when torch is first imported.
if "GOMP_SPINCOUNT" not in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# bitsandbytes, which peft imports, advises on a CPU to install kernels that have no gradient, and warns of casts that
# are meant.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from prefold.data.survey import describe_data
    from prefold.generation.answers import generate
    from prefold.models.fetch import fetch
    from prefold.pairing.make import pairs
    from prefold.recipe import load_recipe
    from prefold.reports.notebook import show
    from prefold.runs.api import evaluate, merge, publish, report, run, train
    from prefold.runs.check import check, check_row
    from prefold.runs.comparison import compare
    from prefold.runs.sweep import sweep

__all__ = [
    "check",
    "check_row",
    "compare",
    "describe_data",
    "evaluate",
    "fetch",
    "generate",
    "load_recipe",
    "merge",
    "pairs",
    "publish",
    "report",
    "run",
    "show",
    "sweep",
    "train",
]

_HOMES = {
    "check": "prefold.runs.check",
    "check_row": "prefold.runs.check",
    "compare": "prefold.runs.comparison",
    "describe_data": "prefold.data.survey",
    "fetch": "prefold.models.fetch",
    "generate": "prefold.generation.answers",
    "load_recipe": "prefold.recipe",
    "pairs": "prefold.pairing.make",
    "show": "prefold.reports.notebook",
    "sweep": "prefold.runs.sweep",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module `prefold` has no attribute `{name}`")
    from importlib import import_module

    from prefold.terminal import loading

    with loading():
        return getattr(import_module(_HOMES.get(name, "prefold.runs.api")), name)
