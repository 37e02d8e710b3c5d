"""Bounds of the numbers that `prefold.generate` and `prefold.pairs` are called with."""

from __future__ import annotations

from math import inf

from prefold.errors import UserError

BOUNDS = {
    "max_new_tokens": (1, inf),
    "num_answers": (1, inf),
    "num_completions": (1, inf),
    "temperature": (0, inf),
    "top_p": (0, 1),
    "top_k": (0, inf),
    "min_p": (0, 1),
    "seed": (0, inf),
    "min_margin": (0, inf),
    "max_length_ratio": (1, inf),
    "limit": (1, inf),
    "concurrency": (1, inf),
    "timeout": (0.001, inf),
}


def require_bounds(**values: float | None) -> None:
    """Raises UserError for the first value that is out of its bounds; None is unset."""
    for name, value in values.items():
        least, most = BOUNDS[name]
        if value is not None and not least <= value <= most:
            allowed = f"{least:g} or more" if most == inf else f"from {least:g} to {most:g}"
            raise UserError(f"`{name}` is {value!r}", expected=allowed)
