"""Formatting of numbers on every page, card and table. Anything but a finite number is written as a dash."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

NO_VALUE = "–"
MINUS = "\u2212"
NARROW_SPACE = "\u202f"


def finite(value: Any) -> float | None:
    """`value` as a float; None for what is no number, NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def interval(value: Any) -> tuple[float, float] | tuple[None, None]:
    """Both ends of `[low, high]`, or neither."""
    if isinstance(value, list) and len(value) == 2:
        low, high = finite(value[0]), finite(value[1])
        if low is not None and high is not None:
            return low, high
    return None, None


def exact(value: Any) -> str:
    """A number in full; a text in its place is returned as it is, since it says why there is none."""
    if finite(value) is not None:
        return repr(value)
    return "no finite value" if isinstance(value, float) else value if isinstance(value, str) else ""


def _write(value: Any, write: Callable[[float], str]) -> str:
    number = finite(value)
    return NO_VALUE if number is None else write(number).replace("-", MINUS)


def written(value: Any, write: Callable[[Any], str], unit: str = "") -> str:
    """`value` formatted by `write`, with `unit` appended if it is a number."""
    return write(value) + (unit if finite(value) is not None else "")


def percent(share: Any, digits: int = 0) -> str:
    return _write(share, lambda value: f"{100 * value:.{digits}f}{NARROW_SPACE}%")


def points(share: Any, digits: int = 0) -> str:
    """A difference of two shares, in percentage points, with its sign."""
    return _write(share, lambda value: f"{100 * value:+z.{digits}f}")


def signed(value: Any, digits: int = 2) -> str:
    return _write(value, lambda number: f"{number:+z.{digits}f}")


def decimal(value: Any, digits: int = 3) -> str:
    """`digits` decimals from 0.001 to 100, else three significant digits."""
    return _write(value, lambda number: f"{number:.{digits}f}" if 1e-3 <= abs(number) < 100 else f"{number:.3g}")


def score(value: Any, shares: bool, digits: int = 1) -> str:
    """The score of a task or a run: a share in percent, or another number."""
    return percent(value, digits) if shares else decimal(value, max(3, digits))


def change(value: Any, shares: bool, digits: int | None = None, unit: str = "") -> str:
    """A difference of two scores; `unit` is appended to a difference of shares."""
    return points(value, 1 if digits is None else digits) + unit if shares else signed(value, digits or 2)


def decimals(least: int, scale: float, visible: Sequence[float | None], most: int = 12) -> int:
    """The fewest decimals from `least` to `most` with which no number but 0 in `visible`, times `scale`, is written as
    0."""
    numbers = [scale * abs(value) for value in visible if value is not None and abs(value) > 1e-12]
    return next((digits for digits in range(least, most) if all(round(value, digits) for value in numbers)), most)


def scientific(value: Any) -> str:
    return _write(value, lambda number: f"{number:.1e}".replace("e-0", "e-").replace("e+0", "e+"))


def count(value: Any) -> str:
    return _write(value, lambda number: f"{number:,.0f}".replace(",", NARROW_SPACE))


def counted(value: Any, noun: str) -> str:
    """`1 pair`, `84 pairs`; empty for anything but a number."""
    return "" if finite(value) is None else f"{count(value)} {noun}{'' if value == 1 else 's'}"


def p_value(value: Any) -> str:
    """Two significant digits, or as many as show on which side of 0.05 it is; empty for anything but a number."""
    number = finite(value)
    if number is None:
        return ""
    if number < 0.001:
        return "p\u00a0<\u00a00.001"
    texts = [f"{number:.{digits}g}" for digits in range(2, 18)]
    return f"p\u00a0=\u00a0{next((text for text in texts if float(text) != 0.05), texts[0])}"


def ends(ci: Any, write: Callable[..., str], *settings: Any) -> str:
    """`22 % to 41 %`, each end formatted by `write`; empty if there is no interval."""
    low, high = interval(ci)
    return "" if low is None else f"{write(low, *settings)} to {write(high, *settings)}"


def interval_95(ci: Any, write: Callable[..., str], *settings: Any) -> str:
    """The same, preceded by `95 % interval`."""
    text = ends(ci, write, *settings)
    return text and f"95{NARROW_SPACE}% interval {text}"


def duration(seconds: Any) -> str:
    return _write(seconds, _duration)


def _duration(seconds: float) -> str:
    if round(seconds, 1) < 60:
        return f"{seconds:.1f}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}\u00a0h {minutes:02d}\u00a0min" if hours else f"{minutes}\u00a0min {rest:02d}\u00a0s"


def memory(megabytes: Any) -> str:
    return _write(megabytes, lambda mb: f"{mb / 1e3:.1f}\u00a0GB" if mb >= 1e3 else f"{mb:.0f}\u00a0MB")


# ---- estimates of a plan, in ASCII --------------------------------------------------------------------------------


def size(number: float) -> str:
    """`1.2 GB`, of a number of bytes."""
    return _in_units(number, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), "B", 1, 100)


def about_count(value: float) -> str:
    """`12,345`, or `1.2e15` for ten million and more."""
    return f"{value:,.0f}" if value < 1e7 else f"{value:.1e}".replace("e+", "e").replace("e0", "e")


def about_duration(seconds: float) -> str:
    return _in_units(seconds, (("days", 86400.0), ("h", 3600.0), ("min", 60.0)), "s", 2, 10)


def _in_units(number: float, units: Sequence[tuple[str, float]], smallest: str, least: int, decimals_below: int) -> str:
    """`number` in the largest unit of which there are at least `least`."""
    for unit, length in units:
        if number >= least * length:
            return f"{number / length:.{int(number < decimals_below * length)}f} {unit}"
    return f"{number:.0f} {smallest}"
