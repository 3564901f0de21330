"""From the bytes of a picture to its views, ours beside lightly's transform and one made of torchvision's parts."""

import io
import math
import multiprocessing
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssd.batch import Batch
from ssd.benchmarks.paired import Pair, compare
from ssd.data.broken import BrokenSamples
from ssd.data.cache import Pictures
from ssd.data.dataset import Collate, TrainingPictures, view_major
from ssd.data.pictures import decode
from ssd.data.randomness import generator
from ssd.masking.recipes import BlockMasks
from ssd.views import photometry
from ssd.views.geometry import crop_into, empty_views
from ssd.views.parameters import draw_many
from ssd.views.recipes import DINOViews
from ssd.views.view import View

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LARGE = DINOViews()
SMALL = DINOViews(global_size=32, local_size=16, local_count=6)
CHOICE = -4  # key of the choice of test pictures


def photographs(count: int, width: int, height: int, quality: int) -> list[bytes]:
    """JPEG files of that size: random crops, of the same shape, from scikit-learn's two sample photographs."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    rng = generator(CHOICE, width, height)
    files = []
    for number in range(count):
        photo = photos[number % len(photos)]
        widest = min(photo.width, photo.height * width / height)
        wide = int(rng.uniform(0.6, 1) * widest)
        high = wide * height // width
        left, top = int(rng.integers(0, photo.width - wide + 1)), int(rng.integers(0, photo.height - high + 1))
        crop = photo.crop((left, top, left + wide, top + high)).resize((width, height), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        crop.save(file, "JPEG", quality=quality)
        files.append(file.getvalue())
    return files


class Files:
    """Files in memory as a source."""

    classes: list[str] | None = None
    labels: np.ndarray | None = None

    def __init__(self, files: Sequence[bytes]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def open(self, index: int) -> bytes:
        return self.files[index]

    def label(self, index: int) -> int:
        return -1

    def describe(self, index: int) -> str:
        return f"test picture {index}"

    def fingerprint(self) -> str:
        return ""


class Ours:
    """What a loader's worker does for a batch of all the files; `colours` as of `Collate`."""

    def __init__(self, files: Sequence[bytes], views: DINOViews, colours: str = "float"):
        source = Files(files)
        broken = BrokenSamples(source, 0.0, multiprocessing.get_context())
        self.pictures = TrainingPictures(Pictures(source, 3), views, broken, seed=0)
        self.places = [(0, index) for index in range(len(files))]
        self.collate = Collate(len(files), labelled=False, colours=colours, normalisation=(MEAN, STD))

    def __call__(self) -> Batch:
        return self.collate(self.pictures.__getitems__(self.places))


@dataclass
class Theirs:
    """A transform for one picture, as other libraries' data sets call it."""

    files: Sequence[bytes]
    transform: Callable[[Any], Any]
    read: Callable[[bytes], Any]

    def __call__(self) -> list[Any]:
        return [self.transform(self.read(file)) for file in self.files]


def by_pillow(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file)).convert("RGB")


def by_torchvision(file: bytes) -> Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(torch.frombuffer(bytearray(file), dtype=torch.uint8), ImageReadMode.RGB)


def lightlys(files: Sequence[bytes], views: DINOViews) -> Theirs:
    from lightly.transforms import DINOTransform

    transform = DINOTransform(
        global_crop_size=views.global_size,
        global_crop_scale=(views.global_scale[0], views.global_scale[1]),
        local_crop_size=views.local_size,
        local_crop_scale=(views.local_scale[0], views.local_scale[1]),
        n_local_views=views.local_count,
    )
    return Theirs(files, transform, by_pillow)


def torchvisions(files: Sequence[bytes], views: DINOViews) -> Theirs:
    """torchvision's second version of its transforms on uint8 tensors, the same operations with the same settings."""
    from torchvision.transforms import InterpolationMode, v2

    def of(view: View) -> Callable[[Tensor], Tensor]:
        return v2.Compose(
            [
                v2.RandomResizedCrop(
                    view.size, tuple(view.scale), tuple(view.ratio), InterpolationMode.BICUBIC, antialias=True
                ),
                v2.RandomHorizontalFlip(view.flip),
                v2.RandomApply([v2.ColorJitter(*view.jitter)], view.jitter_prob),
                v2.RandomGrayscale(view.grey_prob),
                v2.RandomApply([v2.GaussianBlur(blur_width(view.size), tuple(view.blur_radius))], view.blur_prob),
                v2.RandomSolarize(view.solarize_threshold, view.solarize_prob),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    transforms = [of(view) for members in views.kinds().values() for view in members]
    return Theirs(files, lambda picture: [transform(picture) for transform in transforms], by_torchvision)


def blur_width(size: int) -> int:
    """Pixels of a blur's kernel: a tenth of the picture, odd, as is customary."""
    return max(3, size // 10 // 2 * 2 + 1)


def compare_views(rounds: int, count: int) -> list[Pair]:
    """All comparisons of one thread, in pictures a second of processor time."""
    large, small = photographs(count, 500, 375, 90), photographs(4 * count, 32, 32, 90)
    name, tiny = "500x375, 2x224 + 8x96", "32x32, 2x32 + 6x16"
    lightly, lightly_small = lightlys(large, LARGE), lightlys(small, SMALL)
    cases: list[tuple[str, Any, Any, int, str]] = [
        (f"{name}: normalised float32", Ours(large, LARGE), lightly, len(large), "lightly"),
        (f"{name}: coloured, uint8", Ours(large, LARGE, "levels"), lightly, len(large), "lightly"),
        (f"{name}: geometry only, uint8", Ours(large, LARGE, "none"), lightly, len(large), "lightly"),
        (f"{name}: normalised float32", Ours(large, LARGE), torchvisions(large, LARGE), len(large), "torchvision"),
        (f"{tiny}: normalised float32", Ours(small, SMALL), lightly_small, len(small), "lightly"),
        (f"{tiny}: normalised float32", Ours(small, SMALL), torchvisions(small, SMALL), len(small), "torchvision"),
        ("decoding 500x375", reading(large, decode), reading(large, by_pillow), len(large), "Pillow"),
    ]
    return [
        compare(case, ours, theirs, count=number, rounds=rounds, unit="pictures/s", against=whose)
        for case, ours, theirs, number, whose in cases
    ]


def reading(files: Sequence[bytes], read: Callable[[bytes], Any]) -> Callable[[], None]:
    def go() -> None:
        for file in files:
            read(file)

    return go


def compare_masks(rounds: int, batch: int = 1024) -> Pair:
    """Block masks of a whole batch beside a loop over crops and rectangles, as published code draws them."""
    blocks, grid = BlockMasks(even=True, smallest=4), (14, 14)

    def one_by_one() -> None:
        for number in range(batch):
            share = random.uniform(*blocks.ratio) if number < batch * blocks.share else 0.0
            one_block_mask(share * math.prod(grid), grid, 4, blocks.aspect, blocks.tries)

    return compare(
        "block masks, 14x14, half of the crops",
        lambda: blocks.draw(1, batch, grid, 0, 0),
        one_by_one,
        count=batch,
        rounds=rounds,
        unit="crops/s",
        against="a loop",
        times=20,
    )


def one_block_mask(wanted: float, grid: tuple[int, int], smallest: int, aspect: float, tries: int) -> np.ndarray:
    """Rectangles one after another until about `wanted` tokens are hidden or none is found in `tries`."""
    height, width = grid
    mask = np.zeros(grid, dtype=bool)
    hidden = 0
    while hidden < wanted:
        left = wanted - hidden
        for _ in range(tries):
            area = random.uniform(smallest, left)
            ratio = math.exp(random.uniform(math.log(aspect), -math.log(aspect)))
            high, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if high >= height or wide >= width:
                continue
            top, start = random.randint(0, height - high), random.randint(0, width - wide)
            part = mask[top : top + high, start : start + wide]
            fresh = high * wide - int(part.sum())
            if 0 < fresh <= left:
                part[:] = True
                hidden += fresh
                break
        else:
            break
    return mask


def device_photometry_ms(rounds: int, batch: int = 64) -> float:
    """Colours and normalisation of a batch of 2x224 + 8x96 views on the accelerator, ms; the median of the rounds."""
    device = torch.device("cuda")
    room = {kind: torch.randint(0, 256, x.shape, dtype=torch.uint8) for kind, x in empty_views(LARGE, batch, 3).items()}
    _, colours = draw_many(LARGE, [(375, 500)] * batch, [(0, 0, index) for index in range(batch)])
    views = {kind: x.to(device) for kind, x in room.items()}
    tables = {kind: view_major(table).to(device) for kind, table in colours.items()}
    times = []
    for _ in range(rounds + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for kind, x in views.items():
            photometry.apply(x, tables[kind], MEAN, STD)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(np.median(times[3:]))


STAGES = ("decode", "draw parameters", "crop, resize, flip", "colour, blur, normalise")


def stages(rounds: int, count: int) -> dict[str, float]:
    """What a picture costs us where, in ms of processor time; the lowest of the rounds."""
    files = photographs(count, 500, 375, 90)
    places = [(0, 0, index) for index in range(count)]
    found = []
    for _ in range(rounds):
        clock = [time.process_time()]
        pictures = [decode(file) for file in files]
        clock.append(time.process_time())
        boxes, colours = draw_many(LARGE, [picture.shape[:2] for picture in pictures], places)
        clock.append(time.process_time())
        room = empty_views(LARGE, count, 3)
        for row, picture in enumerate(pictures):
            for kind, table in boxes.items():
                crop_into(picture, table[row], room[kind][:, row])
        clock.append(time.process_time())
        for kind, x in room.items():
            photometry.apply(x, view_major(colours[kind]), MEAN, STD)
        clock.append(time.process_time())
        found.append(np.diff(clock) / count * 1e3)
    return dict(zip(STAGES, np.min(found, axis=0).tolist(), strict=True))
