"""What a case is, and how far its numbers are from the recorded ones."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from ssd.parity.inputs import digest

Values = dict[str, list[float]]

ON_CUDA = 10.0
"""Factor on tolerances there: other kernels add in other orders, and some functions are less exact."""


@dataclass(frozen=True)
class Case:
    """Something of ours that has a recorded value.

    Args:
        name: as in the table and among the recorded values.
        tolerance: largest difference in float32 on a CPU, absolute for numbers up to 1 and relative above.
        compute: our values on a device, name -> tensor of any shape.
        rounds: whether what remains is rounding, of which a GPU may have more.
    """

    name: str
    tolerance: float
    compute: Callable[[torch.device], dict[str, Tensor]]
    rounds: bool = True

    def tolerance_on(self, device: torch.device) -> float:
        return self.tolerance * (ON_CUDA if self.rounds and device.type == "cuda" else 1.0)


def recorded() -> dict[str, Values]:
    """Case -> output -> its digest, from restatements of the equations that call nothing of ours."""
    return json.loads(files("ssd.parity").joinpath("values.json").read_text())


def check(case: Case, expected: Values, device: torch.device) -> dict[str, Any]:
    """The row of one case: {case, difference, tolerance, ok, worst}, `worst` the output that is furthest off.

    What a case cannot compute is infinitely far off, and `worst` is the error.
    """
    tolerance = case.tolerance_on(device)
    try:
        found = {name: digest(tensor) for name, tensor in case.compute(device).items()}
    except Exception as error:  # one broken part must not hide what the others are
        first_line = str(error).partition("\n")[0]
        difference, worst = math.inf, f"{type(error).__name__}: {first_line}"
    else:
        difference, worst = furthest(found, expected)
    return {
        "case": case.name,
        "difference": difference if math.isfinite(difference) else None,
        "tolerance": tolerance,
        "ok": difference <= tolerance,
        "worst": worst,
    }


def furthest(found: Values, expected: Values) -> tuple[float, str]:
    """The largest difference and the output it is in; infinite where an output is missing, new or not finite."""
    if found.keys() != expected.keys():
        names = sorted(found.keys() ^ expected.keys())
        return math.inf, f"{names[0]}, which only {'ours has' if names[0] in found else 'the record has'}"
    differences = {name: difference_of(found[name], expected[name]) for name in expected}
    worst = max(differences, key=differences.__getitem__)
    return differences[worst], worst


def difference_of(found: list[float], expected: list[float]) -> float:
    if len(found) != len(expected) or not all(map(math.isfinite, found)):
        return math.inf
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(found, expected, strict=True))
