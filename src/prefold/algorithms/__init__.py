"""Preference losses, one file each, and the registry that the recipe reads.

To add one: a file here, a line in `ALGORITHMS`, a test in `tests/unit/algorithms`, a page in `docs/algorithms`.
"""

from prefold.algorithms.base import Algorithm, LossOutput, Mean
from prefold.algorithms.dpo import DPO

ALGORITHMS: dict[str, type[Algorithm]] = {"dpo": DPO}

__all__ = ["ALGORITHMS", "DPO", "Algorithm", "LossOutput", "Mean"]
