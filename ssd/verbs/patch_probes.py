"""The measures of `ssd probe` that need more of every sample than pooled features: the attentive probe, segmentation, frames."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssd.batch import Tokens
from ssd.data.label_maps import LabelMaps
from ssd.data.sources import Source, Subset, held_out
from ssd.errors import UserError
from ssd.evaluation.attentive import attentive_numbers
from ssd.evaluation.features import extract, log_mel_windows
from ssd.evaluation.frame_probe import FRAMES, frame_features, frame_numbers, frames_of_clips
from ssd.evaluation.patches import Patches, extract_patches
from ssd.evaluation.protocol import Number
from ssd.evaluation.segmentation import segmentation_numbers
from ssd.verbs.loading import check_pictures, of_pictures
from ssd.views.geometry import evaluation_map
from ssd.views.sound import SoundViews
from ssd.views.view import Views

TEST_SHARE = 0.2
"""Of pictures that come without a held-out part."""


def attentive_of(
    embed: Callable[[Tensor], Tokens], data: Any, seed: int = 0, progress: bool = False, **settings: Any
) -> list[Number]:
    """The attentive probe of a network on labelled data, prepared; `settings` are device and precision.

    Raises UserError where the data has no labels, or the network answers a single patch.
    """
    loaders = data.test_dataloader()
    if len(loaders) < 2:
        raise UserError(
            "the data has no labels, which the attentive probe needs. Give data with labels by --data, or leave the measure out."
        )
    with tempfile.TemporaryDirectory() as folder:
        train, test = (
            extract_patches(embed, loader, file=Path(folder, str(part)), progress=bar("patches", progress), **settings)
            for part, loader in enumerate(loaders)
        )
        if train.features.shape[1] < 2:
            raise UserError(
                f"the network answers {train.features.shape[1]} patch a sample, and attention needs several. Probe a network "
                "with smaller patches, or at a larger evaluation size, or leave the measure attentive out."
            )
        return attentive_numbers(train.features, train.labels, test.features, test.labels, seed=seed, progress=progress)


def segmentation_of(
    embed: Callable[[Tensor], Tokens], data: Any, maps: str, seed: int = 0, progress: bool = False, **settings: Any
) -> list[Number]:
    """Segmentation of the data's pictures by the label maps in the folder `maps`, of the parts that are seen.

    The data's own held-out part is tested on, or where it has none a fifth of the pictures, always the same.
    Raises UserError where maps do not fit the pictures, or the patches the evaluation view.
    """
    check_pictures(data, "probe --measures segmentation")
    parts = test_parts(data)
    # before any network runs: a missing map ends it
    labels = [LabelMaps(maps, source) for source in parts]
    size, crop = data.views.evaluation_size, data.views.evaluation_crop
    with tempfile.TemporaryDirectory() as folder:
        found: list[Patches] = []
        for part, source in enumerate(parts):
            loader = data.look_at(source)
            file = Path(folder, str(part))
            found.append(extract_patches(embed, loader, file=file, progress=bar("patches", progress), **settings))
        check_grid(found[0].grid, size)
        seen = [
            torch.from_numpy(np.stack([evaluation_map(labels[part][i], size, crop) for i in one.index.tolist()]))
            for part, one in enumerate(found)
        ]
        train, test = found
        rows, columns = train.grid
        return segmentation_numbers(
            train.features, seen[0], test.features, seen[1], (rows, columns), seed=seed, progress=progress
        )


def frames_of(
    embed: Callable[[Any], Tokens], data: Any, seed: int = 0, progress: bool = False, **settings: Any
) -> list[Number]:
    """The probe of single frames of labelled clips or sounds, prepared. Raises UserError for pictures, and without labels."""
    if of_pictures(data):
        raise UserError(
            f"--measures frames is for clips and sounds, and the data is {type(data).__name__}. Leave it out."
        )

    def features(samples: Any) -> Tensor:
        return frame_features(embed(samples)).flatten(1)

    train, test = (
        extract(features, loader, progress=bar("frames", progress), **settings) for loader in data.test_dataloader()
    )
    known, asked = train.labels >= 0, test.labels >= 0
    both = [each.unflatten(1, (FRAMES, -1)) for each in (train.features[known], test.features[asked])]
    return frame_numbers(both[0], train.labels[known], both[1], test.labels[asked], seed=seed)


def samples_alone(views: Views) -> Callable[[Any], Tokens]:
    """Frames of samples without a network."""
    return log_mel_windows(views.rate_hz) if isinstance(views, SoundViews) else frames_of_clips


def test_parts(data: Any) -> list[Source]:
    """What is trained on and what is tested on."""
    parts = list(data.parts().values())
    if len(parts) == 2:
        return parts
    (everything,) = parts
    if len(everything) < 5:
        raise UserError(f"segmentation of {len(everything)} pictures leaves none to test on. Give at least 5.")
    return [Subset(everything, rows) for rows in held_out(len(everything), TEST_SHARE)]


def check_grid(grid: tuple[int, ...], size: int) -> None:
    """Raises UserError where patches are not on a square grid that covers the evaluation view and no more."""
    if len(grid) != 2 or any(size % count for count in grid):
        raise UserError(
            f"the network answers a grid of {' x '.join(map(str, grid))} patches of pictures of {size} px, which do not divide "
            "it, so that labels cannot be laid over it. Probe a network whose evaluation view is a multiple of its patches."
        )


def bar(text: str, progress: bool) -> str | None:
    return text if progress else None
