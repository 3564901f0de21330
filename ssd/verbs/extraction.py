"""What verbs that extract features ask: where, and how precisely."""

import argparse

import torch

from ssd.errors import UserError


def add_extraction(parser: argparse.ArgumentParser) -> None:
    """The options --precision and --device."""
    parser.add_argument(
        "--precision",
        default="32-true",
        choices=["32-true", "bf16-mixed", "16-mixed"],
        help="in which features are extracted; default: 32-true",
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where features are extracted, cpu, cuda or cuda:1; default: the GPU where there is one",
    )


def check_device(name: str) -> None:
    """Raises UserError for a device that this machine does not have."""
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device {name} cannot be used here ({reason}). Use cpu, or a device of this machine."
        ) from None
