"""Means and deviations that are taken out of pictures, by name or as numbers, and how they are put back."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from ssd.errors import UserError

NAMED: dict[str, tuple[list[float], list[float]]] = {
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
}
"""Mean and standard deviation of red, green and blue in [0, 1]: what most networks of ImageNet were trained with, and CLIP's."""


def given_normalisation(
    normalize: Any, channels: int, name: str = "normalize"
) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation of each channel for a setting of this `name`; None for "data", which leaves it to the data.

    Raises UserError for another name than those of `NAMED`, or numbers that cannot be.
    """
    if normalize == "data":
        return None
    if isinstance(normalize, str) and normalize in NAMED:
        if channels != 3:
            raise UserError(
                f"{name} is '{normalize}', which is for 3 channels, and channels is {channels}. Use 'data'."
            )
        return NAMED[normalize]
    if not isinstance(normalize, Mapping) or set(normalize) != {"mean", "std"}:
        names = ", ".join(f"'{known}'" for known in NAMED)
        raise UserError(f"{name} is {normalize!r}. Use 'data', {names} or {{mean: [...], std: [...]}}.")
    mean, std = ([float(value) for value in normalize[part]] for part in ("mean", "std"))
    if len(mean) != channels or len(std) != channels or min(std) <= 0 or not np.isfinite([*mean, *std]).all():
        raise UserError(
            f"{name} has mean {mean} and std {std} for {channels} channels. Give one finite number a channel each, "
            "std above 0, for values in [0, 1]."
        )
    return mean, std


def put_back(pictures: Tensor, normalisation: Tensor | None) -> Tensor:
    """Normalised pictures (..., C, H, W) as they were: values in [0, 1].

    Args:
        normalisation: (2, C) mean and standard deviation, as `Batch.normalisation`.

    Raises UserError where the batch does not say it.
    """
    if normalisation is None:
        raise UserError(
            "the batch does not say by which mean and deviation its pictures were normalised, and this method looks at them "
            "as they were. Set normalisation of Batch, (2, C), as our data does."
        )
    mean, std = normalisation[:, :, None, None]
    return pictures.float() * std + mean
