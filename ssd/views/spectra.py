"""What views of sounds do to spectrograms: mixing with another sound, and a crop that is resized.

What is drawn is a function of (seed, epoch, index), one row of numbers a view; it is applied to the levels of a whole batch, on
any device, where a network has made them. After Niizumi et al., "BYOL for Audio", IJCNN 2021, arXiv 2103.06695, section III-B.
"""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ssd.data.randomness import uniforms
from ssd.errors import UserError
from ssd.spectrogram import Levels

if TYPE_CHECKING:
    from ssd.views.sound import SoundViews

SPECTRUM = -12  # key of the numbers of spectrograms
DRAWS = 5  # of a view: share of the other sound, scale over bands and over time, place over bands and over time
EDGE = 2  # bands that a bicubic resize looks beyond
CANVAS = 1.5  # length over time of what crops are taken from, in lengths of the sound


def draw_spectra(views: "SoundViews", *place: int) -> dict[str, np.ndarray]:
    """kind -> (V, 5) float32 of a sound's views, a function of place = (seed, epoch, index); {} where they change nothing."""
    if not views.alters_spectra:
        return {}
    kinds = views.kinds()
    rows = uniforms((sum(map(len, kinds.values())), DRAWS), *place, SPECTRUM)
    low, high = views.resize or (1.0, 1.0)
    rows[:, 0] *= views.mix_share
    rows[:, 1:3] = low + (high - low) * rows[:, 1:3]
    ends = np.cumsum([len(members) for members in kinds.values()])[:-1]
    return dict(zip(kinds, np.split(rows.astype(np.float32), ends), strict=True))


def altered(levels: Levels, spectra: Tensor, views: "SoundViews") -> Levels:
    """Levels of V B sounds, view after view, as their rows of `draw_spectra` (V, B, 5) say: mixed, then cropped.

    Raises UserError where groups that are mixed do not divide the B sounds of a process or slice.
    """
    rows = spectra.flatten(0, 1)
    if views.mix_share > 0:
        if spectra.shape[1] % views.mix_group:
            raise UserError(
                f"mix_group: {views.mix_group} does not fit the {spectra.shape[1]} sounds of a process or slice. Use a divisor "
                "of them from 2 on, or mix_share: 0."
            )
        levels = mixed_levels(levels, rows[:, 0], views.mix_group)
    return levels if views.resize is None else resized_crop(levels, rows[:, 1:3], rows[:, 3:5])


def mixed_levels(levels: Levels, shares: Tensor, group: int) -> Levels:
    """log((1 - share) e^x + share e^z), z being the sound before x in its group, the last one before the first.

    Shares (B,) in [0, 1). A sound keeps its length; beyond its end the other is silent. Groups are `group` neighbours in the
    step's samples, whose order is drawn, so that ranks and slices of whole groups do not change them.
    """
    nepers = levels.values / levels.per_neper
    silent = torch.where(levels.there, nepers, -math.inf)
    other = silent.unflatten(0, (-1, group)).roll(1, 1).flatten(0, 1)
    share = shares[:, None, None]
    mixed = torch.logaddexp(torch.log1p(-share) + nepers, share.log() + other)
    return Levels(mixed * levels.per_neper, levels.counts, levels.per_neper)


def resized_crop(levels: Levels, scales: Tensor, places: Tensor) -> Levels:
    """A crop of each sound's spectrogram, resized bicubically to what it was.

    The crop is `scales` (B, 2) times as high and long as the sound, at most its bands and `CANVAS` times its length, and lies at
    `places` (B, 2) in [0, 1) in a canvas of that size, in whose middle the sound is. What is around the sound is its mean
    level. A sound alone and padded is cropped alike.
    """
    _, windows, mels = levels.values.shape
    there = levels.there
    lengths = there.sum((1, 2)).to(scales)  # (B,)
    height, width = torch.full_like(lengths, mels), (CANVAS * lengths).floor()
    high = (mels * scales[:, 0]).floor().clamp_min(1).minimum(height)
    wide = (lengths * scales[:, 1]).floor().clamp_min(1).minimum(width)
    top = (places[:, 0] * (height - high + 1)).floor()
    left = (places[:, 1] * (width - wide + 1)).floor() - ((width - lengths) / 2).floor()
    bands = top[:, None] + torch.arange(mels, device=top.device) * ((high - 1) / max(mels - 1, 1))[:, None]  # (B, mels)
    steps = (wide - 1) / (lengths - 1).clamp_min(1)
    moments = left[:, None] + torch.arange(windows, device=left.device) * steps[:, None]  # (B, T)

    mean = torch.where(there, levels.values, 0).sum((1, 2), keepdim=True) / (lengths[:, None, None] * mels)
    # behind the outermost bands they are repeated, as a resize of the crop alone would do
    canvas = F.pad(torch.where(there, levels.values - mean, 0), (EDGE, EDGE), mode="replicate")
    where = torch.stack(
        [
            (2 * (bands + EDGE) / (mels + 2 * EDGE - 1) - 1)[:, None].expand(-1, windows, -1),
            (2 * moments / max(windows - 1, 1) - 1)[:, :, None].expand(-1, -1, mels),
        ],
        dim=-1,
    )  # (B, T, mels, 2)
    crop = F.grid_sample(canvas[:, None], where, mode="bicubic", padding_mode="zeros", align_corners=True)[:, 0]
    return Levels(crop + mean, levels.counts, levels.per_neper)
