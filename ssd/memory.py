"""The memory of this process: what it does with what it has freed, and how much it has."""

import ctypes
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")
"""Where Linux, and no other system, says what memory a process has."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BYTES = 2**30


def keep_freed_memory() -> None:
    """Freed memory stays with the process, for the next batch or step that needs as much: to get it anew from the system
    costs a loader an eighth of its time and a step on a CPU a tenth. Where the C library can be told so, which is glibc's."""
    if sys.platform != "linux":
        return
    tell = getattr(ctypes.CDLL(None), "mallopt", None)
    if tell is not None:
        tell(M_TRIM_THRESHOLD, KEPT_BYTES)
        tell(M_MMAP_THRESHOLD, KEPT_BYTES)


def status_mib(name: str) -> float:
    """A line of `STATUS`: "VmRSS", what the process has in memory, or "VmHWM", the most that it ever had."""
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))
