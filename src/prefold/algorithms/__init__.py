"""Preference losses, one file each, and the registry that the recipe reads.

To add one: a file here, a line in `ALGORITHMS`, a test in `tests/unit/algorithms`, its row in the table of
`docs/algorithms/README.md` (`python docs/algorithms/table.py`).
"""

from prefold.algorithms.aot import AOT, AOTUnpaired
from prefold.algorithms.apo import APODown, APOZero
from prefold.algorithms.base import NO_STATE, PAIRED, Algorithm, Draws, Extreme, Kind, LossOutput, Mean, Metric, State
from prefold.algorithms.bco import BCO
from prefold.algorithms.cpo import CPO
from prefold.algorithms.discopop import DiscoPOP
from prefold.algorithms.dpo import DPO
from prefold.algorithms.exo import EXO
from prefold.algorithms.grpo import GRPO
from prefold.algorithms.hinge import Hinge
from prefold.algorithms.ipo import IPO
from prefold.algorithms.kto import KTO
from prefold.algorithms.mixed import Mixed
from prefold.algorithms.nca import NCA
from prefold.algorithms.orpo import ORPO
from prefold.algorithms.reward import BradleyTerry
from prefold.algorithms.robust import Robust
from prefold.algorithms.sft import SFT
from prefold.algorithms.sigmoid_norm import SigmoidNorm
from prefold.algorithms.simpo import SimPO
from prefold.algorithms.sppo import SPPO

ALGORITHMS: dict[str, type[Algorithm]] = {
    "dpo": DPO,
    "sigmoid_norm": SigmoidNorm,
    "robust": Robust,
    "hinge": Hinge,
    "ipo": IPO,
    "exo": EXO,
    "discopop": DiscoPOP,
    "nca": NCA,
    "bco": BCO,
    "sppo": SPPO,
    "apo_zero": APOZero,
    "apo_down": APODown,
    "aot": AOT,
    "aot_unpaired": AOTUnpaired,
    "kto": KTO,
    "orpo": ORPO,
    "simpo": SimPO,
    "cpo": CPO,
    "sft": SFT,
    "mixed": Mixed,
    "reward": BradleyTerry,
    "grpo": GRPO,
}
Mixed.of_pairs = {name: method for name, method in ALGORITHMS.items() if method.kind == PAIRED and method is not Mixed}

__all__ = ["ALGORITHMS", "NO_STATE", "Algorithm", "Draws", "Extreme", "Kind", "LossOutput", "Mean", "Metric", "State"]
