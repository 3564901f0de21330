"""Block masks by compiled code, where there is such; see masks.c for what it computes."""

import ctypes
from functools import cache

import numpy as np

from ssd.native.build import library

WIDEST = 64  # tokens of a grid's side: a row is a word
NUMBER, REAL, POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


@cache
def functions() -> ctypes.CDLL | None:
    code = library()
    if code is not None:
        code.ssd_blocks.argtypes = [POINTER, POINTER, *[NUMBER] * 3, *[REAL] * 3, NUMBER, POINTER]
        code.ssd_blocks.restype = None
    return code


def available() -> bool:
    return functions() is not None


def blocks(
    wanted: np.ndarray,
    grid: tuple[int, int],
    smallest: float,
    largest: float,
    spread: float,
    tries: int,
    keys: np.ndarray,
) -> np.ndarray:
    """As `draw_blocks` of ssd.masking.shapes, on grids of at most `WIDEST` a side. (G, H, W) bool"""
    wanted = np.ascontiguousarray(wanted, dtype=np.float64)
    keys = np.ascontiguousarray(keys, dtype=np.uint64)
    if max(grid) > WIDEST or wanted.ndim != 1 or wanted.shape != keys.shape:
        raise ValueError(f"grid {grid}, {wanted.shape} wanted numbers and {keys.shape} keys")
    masks = np.empty((len(wanted), *grid), dtype=bool)
    functions().ssd_blocks(  # type: ignore[union-attr]
        keys.ctypes.data, wanted.ctypes.data, len(wanted), *grid, smallest, largest, spread, tries, masks.ctypes.data
    )
    return masks
