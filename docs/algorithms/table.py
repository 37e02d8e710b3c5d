"""The table of all methods, from the registry: `python docs/algorithms/table.py > docs/algorithms/README.md`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from prefold.algorithms import ALGORITHMS, Algorithm
from prefold.algorithms.dpo import DPO
from prefold.algorithms.pairwise import ByDifference, Pairwise

HEADING = """\
# Methods

Written by `python docs/algorithms/table.py` from `src/prefold/algorithms/`; a test holds it to the code.

`method: NAME` chooses one; [which method?](../which-method.md) helps. Its settings are fields of the section `NAME`,
with these defaults. The learning rate is for LoRA; full fine-tuning wants about a hundredth. "Held against" is what the
tests compare value and gradient with; the trainers are those of TRL 1.16.

In depth, with equation, metrics and a run: [DPO](dpo.md), [its family](dpo-family.md), [ORPO](orpo.md), [SimPO, CPO and
SFT](reference-free.md), [KTO](kto.md), [reward models](reward.md), [GRPO](grpo.md) and its [advantages](advantages.md).

| method | what it is | paper | reference | settings | learning rate | held against |
|---|---|---|---|---|---|---|
"""

FOOTING = """
Settings behind "+P" and "+F":

|  | settings |
|---|---|
| P | {pairs} |
| F | {difference} |
"""


def row(name: str, kind: type[Algorithm]) -> str:
    algorithm = kind()
    shared = names(Pairwise, ByDifference) if issubclass(kind, Pairwise) else []
    own = [setting(algorithm, field) for field in names(kind) if field not in shared or field == "beta"]
    own += ["+P"] * issubclass(kind, Pairwise) + ["+F"] * issubclass(kind, ByDifference)
    cells = (
        f"`{name}`",
        str(kind.__doc__).splitlines()[0],
        f"[{kind.paper}](https://arxiv.org/abs/{kind.paper})" if kind.paper else "",
        "yes" if algorithm.needs_reference else "no",
        ", ".join(own),
        shown(kind.defaults["train.learning_rate"]),
        kind.oracle,
    )
    return "| " + " | ".join(cells) + " |"


def names(*kinds: type[Any]) -> list[str]:
    """Settings of the methods, each once."""
    return list(dict.fromkeys(field.name for kind in kinds for field in fields(kind)))


def setting(algorithm: Algorithm, name: str) -> str:
    return f"`{name}` {shown(getattr(algorithm, name))}"


def shown(value: Any) -> str:
    """A default as the recipe would have it."""
    if isinstance(value, list):
        return "; ".join(", ".join(f"{name}: {shown(item)}" for name, item in entry.items()) for entry in value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-")
    return "unset" if value is None else str(value)


def page() -> str:
    rows = "".join(row(name, kind) + "\n" for name, kind in ALGORITHMS.items())
    example = DPO()
    of_pairs = names(Pairwise)
    shared = {
        "pairs": [setting(example, name) for name in of_pairs if name != "beta"],
        "difference": [setting(example, name) for name in names(ByDifference) if name not in of_pairs],
    }
    return HEADING + rows + FOOTING.format(**{name: ", ".join(settings) for name, settings in shared.items()})


if __name__ == "__main__":
    print(page(), end="")
