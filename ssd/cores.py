"""The processor cores of this machine: how many this process may use, and whether other work has them."""

import os
import time
from pathlib import Path

STAT = Path("/proc/stat")
"""Where Linux, and no other system, says what its cores have done."""
IDLE = (3, 4)  # columns: idle, and waiting for a disk


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy_cores(seconds: float = 0.3) -> float:
    """How many of the machine's cores work while this process sleeps for a moment; 0 where that is not known."""
    if not STAT.is_file():
        return 0.0
    before = ticks()
    time.sleep(seconds)
    passed = [now - then for now, then in zip(ticks(), before, strict=True)]
    idle = sum(passed[column] for column in IDLE)
    return (os.cpu_count() or 1) * (1 - idle / max(sum(passed), 1))


def ticks() -> list[int]:
    """User, nice, system, idle and so on, of all cores since the start."""
    return [int(number) for number in STAT.read_text().splitlines()[0].split()[1:9]]
