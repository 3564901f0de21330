"""What single moments tell: a linear classifier of one frame's feature, taught the label of its whole sample.

A network that knows what happens, or who speaks, at each moment answers from any of them; one that has to see the whole
answers from the pooled feature alone. The settings are chosen on samples that nothing is fitted on, frames of a sample
never on both sides.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd.batch import Tokens
from ssd.evaluation.logistic import PENALTIES, fit_logistic
from ssd.evaluation.protocol import Number, accuracy_number, check_finite, check_labels, count_classes
from ssd.evaluation.scaling import principal_axes, standardise
from ssd.evaluation.splits import held_out

FRAMES = 16
"""Of each sample, evenly over its length."""
SIDE = 16
"""To which frames are shrunk where their pixels are the feature, px."""


def frame_features(tokens: Tokens, count: int = FRAMES) -> Tensor:
    """The mean token of each of `count` moments, evenly over what is no padding; shorter samples show one twice. (B, count, D)"""
    moments, *rest = tokens.grid
    rows = math.prod(rest)
    features = tokens.patches.unflatten(1, (moments, rows)).mean(2)  # (B, t, D)
    lengths = torch.full((len(features),), moments, device=features.device)
    if tokens.valid is not None:
        lengths = tokens.valid.unflatten(1, (moments, rows))[:, :, 0].sum(1).clamp_min(1)
    share = (torch.arange(count, device=features.device) + 0.5) / count
    places = (share * lengths[:, None]).long()  # (B, count)
    return features.gather(1, places[:, :, None].expand(-1, -1, features.shape[2]))


def frames_of_clips(clips: Tensor) -> Tokens:
    """Frames of clips (B, C, T, H, W) by their pixels, each shrunk to 16 px: what a network has to beat."""
    moments = clips.shape[2]
    pictures = clips.transpose(1, 2).flatten(0, 1)  # (B T, C, H, W)
    small = F.interpolate(pictures, size=(SIDE, SIDE), mode="area") if pictures.shape[-1] > SIDE else pictures
    return Tokens(patches=small.flatten(1).unflatten(0, (-1, moments)), grid=(moments,))


def frame_numbers(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, seed: int = 0, **fit: Any
) -> list[Number]:
    """Top-1 accuracy of single frames, and of samples whose frames' log-probabilities are added up.

    Features (N, T, D) and (Q, T, D) of frames, labels (N,) and (Q,) of samples. The intervals count samples, since frames of
    one sample are no independent questions. `fit` is that of `fit_logistic`. Raises UserError for labels or features that
    cannot be used.
    """
    check_labels("the probe of frames", training=train_labels, test=test_labels)
    check_finite(train=train, test=test)
    classes, count = count_classes(train_labels, test_labels), train.shape[1]
    each, asked = standardise(train.flatten(0, 1), test.flatten(0, 1))
    basis, _ = principal_axes(each)
    each, asked = (rows @ basis for rows in (each, asked))
    labels = train_labels.repeat_interleave(count)

    fitted, held = held_out(train_labels, 0.1, seed)
    values = torch.tensor(sorted(PENALTIES, reverse=True))
    mine, others = frames_at(fitted, count), frames_at(held, count)
    heads = fit_logistic(each[mine], labels[mine], values, classes, **fit)
    correct = (heads.logits(each[others]).argmax(2) == labels[others]).sum(1)
    penalty = values[int(correct.argmax())]

    logits = fit_logistic(each, labels, penalty[None], classes, **fit).logits(asked)[0]
    single = (logits.argmax(1) == test_labels.repeat_interleave(count)).double().mean()
    added = logits.log_softmax(1).unflatten(0, (-1, count)).sum(1)
    whole = (added.argmax(1) == test_labels).double().mean()
    protocol = (
        f"frames-v1 {count} a sample, logistic, best of {len(PENALTIES)} penalties on 10% of train: l2={penalty:g}"
    )
    return [
        accuracy_number("frames/top1", float(single), protocol, test_labels),
        accuracy_number("frames/added_top1", float(whole), f"{protocol}, log-probabilities added", test_labels),
    ]


def frames_at(samples: Tensor, count: int) -> Tensor:
    """Rows of all frames of samples."""
    return (samples[:, None] * count + torch.arange(count, device=samples.device)).flatten()
