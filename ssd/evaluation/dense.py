"""What patches are worth, without labels: do they find their place again in another look at the same picture."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ssd.batch import Tokens
from ssd.data.randomness import uniforms_of_many
from ssd.evaluation.features import AUTOCAST
from ssd.evaluation.protocol import Number

PROTOCOL = "correspondence-v1 two crops of 40-100%, within one patch"
SMALLEST_GRID = 3
"""Of a map in which a place means something: on fewer patches nearly every guess is within one of the truth."""
LEFT, TOP, SIDE, FLIP = range(4)


def correspondence(embed: Callable[[Tensor], Tokens], pictures: Tensor, index: Tensor) -> Tensor:
    """Of each picture: patches asked for, those found, and those that chance would find. (B, 3)

    Two square crops of each picture (B, C, H, W), normalised, are drawn from its `index` (B,): 40 to 100 % of the area, each
    flipped with probability 1/2, the second in other contrast and shifted colours. For each patch of the first whose
    centre lies in the second, the most similar patch there (cosine) is right when its centre is no more than one patch
    away, in rows and columns. The same pictures give the same crops for every network.
    """
    numbers = uniforms_of_many((2, 4), [(int(place),) for place in index.tolist()])  # (B, 2, 4)
    boxes = torch.from_numpy(crops(numbers)).to(pictures.device, torch.float32)  # (B, 2, 4)
    colours = torch.from_numpy(numbers[:, 1, :2]).to(pictures)[..., None, None, None]  # (B, 2, 1, 1, 1)
    size = pictures.shape[-2:]
    looks = [cut(pictures, boxes[:, view], size) for view in range(2)]
    looks[1] = looks[1] * (0.6 + 0.8 * colours[:, 0]) + 0.6 * (colours[:, 1] - 0.5)
    tokens = [embed(look) for look in looks]
    here, there = (places(boxes[:, view], tokens[view].grid) for view in range(2))  # (B, N, 2) in shares of the picture

    low = boxes[:, 1, None, [LEFT, TOP]]  # (B, 1, 2)
    side = boxes[:, 1, SIDE, None, None]
    asked = ((here >= low) & (here < low + side)).all(-1)  # (B, N)
    patch = side[..., None] / torch.tensor(tokens[1].grid[::-1], device=pictures.device)  # of the second crop
    near = ((here[:, :, None] - there[:, None]).abs() <= patch * (1 + 1e-4)).all(-1)  # (B, N, N)
    first, second = (F.normalize(token.patches.float(), dim=-1) for token in tokens)
    nearest = (first @ second.transpose(1, 2)).argmax(-1, keepdim=True)  # (B, N, 1)
    found = near.gather(2, nearest)[..., 0]
    counts = [asked, asked & found, asked * near.float().mean(2)]
    return torch.stack([count.float().sum(1) for count in counts], dim=1)


def correspondence_number(counts: Tensor) -> Number:
    """The share of patches found, and what chance would give, from (B, 3) of `correspondence` or their sum (3,)."""
    asked, found, chance = counts.cpu().double().reshape(-1, 3).sum(0).tolist()
    return Number("dense/correspondence", found / max(asked, 1.0), PROTOCOL, chance / max(asked, 1.0))


def dense_number(
    embed: Callable[[Tensor], Tokens],
    loader: Iterable[Mapping[str, Tensor]],
    samples: int = 2000,
    device: torch.device | str = "cpu",
    precision: str = "32-true",
) -> Number | None:
    """`correspondence` over the first `samples` of a loader as `extract` takes it, None of networks without a map."""
    device, half = torch.device(device), AUTOCAST[precision]
    parts: list[Tensor] = []
    with torch.no_grad(), torch.autocast(device.type, half, enabled=half is not None):
        for batch in loader:
            if batch["sample"].ndim != 4 or sum(map(len, parts)) >= samples:
                break
            pictures = batch["sample"].to(device)
            if not parts and not has_places(embed(pictures[:1])):
                return None
            parts.append(correspondence(embed, pictures, batch["index"]))
    return correspondence_number(torch.cat(parts)) if parts else None


def has_places(tokens: Tokens) -> bool:
    """Whether the answer is a map that `correspondence` can be asked of."""
    return len(tokens.grid) == 2 and min(tokens.grid) >= SMALLEST_GRID


def pixel_patches(pictures: Tensor, patch: int) -> Tokens:
    """The pictures' own pixels, patch by patch: what a network has to beat. (B, C, H, W) -> patches (B, N, C patch^2)"""
    grid = (pictures.shape[2] // patch, pictures.shape[3] // patch)
    return Tokens(patches=F.unfold(pictures, patch, stride=patch).transpose(1, 2), grid=grid)


def crops(numbers: np.ndarray) -> np.ndarray:
    """(..., 4) uniform numbers -> left, top, side, as shares of the picture, and 1 where flipped."""
    side = np.sqrt(0.4 + 0.6 * numbers[..., SIDE])
    room = 1 - side
    flip = numbers[..., FLIP] < 0.5
    return np.stack([room * numbers[..., LEFT], room * numbers[..., TOP], side, flip], axis=-1)


def places(boxes: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Centres (B, h w, 2), x and y as shares of the picture, of patches on a grid over crops (B, 4)."""
    rows, columns = (torch.arange(count, device=boxes.device).add(0.5) / count for count in grid)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    x, y = x.flatten()[None], y.flatten()[None]  # (1, N)
    x = torch.where(boxes[:, FLIP, None] > 0, 1 - x, x)
    side = boxes[:, SIDE, None]
    return torch.stack([boxes[:, LEFT, None] + side * x, boxes[:, TOP, None] + side * y], dim=-1)


def cut(pictures: Tensor, boxes: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B, C, H, W) and crops (B, 4) -> the crops at `size`, bilinear."""
    grid = places(boxes, size).unflatten(1, size)  # (B, H, W, 2)
    return F.grid_sample(pictures, 2 * grid.to(pictures.dtype) - 1, padding_mode="border", align_corners=False)
