"""From a place in the sampler's order to a sample, and from samples to a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssd.batch import Batch
from ssd.data.broken import UNREADABLE, BrokenPictures
from ssd.data.cache import Pictures
from ssd.data.parcel import Parcel
from ssd.data.sampler import permutation
from ssd.errors import UserError
from ssd.views import photometry
from ssd.views.geometry import crop_views, evaluation_picture
from ssd.views.parameters import draw_many
from ssd.views.view import Views


@dataclass
class Sample:
    """One picture's views, uint8, with what was drawn for them; view-major like `Batch`."""

    views: dict[str, Tensor]  # kind -> (V, C, h, w)
    boxes: dict[str, np.ndarray]  # kind -> (V, 5)
    photometry: dict[str, np.ndarray]  # kind -> (V, P)
    index: int
    label: int


class TrainingPictures(Dataset[Sample]):
    """Views of the picture at `(epoch, index)`, drawn for (seed, epoch, index) and nothing else.

    In place of a broken picture stands the next readable one in the epoch's order, in views drawn for
    the place of the broken one: it may be in the same batch in its own place too, and is not a copy of
    that sample then. `Sample.index` names the picture that is seen.
    """

    def __init__(self, pictures: Pictures, views: Views, broken: BrokenPictures, *, seed: int):
        self.pictures, self.views, self.broken, self.seed = pictures, views, broken, seed

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        """Raises UserError when more pictures are broken than may be."""
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[tuple[int, int]]) -> list[Sample]:
        """The samples of a batch, what is drawn for them in one go. Raises as `__getitem__`."""
        found = [self._readable(epoch, index) for epoch, index in places]
        sizes = [picture.shape[:2] for _, picture in found]
        boxes, colours = draw_many(self.views, sizes, [(self.seed, epoch, index) for epoch, index in places])
        samples = []
        for row, (seen, picture) in enumerate(found):
            own = {kind: table[row] for kind, table in boxes.items()}
            drawn = {kind: table[row] for kind, table in colours.items()}
            label = self.pictures.source.label(seen)
            samples.append(Sample(crop_views(picture, own, self.views), own, drawn, seen, label))
        return samples

    def _readable(self, epoch: int, index: int) -> tuple[int, np.ndarray]:
        try:
            return index, self.pictures[index]
        except UNREADABLE as error:
            self.broken.add(index, error)
        order = permutation(len(self), self.seed, epoch)
        at = int(np.flatnonzero(order == index)[0])
        for candidate in np.roll(order, -at)[1:].tolist():
            try:
                return candidate, self.pictures[candidate]
            except UNREADABLE as error:
                self.broken.add(candidate, error)
        raise AssertionError("the count of broken pictures stops the run before all of them are")


@dataclass(frozen=True)
class Collate:
    """Samples -> Batch, stacked along B behind the views.

    Args:
        total: samples in the whole step, over all ranks.
        labelled: whether the source has labels.
        normalisation: mean and standard deviation of each channel; where given, photometry is applied
            here and the views come out float32 and normalised, else uint8 with their photometry beside.
    """

    total: int
    labelled: bool
    normalisation: tuple[Sequence[float], Sequence[float]] | None = None

    def __call__(self, samples: list[Sample]) -> Batch:
        first = samples[0]
        views = {kind: torch.stack([s.views[kind] for s in samples], 1) for kind in first.views}
        colours = {kind: stacked([s.photometry[kind] for s in samples]) for kind in first.photometry}
        if self.normalisation is not None:
            views = {kind: photometry.apply(x, colours[kind], *self.normalisation) for kind, x in views.items()}
            colours = {}
        return Batch(
            views=views,
            index=torch.tensor([s.index for s in samples]),
            total=self.total,
            label=torch.tensor([s.label for s in samples]) if self.labelled else None,
            boxes={kind: stacked([s.boxes[kind] for s in samples]) for kind in first.boxes},
            photometry=colours,
        )


def stacked(tables: list[np.ndarray]) -> Tensor:
    """B times (V, P) -> (V, B, P)"""
    return torch.from_numpy(np.stack(tables, 1))


class EvaluationPictures(Dataset[dict[str, Any] | None]):
    """The evaluation look at each picture, as the view recipe says; None where the picture is broken."""

    def __init__(self, pictures: Pictures, views: Views, broken: BrokenPictures):
        self.pictures, self.views, self.broken = pictures, views, broken

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        try:
            picture = self.pictures[index]
        except UNREADABLE as error:
            self.broken.add(index, error)
            return None
        look = evaluation_picture(picture, self.views.evaluation_size, self.views.evaluation_crop)
        return {"picture": look, "label": self.pictures.source.label(index), "index": index}


@dataclass(frozen=True)
class CollateEvaluation:
    """-> {"picture": (B, C, h, w) float32 normalised, "label": (B,) or -1, "index": (B,)}, int64.

    Broken pictures are left out, so that no other counts twice; a batch may come out shorter, or empty.
    """

    mean: Sequence[float]
    std: Sequence[float]
    size: int

    def __call__(self, samples: list[dict[str, Any] | None]) -> dict[str, Tensor]:
        whole = [s for s in samples if s is not None]
        empty = torch.zeros(0, len(self.mean), self.size, self.size, dtype=torch.uint8)
        pictures = torch.stack([s["picture"] for s in whole]) if whole else empty
        return {
            "picture": photometry.normalise(pictures, self.mean, self.std),
            "label": torch.tensor([s["label"] for s in whole], dtype=torch.int64),
            "index": torch.tensor([s["index"] for s in whole], dtype=torch.int64),
        }


class PictureLoader(DataLoader):
    """A DataLoader that unpacks parcels, and gives a user's error from a worker as if it came from here, bare.

    It can be resumed and has no state for that: the position of its sampler follows from the steps done.
    """

    def __iter__(self):
        return Received(super().__iter__(), self.dataset.broken)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take up."""


class Received:
    """An iterator over batches as they were packed; errors come without the worker's traceback."""

    def __init__(self, batches, broken: BrokenPictures):
        self.batches, self.broken = batches, broken

    def __iter__(self):
        return self

    def __next__(self):
        try:
            batch = next(self.batches)
        except UserError:
            self.broken.check()
            raise
        return batch.unpack() if isinstance(batch, Parcel) else batch


def start_worker(_: int) -> None:
    """One thread a worker: the machine's cores are shared out by the number of workers."""
    torch.set_num_threads(1)
