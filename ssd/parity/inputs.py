"""What both sides of a comparison are given: tensors, weights, pictures and masks that are alike on every machine.

Numbers come from integer arithmetic keyed by a name, never from a generator of torch or NumPy, whose streams may change
with their versions. They are float32 exactly, so that a restatement in float64 starts from the same ones.
"""

import math
import zlib

import numpy as np
import torch
from torch import Tensor, nn

from ssd.data.randomness import uniforms

PROJECTIONS = 3
SHORT = 20  # tensors of up to so many numbers are kept whole


def numbers(name: str, *shape: int) -> Tensor:
    """Uniform in [-1, 1), float32, a function of name and shape."""
    return torch.from_numpy(2 * uniforms(shape, zlib.crc32(name.encode())) - 1).float()


def distribution(name: str, *shape: int) -> Tensor:
    """Rows that sum to 1, over the last dimension, float32."""
    weights = (3 * numbers(name, *shape).double()).exp()
    return (weights / weights.sum(-1, keepdim=True)).float()


def weights(name: str, *shape: int) -> Tensor:
    """Of a parameter by its name, of a size that lets a network answer differently to different pictures."""
    values = numbers(name, *shape)
    if name.endswith(("weight_g", "gamma", "gamma_1", "gamma_2")) or (name.endswith("weight") and len(shape) == 1):
        return 1 + values / 4
    if name.endswith("bias"):
        return values / 8
    if name.endswith(("_token", "pos_embed")):
        return values / 2
    # of variance 1 / (numbers that are summed)
    return values * math.sqrt(3 / math.prod(shape[1:]))


@torch.no_grad()
def fill(module: nn.Module, prefix: str = "") -> None:
    """Gives every parameter its `weights`; copies of a network get the same ones."""
    for name, parameter in module.named_parameters():
        parameter.copy_(weights(prefix + name, *parameter.shape))


def pictures(kind: str, step: int, *shape: int) -> Tensor:
    """(V, B, C, H, W) of one step, of mean 0 and variance 1."""
    return numbers(f"pictures {kind} {step}", *shape) * math.sqrt(3)


def normalisation() -> Tensor:
    """(2, 3) mean and deviation, of values in [0, 1], as data would have been normalised by."""
    return torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.25, 0.3]])


def levels(name: str, *shape: int) -> Tensor:
    """Whole numbers from 0 to 253 (..., H, W), whose differences along columns are odd but at the border: no gradient points
    to where one bin of directions ends, so that rounding moves none into the next."""
    even = 2 * (60 * (numbers(name, *shape) + 1)).floor()
    return even + torch.arange(shape[-2]).div(2, rounding_mode="floor")[:, None]


def level_pictures(step: int) -> Tensor:
    """(1, 8, 3, 32, 32) of one step, normalised, whose `levels` are whole numbers."""
    mean, deviation = normalisation()[:, :, None, None]
    return (levels(f"levels {step}", 1, 8, 3, 32, 32) / 255 - mean) / deviation


COUNTS = ((5, 0, 3, 8, 0, 2, 0, 6), (0, 7, 1, 0, 4, 0, 5, 0))


def masks(step: int, tokens: int = 16) -> Tensor:
    """(2, 8, tokens) bool: crops with masks of many sizes and without, by a fixed table that moves on with the steps."""
    table = torch.zeros(2, 8, tokens, dtype=torch.bool)
    for view in range(2):
        for sample in range(8):
            count = COUNTS[view][(sample + step) % 8]
            for number in range(count):
                table[view, sample, (5 * number + 3 * sample + 7 * view + step) % tokens] = True
    return table


def equal_masks(step: int, tokens: int = 16, shown: int = 4) -> Tensor:
    """(1, 8, tokens) bool: crops that show the same number of tokens, others in each sample and step."""
    table = torch.ones(1, 8, tokens, dtype=torch.bool)
    for sample in range(8):
        for number in range(shown):
            table[0, sample, (5 * number + 3 * sample + 7 * step) % tokens] = False
    return table


BOXES = (
    ((0.0, 0.0, 80.0, 60.0, 0.0), (40.0, 20.0, 50.0, 50.0, 1.0)),
    ((10.0, 5.0, 40.0, 40.0, 1.0), (20.0, 0.0, 60.0, 30.0, 0.0)),
    ((0.0, 0.0, 30.0, 30.0, 0.0), (60.0, 60.0, 30.0, 30.0, 0.0)),  # nothing in common
    ((0.0, 0.0, 40.0, 40.0, 1.0), (10.0, 10.0, 20.0, 20.0, 1.0)),
    ((0.0, 0.0, 40.0, 40.0, 0.0), (38.0, 38.0, 40.0, 40.0, 0.0)),  # too little
    ((5.0, 5.0, 50.0, 40.0, 0.0), (5.0, 5.0, 50.0, 40.0, 1.0)),
    ((30.0, 10.0, 50.0, 60.0, 1.0), (20.0, 40.0, 40.0, 30.0, 0.0)),
    ((0.0, 50.0, 90.0, 30.0, 0.0), (50.0, 30.0, 40.0, 60.0, 0.0)),
)
"""(8, 2, 5): left, top, width, height and whether flipped, of two views of each sample."""

SOUND_LENGTHS = (240, 130, 200, 300, 160, 260, 150, 220)
"""Samples of each sound."""


def frames_of_sound(samples: int) -> int:
    """Windows of ten samples every five, of which three every two make a frame."""
    return ((samples - 10) // 5 + 1 - 3) // 2 + 1


def hidden_frames(step: int) -> np.ndarray:
    """(8, T) bool: two spans of three frames in each sound, which move on with the steps."""
    table = np.zeros((len(SOUND_LENGTHS), frames_of_sound(max(SOUND_LENGTHS))), dtype=bool)
    for row, length in enumerate(SOUND_LENGTHS):
        starts = frames_of_sound(length) - 2
        for first in (3 * row + step, 7 * row + 4 * step + 5):
            table[row, first % starts : first % starts + 3] = True
    return table


LABELS = (3, 0, 4, 0, -1, 2, 3, 1)
"""Of the samples of a step; one of them could not be read."""


def shares(samples: int, step: int = 0) -> Tensor:
    """(samples, 5) in [0, 1): what is drawn of a view's spectrogram, before its ranges."""
    return (numbers(f"draws of spectra {step}", samples, 5) + 1) / 2


def blobs(name: str, samples: int) -> Tensor:
    """(samples, 6) around three places in turn."""
    places = 5 * numbers("places of blobs", 3, 6)
    return places.repeat(samples // 3, 1) + 0.3 * numbers(name, samples, 6)


def digest(values: Tensor) -> list[float]:
    """A tensor in few numbers: all of a short one, else sums with weights of 0.5 to 1 and either sign, divided by the root
    of the count, so that no element can be wrong unseen."""
    flat = values.detach().double().cpu().flatten()
    if len(flat) <= SHORT:
        return flat.tolist()
    signed = numbers("projections", PROJECTIONS, len(flat)).double()
    return ((signed / 2 + signed.sign() / 2) @ flat / math.sqrt(len(flat))).tolist()


def without_key_bias(name: str, change: Tensor) -> Tensor:
    """A parameter's change without that of attention's key biases: softmax takes no notice of them, so their gradient is
    rounding, which Adam scales up to whole steps."""
    if not name.endswith("qkv.bias"):
        return change
    change = change.clone()
    change[len(change) // 3 : 2 * len(change) // 3] = 0
    return change
