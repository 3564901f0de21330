"""Reading files of weights safely, finding the networks in a checkpoint, and loading with every key accounted for."""

import argparse
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssd.errors import UserError

# what public training files hold besides tensors: their arguments, and rates that NumPy computed
NUMPY_SCALAR = np.float64(0).__reduce__()[0]
HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64)),
    (NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    (NUMPY_SCALAR, "numpy.core.multiarray.scalar"),  # its name before NumPy 2
]


def read_file(path: str | Path, mmap: bool = False) -> Any:
    """What `torch.save` wrote, on the CPU, without running any code in it; tensors stay on the disk where `mmap`.

    Raises UserError for a file that is missing, truncated, of another kind, or that holds Python objects.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}. Give the path of a checkpoint or a file of weights.")
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found or zipfile.is_zipfile(path):
            what = f" ({found[1]})" if found else ""
            raise UserError(
                f"{path} holds Python objects{what} beside tensors, which are not loaded because they can run code. "
                "Save its state dict alone, torch.save(model.state_dict(), FILE), and give that file."
            ) from None
        raise UserError(f"{path} is not a file that torch.save wrote. Give a checkpoint or weights.") from None
    # torch's unpickler runs a file of another kind as far as it goes, and fails in its own ways
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        size = path.stat().st_size
        raise UserError(
            f"{path} ({size} bytes) is truncated or not a file that torch.save wrote ({first_line(error)}). "
            "Copy it again, or use an earlier checkpoint of the run."
        ) from None


def read_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """A checkpoint of ours: `state_dict`, and under `ssd` what built the run. Raises UserError for other files."""
    contents = read_file(path, mmap)
    if not is_checkpoint(contents):
        kind = f"the keys {shortened(contents)}" if isinstance(contents, Mapping) else f"a {type(contents).__name__}"
        raise UserError(
            f"{path} is not a checkpoint that `ssd fit` wrote: it holds {kind}, and no 'ssd' with 'state_dict'. "
            "To start from public weights, give the file as the backbone's `weights`."
        )
    return contents


def is_checkpoint(contents: Any) -> bool:
    return isinstance(contents, Mapping) and isinstance(contents.get("ssd"), Mapping) and "state_dict" in contents


def backbones_in(state_dict: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Name of each network that has a backbone, such as "teacher.network" -> the state of its timm model."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in state_dict.items():
        network, part, rest = key.partition(".backbone.model.")
        if part:
            found.setdefault(network, {})[rest] = value
    return found


def backbone_state(
    checkpoint: Mapping[str, Any], network: str | None = None, where: str = "the checkpoint"
) -> dict[str, Tensor]:
    """The timm state dict of the backbone of `network`, which may name a part, as "student" or "teacher.large".

    None is the teacher's, and the student's where a method has no teacher that is like it (MAE, dBOT).
    """
    found = backbones_in(checkpoint["state_dict"])
    if network is None:
        taught = any(name.partition(".")[0] == "teacher" for name in found)
        network = "teacher" if taught or "student" not in found else "student"
    fitting = [name for name in found if name == network or name.startswith(f"{network}.")]
    if len(fitting) != 1:
        have = ", ".join(f"#{name}" for name in found) or "none"
        reason = "no backbone" if not fitting else f"{len(fitting)} backbones"
        raise UserError(f"{where} has {reason} under '{network}'. Name one after the file: it has {have}.")
    return found[fitting[0]]


def strict_load(module: nn.Module, state: Mapping[str, Any], what: str) -> None:
    """Load `state` when its keys and shapes are those of `module`; else one UserError that lists every
    unknown, missing and mis-shaped key, and the module stays as it was."""
    own = module.state_dict()
    unknown = [key for key in state if key not in own]
    missing = [key for key in own if key not in state]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in own.items()
        if isinstance(value, Tensor) and key in state and state[key].shape != value.shape
    ]
    faults = {"unknown": unknown, "missing": missing, "of another shape": shapes}
    if unknown or missing or shapes:
        listed = "; ".join(f"{len(keys)} {fault}: {shortened(keys)}" for fault, keys in faults.items() if keys)
        raise UserError(
            f"{what} does not fit {type(module).__name__}. {listed}. Use the name and arguments it was made with."
        )
    from ssd.parallel import load_whole  # which imports backbones, which import this

    load_whole(module, state)


def shortened(keys: Iterable[str], most: int = 20) -> str:
    keys = [str(key) for key in keys]
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
