"""Memory between steps."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_allocations() -> None:
    """Have glibc keep what is freed instead of returning it to the system.

    Training on a CPU allocates the same large tensors at every step; given back and asked for anew, each of their pages
    costs a fault, about a fifth of the time. Other C libraries and systems are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**28)
