"""From a place in the sampler's order to a sample, and from samples to a batch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssd.batch import Batch, Masks
from ssd.data.broken import UNREADABLE, BrokenSamples, readable
from ssd.data.cache import Pictures
from ssd.data.parcel import Parcel
from ssd.data.sampler import Draws, drawn_for
from ssd.data.sources import Source
from ssd.errors import UserError
from ssd.masking.batch import MaskPlan
from ssd.memory import keep_freed_memory
from ssd.views import photometry
from ssd.views.geometry import crop_into, empty_views, evaluation_picture
from ssd.views.parameters import ViewDraws
from ssd.views.view import PictureViews

CHUNK_BYTES = 2**23  # decoded pictures that wait for their views to be drawn; they stay in a near cache


@dataclass
class Samples:
    """The views of B pictures or clips, uint8, with what was drawn for them; view-major like `Batch`."""

    views: dict[str, Tensor]  # kind -> (V, B, C, h, w) or (V, B, C, T, h, w)
    boxes: dict[str, np.ndarray]  # kind -> (B, V, 5), of clips (B, V, 7)
    photometry: dict[str, np.ndarray]  # kind -> (B, V, P)
    index: list[int]
    label: list[int]
    step: int  # of the run, which the batch is for
    variant: list[int] | None = None  # number of each sample's look, where looks are fixed


class TrainingPictures(Dataset[Samples]):
    """Views of the pictures at places `(epoch, index)`, drawn for (seed, epoch, index) and nothing else.

    A place with a third number is a sample that the epoch has drawn so many times before, and gets other views.
    In place of a broken picture stands the next readable one in the epoch's order, in views drawn for
    the place of the broken one: it may be in the same batch in its own place too, and is not a copy of
    that sample then. `Samples.index` names the pictures that are seen.

    With `variants` each picture has so many looks and no others, as `drawn_for` says; what stands in place of a broken one is
    shown in a look of its own.
    """

    def __init__(
        self,
        pictures: Pictures,
        views: PictureViews,
        broken: BrokenSamples,
        *,
        seed: int,
        draws: Draws | None = None,
        variants: int | None = None,
    ):
        self.pictures, self.views, self.broken, self.seed = pictures, views, broken, seed
        self.draws = draws or Draws(len(pictures))
        self.variants = variants

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, place: tuple[int, ...]) -> Samples:
        """A batch of one. Raises UserError when more pictures are broken than may be."""
        return self.__getitems__([place])

    def __getitems__(self, places: Sequence[tuple[int, ...]]) -> Samples:
        """A batch, all views in one block a kind. Raises as `__getitem__`."""
        views = self.views.at(self.seed, getattr(places, "step", 0))
        room = empty_views(views, len(places), self.pictures.channels)
        looks = [drawn_for(place, self.variants) for place in places]
        draws = ViewDraws(views, [(self.seed, *look) for look in looks])
        seen: list[int] = []
        boxes: list[dict[str, np.ndarray]] = []
        waiting: list[np.ndarray] = []
        for number, place in enumerate(places, start=1):
            found, picture = readable(self.pictures.__getitem__, self.broken, self.draws, self.seed, *place)
            if self.variants is not None and found != place[1]:
                draws.draw_again(number - 1, (self.seed, looks[number - 1][0], found))
            seen.append(found)
            waiting.append(picture)
            if number < len(places) and sum(picture.nbytes for picture in waiting) < CHUNK_BYTES:
                continue
            first = number - len(waiting)
            boxes.append(draws.boxes(first, [picture.shape[:2] for picture in waiting]))
            for row, picture in enumerate(waiting):
                for kind, table in boxes[-1].items():
                    crop_into(picture, table[row], room[kind][:, first + row])
            waiting.clear()
        return Samples(
            room,
            {kind: np.concatenate([part[kind] for part in boxes]) for kind in room},
            draws.photometry(),
            seen,
            [self.pictures.source.label(index) for index in seen],
            getattr(places, "step", 0),
            None if self.variants is None else [look[0] for look in looks],
        )


@dataclass(frozen=True)
class Collate:
    """Samples -> Batch.

    Args:
        total: samples in the whole step, over all ranks.
        labelled: whether the source has labels.
        colours: "float": photometry is applied here and the views come out float32 and normalised; "levels": it is
            applied and they come out uint8, to be normalised elsewhere; "none": uint8 with their photometry beside.
        normalisation: mean and standard deviation of each channel, for "float"; the batch says them in any case.
        masks: name, mostly of the kind of view -> what is masked, drawn for the step and no other: the same whoever draws it;
            or for each sample's fixed look, where a plan says so and looks are fixed.
        seed: of masks.
        rank, world: which part of the step's samples this is.
    """

    total: int
    labelled: bool
    colours: str = "none"
    normalisation: tuple[Sequence[float], Sequence[float]] | None = None
    masks: Mapping[str, MaskPlan] = field(default_factory=dict)
    seed: int = 0
    rank: int = 0
    world: int = 1

    apply: ClassVar[Callable[..., Tensor]] = staticmethod(photometry.apply)

    def __call__(self, samples: Samples) -> Batch:
        views = samples.views
        colours = {kind: view_major(table) for kind, table in samples.photometry.items()}
        if self.colours != "none":
            mean, std = self.normalisation if self.colours == "float" and self.normalisation else (None, None)
            views = {kind: self.apply(x, colours[kind], mean, std) for kind, x in views.items()}
            colours = {}
        return Batch(
            views=views,
            index=torch.tensor(samples.index),
            total=self.total,
            label=torch.tensor(samples.label) if self.labelled else None,
            masks={
                name: self._masks(samples, name, plan, number)
                for number, (name, plan) in enumerate(sorted(self.masks.items()))
            },
            boxes={kind: view_major(table) for kind, table in samples.boxes.items()},
            photometry=colours,
            normalisation=None if self.normalisation is None else torch.tensor(self.normalisation, dtype=torch.float32),
            variant=None if samples.variant is None else torch.tensor(samples.variant),
        )

    def _masks(self, samples: Samples, name: str, plan: MaskPlan, number: int) -> Masks:
        if plan.of_looks and samples.variant is not None:
            looks = zip(samples.variant, samples.index, strict=True)
            return plan.draw_each([(self.seed, *look, number) for look in looks])
        return plan.draw(
            len(samples.index),
            *(self.seed, samples.step, number),
            rank=self.rank,
            world=self.world,
            side=samples.views[name].shape[-1] if name in samples.views else None,
        )


def view_major(table: np.ndarray) -> Tensor:
    """(B, V, P) -> (V, B, P)"""
    return torch.from_numpy(np.ascontiguousarray(table.swapaxes(0, 1)))


class EvaluationPictures(Dataset[dict[str, Any] | None]):
    """The evaluation look at each picture, as the view recipe says; None where the picture is broken."""

    def __init__(self, pictures: Pictures, views: PictureViews, broken: BrokenSamples):
        self.pictures, self.views, self.broken = pictures, views, broken

    @property
    def source(self) -> Source:
        return self.pictures.source

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        try:
            picture = self.pictures[index]
        except UNREADABLE as error:
            self.broken.add(index, error)
            return None
        assert self.views.evaluation_size is not None, "settled when the recipe was built"
        look = evaluation_picture(picture, self.views.evaluation_size, self.views.evaluation_crop)
        return {"sample": look, "label": self.pictures.source.label(index), "index": index}


def looked_at(
    samples: Dataset[dict[str, Any] | None], rows: Sequence[int], collate: Callable[[list[Any]], dict[str, Tensor]]
) -> tuple[list[Any], dict[str, Tensor]]:
    """The evaluation looks at some samples, and the batch of them that a network gets; broken ones are left out of both."""
    found = [item for item in (samples[int(row)] for row in rows) if item is not None]
    return [item["sample"] for item in found], collate(found)


def evenly(count: int, of: int) -> list[int]:
    """At most `count` places, spread evenly over `of`: sources are often sorted by class."""
    return np.unique(np.linspace(0, of - 1, min(count, of)).round().astype(int)).tolist()


@dataclass(frozen=True)
class CollateEvaluation:
    """-> {"sample": (B, C, h, w) float32 normalised, "label": (B,) or -1, "index": (B,)}, int64.

    Broken pictures are left out, so that no other counts twice; a batch may come out shorter, or empty.
    """

    mean: Sequence[float]
    std: Sequence[float]
    size: int

    def __call__(self, samples: list[dict[str, Any] | None]) -> dict[str, Tensor]:
        whole = [s for s in samples if s is not None]
        empty = torch.zeros(0, len(self.mean), self.size, self.size, dtype=torch.uint8)
        pictures = torch.stack([s["sample"] for s in whole]) if whole else empty
        return {
            "sample": photometry.normalise(pictures, self.mean, self.std),
            "label": torch.tensor([s["label"] for s in whole], dtype=torch.int64),
            "index": torch.tensor([s["index"] for s in whole], dtype=torch.int64),
        }


class SampleLoader(DataLoader):
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

    def __init__(self, batches, broken: BrokenSamples):
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
    """One thread a worker: the machine's cores are shared out by the number of workers. And memory that was freed stays
    with the worker, which needs as much for the next batch: to get it anew costs an eighth of its time."""
    torch.set_num_threads(1)
    keep_freed_memory()
