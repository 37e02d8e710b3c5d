"""Memory of this machine: what the process uses, what is available, and the refusal if that is not enough."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil

from prefold.errors import UserError

ANYWAY = "PREFOLD_ANYWAY"
"""Environment variable that `--anyway` sets: what looks too large is tried."""
BETWEEN_SAMPLES = 0.05
"""Seconds between samples, each of which takes some 30 microseconds."""
GROUPS, OWN_GROUPS, STATUS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"), Path("/proc/self/status")
FOOTPRINT, FOOTPRINT_BYTES, INFO_VERSION = 72, 512, 4
"""Offset of `ri_phys_footprint` in macOS' `rusage_info_v4`, bytes for the whole struct, and `RUSAGE_INFO_V4`."""


class TooLarge(UserError):
    """What is to be loaded takes more memory than is available."""


def require(where: str, needed: int, at_hand: int, advice: str = "") -> None:
    """Raises TooLarge: more memory is needed than available, and `--anyway` was not given."""
    if needed > at_hand and not anyway():
        what = f"needs {gigabytes(needed)} of memory, and {gigabytes(at_hand)} are at hand"
        advice = f"{advice}; " if advice else ""
        raise TooLarge(what, where=where, advice=f"{advice}`--anyway` tries it all the same")


def anyway() -> bool:
    return bool(os.environ.get(ANYWAY))


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


# ---- what the process uses --------------------------------------------------------------------------------------


def held(process: int | None = None) -> int | None:
    """Bytes of RAM that a process (None: this one) uses: its anonymous pages, also those in swap, and not pages mapped
    from files, which can be reclaimed. None if the system does not say."""
    if sys.platform.startswith("linux"):
        status = _status(process)
        return status["RssAnon"] + status.get("VmSwap", 0) if "RssAnon" in status else None
    return _footprint(process or os.getpid()) if sys.platform == "darwin" else None


def _status(process: int | None = None) -> dict[str, int]:
    """The memory figures of a process in `/proc`, in bytes."""
    path = Path(f"/proc/{process}/status") if process else STATUS
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    words = ((name, value.split()) for name, _, value in (line.partition(":") for line in lines))
    return {name: int(value[0]) * 1024 for name, value in words if value[-1:] == ["kB"]}


def _footprint(process: int) -> int | None:
    """macOS' own measure of what a process needs (`proc_pid_rusage`)."""
    buffer = ctypes.create_string_buffer(FOOTPRINT_BYTES)
    if ctypes.CDLL(None).proc_pid_rusage(process, INFO_VERSION, buffer):
        return None
    return ctypes.c_uint64.from_buffer(buffer, FOOTPRINT).value


class PeakMemory:
    """The peak of `held` of this process since `restart`, sampled by a thread some twenty times a second; None if the
    system does not say."""

    def __init__(self) -> None:
        self._peak: int | None = None
        self._thread: threading.Thread | None = None

    def restart(self) -> None:
        self._peak = held()
        if self._thread is None and self._peak is not None:
            self._thread = threading.Thread(target=self._watch, daemon=True, name="peak memory")
            self._thread.start()

    def read(self) -> int | None:
        now = held()
        if now is not None:
            self._peak = max(self._peak or 0, now)
        return self._peak

    def _watch(self) -> None:
        pause = threading.Event()
        while not pause.wait(BETWEEN_SAMPLES):
            self.read()


PEAK = PeakMemory()
"""The peak of the current stage."""


# ---- what is available ------------------------------------------------------------------------------------------


def available() -> int:
    """Bytes of RAM that this process can still allocate: without swapping, within the limits of control groups and of
    `ulimit`."""
    free: int = psutil.virtual_memory().available
    limit = left_by_ulimit()
    return max(0, min([free, *_left_by_groups(), *([] if limit is None else [limit])]))


def left_by_ulimit() -> int | None:
    """Bytes left within the limits of data and of address space (`ulimit -d`, `-v`), which count mapped files as well;
    None without such limits."""
    if not sys.platform.startswith("linux"):
        return None
    status, left = _status(), []
    for limit, used in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            left.append(max(0, soft - status.get(used, 0)))
    return min(left, default=None)


def _left_by_groups() -> Iterator[int]:
    """For each control group of the process and its ancestors: the limit minus what cannot be reclaimed."""
    try:
        lines = OWN_GROUPS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            root = GROUPS if (GROUPS / "cgroup.controllers").exists() else GROUPS / "unified"
            names = ("memory.max", "memory.current", "file", "shmem")
        elif "memory" in kinds.split(","):
            root, names = (
                GROUPS / "memory",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem"),
            )
        else:
            continue
        # In a container the path may be the host's, and its own group is the root.
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            if (left := _left_in(folder, *names)) is not None:
                yield left
            if folder == root:
                break


def _left_in(folder: Path, limit: str, used: str, cached: str, shared: str) -> int | None:
    """Bytes left in a control group; None if it has no limit or does not exist."""
    try:
        most, taken = (int((folder / name).read_text(encoding="ascii")) for name in (limit, used))
        kinds = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    # The page cache is reclaimed when memory runs short, files that exist in memory alone are not.
    return max(0, most - taken + int(kinds.get(cached, 0)) - int(kinds.get(shared, 0)))
