"""The C code of this folder, compiled for this machine the first time it is asked for, by the compiler that is there.

Nothing needs it: where there is no compiler, torch does the same work, more slowly, and one line says so. What is
compiled is kept in the user's cache folder (`~/.cache/ssd`, or what SSD_CACHE names), under a name that stands for
source, compiler and processor, so that machines that share a home each find their own. `SSD_NATIVE=0` in the
environment turns it off.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from ssd.cache_folder import cache_folder

log = logging.getLogger(__name__)

SOURCES = sorted(Path(__file__).parent.glob("*.c"))
COMPILERS = ("cc", "gcc", "clang")
# what -ffast-math means for the code at hand; as one flag it would change how the whole process treats tiny numbers
FAST_MATH = "no-math-errno no-trapping-math finite-math-only no-signed-zeros associative-math reciprocal-math"
FLAGS = ["-O3", "-std=gnu11", "-shared", "-fPIC", "-fvisibility=hidden", "-Wno-psabi"]
FLAGS += [f"-f{name}" for name in FAST_MATH.split()]
TUNING: tuple[list[str], ...] = (["-march=native"], ["-mcpu=native"], [])
LONGEST_S = 120


@cache
def library() -> ctypes.CDLL | None:
    """The compiled code, or None where it is turned off or cannot be had, which is said once."""
    if os.environ.get("SSD_NATIVE", "1") == "0":
        return None
    try:
        return ctypes.CDLL(str(compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning(
            "views are made by torch, which takes about four times as long as C code compiled here does: %s. "
            "A C compiler (gcc or clang) on the path mends this; SSD_NATIVE=0 says that it is meant.",
            error,
        )
        return None


def compiled() -> Path:
    """The file of the compiled code, made where it is missing. Raises OSError or SubprocessError with the reason."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, COMPILERS), None)
    if compiler is None:
        raise OSError("there is no C compiler")
    told = [*(source.read_text() for source in SOURCES), version(compiler), processor(), *FLAGS]
    name = hashlib.sha256("\n".join(told).encode()).hexdigest()
    target = cache_folder() / f"native-{name[:16]}.so"
    if not target.exists():
        # under another name first: other processes may be at it too
        with tempfile.TemporaryDirectory(dir=target.parent) as place:
            made = Path(place) / "native.so"
            compile_to(compiler, made)
            os.replace(made, target)
    return target


def compile_to(compiler: str, target: Path, tuning: Sequence[Sequence[str]] = TUNING) -> None:
    """By the first of `tuning` that the compiler knows. Raises OSError with the compiler's last words."""
    for tuned in tuning:
        command = [*compiler.split(), *FLAGS, *tuned, "-o", str(target), *map(str, SOURCES), "-lm"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S)
        if result.returncode == 0:
            return
    reason = (result.stderr or result.stdout).strip().splitlines()
    raise OSError(f"{compiler} failed" + (f" ({reason[-1]})" if reason else ""))


def version(compiler: str) -> str:
    return subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True, timeout=LONGEST_S).stdout


def processor() -> str:
    """What distinguishes this machine's instructions from another's."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    told = [line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))]
    return "\n".join([platform.machine(), *sorted(set(told))])
