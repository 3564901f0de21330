"""Segmentation from frozen patches: a linear layer, and nearest neighbours, against the label of every pixel.

Both give each patch a score for every class and enlarge the scores to the pixels, bilinearly, where the largest wins
(Oquab et al., "DINOv2", 2023, section 7.4, for the linear layer; Balazevic et al., "Towards In-context Scene
Understanding", NeurIPS 2023, for the neighbours). Departs from them: the linear layer's scores are enlarged to the
quarters of patches while it is trained, each with the shares of the classes among its pixels as the target, which comes
within half a point of mIoU of the loss of every pixel and costs a fraction; features are standardised, without batch
normalisation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor

from ssd.data.label_maps import IGNORED
from ssd.data.randomness import generator
from ssd.errors import UserError
from ssd.evaluation.confusion import class_accuracies
from ssd.evaluation.heads import Heads
from ssd.evaluation.knn import SCORES_AT_ONCE, in_float32
from ssd.evaluation.patches import in_parts, scaling
from ssd.evaluation.protocol import Number
from ssd.evaluation.splits import held_out

RATES = (3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
FINER = 2
"""Places in a patch, each way, that the linear layer is taught."""
ORDER, BANK = 5, 6
"""Keys of the order of training and of the choice of patches to compare with."""
MOST_PATCHES = 50_000
PICTURES = 16  # that are enlarged at a time


@dataclass
class Segmented:
    """How many pixels of class i were taken for class j.

    Args:
        matrix: (C, C) int64.
        setting: the learning rate that was chosen without the test set, None where there is none.
    """

    matrix: Tensor
    setting: float | None = None

    @property
    def iou(self) -> Tensor:
        """Intersection over union of each class, NaN for one that neither is there nor was answered. (C,) float64"""
        right = self.matrix.diagonal().double()
        return right / (self.matrix.sum(0) + self.matrix.sum(1) - right)

    @property
    def miou(self) -> float:
        return float(self.iou.nanmean())

    @property
    def pixel_accuracy(self) -> float:
        return float(self.matrix.diagonal().sum() / self.matrix.sum())

    @property
    def accuracies(self) -> Tensor:
        """Share of each class's pixels that are right, NaN for one that is not there. (C,) float64"""
        return class_accuracies(self.matrix)

    def measures(self) -> dict[str, float]:
        return {
            "miou": self.miou,
            "pixel_accuracy": self.pixel_accuracy,
            "class_accuracy": float(self.accuracies.nanmean()),
        }


def segmentation_numbers(
    train: Tensor,
    train_maps: Tensor,
    test: Tensor,
    test_maps: Tensor,
    grid: tuple[int, int],
    seed: int = 0,
    progress: bool = False,
    **training,
) -> list[Number]:
    """mIoU, accuracy over pixels and mean accuracy of the classes, by a linear layer and by neighbours.

    Patch features (N, P, D) and (Q, P, D), row-major over `grid`; label maps (N, H, W) and (Q, H, W) uint8 of the pictures
    as the network saw them, 255 for pixels that do not count. Chance gives every pixel the commonest class of the test set.
    `training` is passed to `train_layers`.
    """
    classes = check_maps(train, train_maps, test, test_maps, grid)
    sizes = torch.bincount(test_maps[test_maps != IGNORED].long(), minlength=classes)
    always = torch.zeros(classes, classes, dtype=torch.long)
    always[:, int(sizes.argmax())] = sizes.cpu()
    chance = Segmented(always)
    both = (train, train_maps, test, test_maps, grid, classes)
    found = {
        "linear": linear_segmentation(*both, seed=seed, progress=progress, **training),
        "knn": knn_segmentation(*both, seed=seed, progress=progress),
    }
    bank = min(MOST_PATCHES, train.shape[0] * train.shape[1])
    side = "x".join(map(str, test_maps.shape[1:]))
    settings = {
        "linear": f"best of {len(RATES)} rates on 10% of train: {found['linear'].setting:g}",
        "knn": f"k=20 T=0.07, at most {bank} patches",
    }
    numbers = []
    for name, segmented in found.items():
        protocol = f"segmentation-{name}-v1 {settings[name]}, {grid[0]}x{grid[1]} patches, {side} px"
        guessed = chance.measures()
        numbers += [
            Number(f"segmentation/{name}/{measure}", value, protocol, guessed[measure])
            for measure, value in segmented.measures().items()
        ]
    return numbers


def linear_segmentation(
    train: Tensor,
    train_maps: Tensor,
    test: Tensor,
    test_maps: Tensor,
    grid: tuple[int, int],
    num_classes: int,
    rates: Sequence[float] = RATES,
    held_out_share: float = 0.1,
    seed: int = 0,
    progress: bool = False,
    **training,
) -> Segmented:
    """The test pixels by the layer whose rate had the best mIoU on held-out training pictures, then trained on all.

    Arguments as `segmentation_numbers`. Ties go to the smaller rate. `training` is passed to `train_layers`.
    """
    mean, factor = scaling(train)
    rates = sorted(rates)

    def layers(rows: Tensor, rates: Sequence[float], text: str) -> Heads:
        bar = text if progress else None
        return train_layers(
            train, train_maps, rows, grid, num_classes, rates, mean, factor, seed=seed, progress=bar, **training
        )

    def answers(heads: Heads, features: Tensor, maps: Tensor, rows: Tensor) -> list[Tensor]:
        matrices = torch.zeros(len(heads.weight), num_classes, num_classes, dtype=torch.long)
        for some in rows.split(PICTURES):
            scores = heads.logits(((features[some].float() - mean) * factor).flatten(0, 1))
            for matrix, score in zip(matrices, scores.unflatten(1, (len(some), -1)), strict=True):
                matrix += pixel_confusion(score, maps[some], grid)
        return list(matrices)

    if len(rates) > 1:
        if len(train) < 2:
            raise UserError("linear segmentation needs two training pictures, one to choose the rate on. Give more.")
        fit, held = held_out(torch.zeros(len(train), dtype=torch.long), held_out_share, seed)
        heads = layers(fit, rates, f"{len(rates)} linear layers")
        scores = [Segmented(matrix).miou for matrix in answers(heads, train, train_maps, held)]
        rates = [rates[max(range(len(rates)), key=scores.__getitem__)]]
    heads = layers(torch.arange(len(train)), rates, "linear layer")
    (matrix,) = answers(heads, test, test_maps, torch.arange(len(test)))
    return Segmented(matrix, rates[0])


def train_layers(
    features: Tensor,
    maps: Tensor,
    rows: Tensor,
    grid: tuple[int, int],
    num_classes: int,
    rates: Sequence[float],
    mean: Tensor,
    factor: Tensor,
    epochs: int = 10,
    min_steps: int = 500,
    batch_size: int = 16,
    momentum: float = 0.9,
    seed: int = 0,
    progress: str | None = None,
) -> Heads:
    """One linear layer for each learning rate, from zero, all seeing the same batches of pictures. -> G = len(rates)

    Cross-entropy of the enlarged scores against the shares of the classes in each quarter of a patch, a quarter counting
    by the share of its pixels that have a label. SGD with momentum, the rate falling to zero along half a cosine, as
    `linear.train_heads`.
    """
    number, width = len(rows), features.shape[2]
    batch_size = min(batch_size, number)
    steps_per_epoch = number // batch_size
    epochs = max(epochs, math.ceil(min_steps / steps_per_epoch))
    total = epochs * steps_per_epoch
    groups = len(rates)
    fine = (FINER * grid[0], FINER * grid[1])
    weights = [torch.zeros(width, groups * num_classes), torch.zeros(groups * num_classes)]
    speeds = [torch.zeros_like(weight) for weight in weights]
    rate = torch.tensor(rates).repeat_interleave(num_classes)
    with Progress(disable=progress is None, transient=True) as bar:
        task = bar.add_task(progress or "", total=total)
        for step in range(total):
            epoch, place = divmod(step, steps_per_epoch)
            if place == 0:
                order = rows[torch.from_numpy(generator(ORDER, seed, epoch).permutation(number))]
            some = order[place * batch_size : (place + 1) * batch_size].sort().values  # in order, for a file's sake
            batch = (features[some].float() - mean) * factor
            shares = class_shares(maps[some], fine, num_classes)[:, None]  # (b, 1, 4 P, C)
            with torch.enable_grad():
                weight, bias = (part.detach().requires_grad_() for part in weights)
                planes = (batch @ weight + bias).mT.unflatten(2, grid)  # (b, G C, h, w)
                planes = enlarged(planes, fine).flatten(2).unflatten(1, (groups, num_classes))
                # heads of different rates share nothing but the batch, so that the sum's gradient is that of each
                loss = -(shares * planes.log_softmax(2).mT).sum() / shares.sum().clamp_min(1)
                gradients = torch.autograd.grad(loss, (weight, bias))
            now = rate * (math.cos(math.pi * step / total) + 1) / 2
            speeds = [momentum * speed + gradient for speed, gradient in zip(speeds, gradients, strict=True)]
            weights = [weight - now * speed for weight, speed in zip(weights, speeds, strict=True)]
            bar.advance(task)
    weight, bias = weights
    return Heads(weight.unflatten(1, (groups, num_classes)).transpose(0, 1), bias.unflatten(0, (groups, num_classes)))


def knn_segmentation(
    train: Tensor,
    train_maps: Tensor,
    test: Tensor,
    test_maps: Tensor,
    grid: tuple[int, int],
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    most_patches: int = MOST_PATCHES,
    seed: int = 0,
    progress: bool = False,
) -> Segmented:
    """The test pixels by the k most similar training patches, which vote for the classes in them by their shares.

    Arguments as `segmentation_numbers`; cosine, votes weighted by exp(similarity / temperature). Of more training patches
    with a label than `most_patches` a random part is compared with.
    """
    shares = torch.cat([class_shares(maps, grid, num_classes) for maps in train_maps.split(PICTURES)]).flatten(0, 1)
    places = (shares.sum(1) > 0).nonzero().squeeze(1)
    if len(places) > most_patches:
        places = places[torch.from_numpy(generator(BANK, seed).permutation(len(places))[:most_patches])].sort().values
    shares = shares[places]
    bank = F.normalize(train.flatten(0, 1)[places].float(), dim=1)
    k = min(k, len(bank))
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.long)
    at_once = max(1, SCORES_AT_ONCE // (len(bank) * test.shape[1]))
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("neighbours of patches", total=len(test))
        for features, maps in zip(test.split(at_once), test_maps.split(at_once), strict=True):
            queries = F.normalize(features.float(), dim=2).flatten(0, 1)
            votes = []
            for some in queries.split(max(1, SCORES_AT_ONCE // len(bank))):
                similarity, index = in_float32(some, bank, k)
                weight = ((similarity - similarity[:, :1]) / temperature).exp()
                votes.append(torch.einsum("qk,qkc->qc", weight / weight.sum(1, keepdim=True), shares[index]))
            matrix += pixel_confusion(torch.cat(votes).unflatten(0, features.shape[:2]), maps, grid)
            bar.advance(task, len(features))
    return Segmented(matrix)


def class_shares(maps: Tensor, grid: tuple[int, int], num_classes: int) -> Tensor:
    """Of each patch's pixels the share of every class; what is missing from 1 has no label. (B, H, W) -> (B, P, C)

    A pixel belongs to the patch that its centre lies in.
    """
    batch, height, width = maps.shape
    rows, columns = (
        (2 * torch.arange(size) + 1) * count // (2 * size) for size, count in zip((height, width), grid, strict=True)
    )
    patch = (rows[:, None] * grid[1] + columns).to(maps.device)  # (H, W)
    patches = grid[0] * grid[1]
    place = torch.arange(batch, device=maps.device)[:, None, None] * patches + patch
    labelled = maps != IGNORED
    cell = place[labelled] * num_classes + maps[labelled].long()
    counts = torch.bincount(cell, minlength=batch * patches * num_classes).view(batch, patches, num_classes)
    pixels = torch.bincount(patch.flatten(), minlength=patches)
    return counts / pixels[:, None].clamp_min(1).float()


def pixel_confusion(scores: Tensor, maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Scores (B, P, C) enlarged to the pixels, the largest against the maps (B, H, W). -> (C, C) int64"""
    classes = scores.shape[2]
    counts = torch.zeros(classes * classes, dtype=torch.long)
    for some, labels in zip(scores.split(PICTURES), maps.split(PICTURES), strict=True):
        planes = some.mT.unflatten(2, grid)  # (b, C, h, w)
        answers = enlarged(planes, labels.shape[1:]).argmax(1)
        counted = labels != IGNORED
        counts += torch.bincount(labels[counted].long() * classes + answers[counted], minlength=classes * classes)
    return counts.view(classes, classes)


def enlarged(planes: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, h, w) -> (B, C, *size), bilinear between the centres of the patches."""
    return F.interpolate(planes, size=tuple(size), mode="bilinear", align_corners=False)


def check_maps(train: Tensor, train_maps: Tensor, test: Tensor, test_maps: Tensor, grid: tuple[int, int]) -> int:
    """The number of classes. Raises UserError where features and maps do not fit or no pixel has a label."""
    for name, features, maps in (("training", train, train_maps), ("test", test, test_maps)):
        if len(features) != len(maps) or features.shape[1] != grid[0] * grid[1]:
            raise UserError(
                f"{len(features)} {name} pictures of {features.shape[1]} patches do not fit {len(maps)} label maps and a grid "
                f"of {grid[0]} x {grid[1]}. Give each picture its map, and patch features in rows."
            )
        if not (maps != IGNORED).any():
            raise UserError(f"no pixel of the {len(maps)} {name} label maps has a label: all are {IGNORED}, or none.")
        for _, part in in_parts(features):
            if not part.isfinite().all():
                raise UserError(f"patch features of the {name} pictures are NaN or infinite. Probe another checkpoint.")
    return 1 + max(int(maps[maps != IGNORED].max()) for maps in (train_maps, test_maps))
