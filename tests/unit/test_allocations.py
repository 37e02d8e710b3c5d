"""What a process holds of memory that was freed, on Linux with glibc."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

BLOCKS = """
import sys, torch
from pathlib import Path
from prefold.trees.memory import arrange_allocations, free_memory

def held_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 // 2**20

arrange_allocations(kept=sys.argv[1] == "kept")
before = held_mb()
# Every other block outlives the rest, so what is freed are holes.
blocks = [torch.ones(3 * 2**20 // 4) for _ in range(100)]
blocks = blocks[::2]
after = held_mb() - before
free_memory()
print(after, held_mb() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
@pytest.mark.parametrize(("how", "expected"), [("kept", 300), ("returned", 150)])
def test_freed_blocks_are_kept_or_returned(how: str, expected: int) -> None:
    ran = subprocess.run([sys.executable, "-c", BLOCKS, how], capture_output=True, text=True, check=True)
    after, freed = map(int, ran.stdout.split())
    assert after == pytest.approx(expected, abs=20)
    assert freed == pytest.approx(150, abs=20)
