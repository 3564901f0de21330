"""What pictures and clips share: channels, their normalisation, and where colours are changed."""

from typing import Any

import torch

from datamodules.base import SampleData, choose
from ssd.batch import Batch
from ssd.data.dataset import Collate
from ssd.errors import UserError
from ssd.normalisation import given_normalisation
from ssd.views import photometry
from ssd.views.view import Views


class ColourData(SampleData):
    """Samples that are looked at. A subclass sets `mean` and `std` in `training_samples`.

    Args:
        channels: of the pictures that a network sees; grey and colour are turned into one another.
        normalize: "data" = means and standard deviations measured on a choice of samples, "imagenet", "clip", or
            {"mean": [...], "std": [...]} in [0, 1] a channel.
        photometry: where colours are changed: "worker", "device", or "auto" = on the device when that is
            an accelerator.
        view_variants: number of fixed looks of each sample: epoch e shows it as epoch e mod `view_variants` did, which stored
            targets of a frozen teacher (the method's cached_targets) need; null = another look in each epoch.
    """

    colours_by: Any = photometry
    """What changes colours and normalises, by `apply` and `normalise`."""
    collate_class: type[Collate] = Collate

    def __init__(
        self,
        *,
        channels: int = 3,
        normalize: str | dict[str, list[float]] = "data",
        photometry: str = "auto",
        view_variants: int | None = None,
        **loading: Any,
    ):
        super().__init__(**loading)
        if channels < 1:
            raise UserError(f"channels is {channels}. Use 1 or more.")
        choose("photometry", photometry, ("auto", "worker", "device"))
        self.channels = channels
        self.normalize = normalize
        self.given = given_normalisation(normalize, channels)
        if view_variants is not None and view_variants < 1:
            raise UserError(f"view_variants is {view_variants}. Use 1 or more, or null for new views in each epoch.")
        self.photometry = photometry
        self.view_variants = view_variants
        self.mean: list[float]
        self.std: list[float]

    def describe_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"mean": self.mean, "std": self.std, "channels": self.channels}
        if self.view_variants is not None:
            state["view_variants"] = self.view_variants
        return state | super().describe_state()

    def check_views(self, views: Views) -> None:
        super().check_views(views)
        if self.view_variants is not None and len(views.all_of_a_run()) > 1:
            raise UserError(
                f"view_variants: {self.view_variants} fixes the looks of a sample, and {type(views).__name__} gives them another "
                "size from step to step. Leave one of them out."
            )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """What the workers left to the device: photometry, or normalisation alone."""
        if not isinstance(batch, Batch):
            return batch
        for kind, x in batch.views.items():
            if kind in batch.photometry:
                batch.views[kind] = self.colours_by.apply(x, batch.photometry[kind], self.mean, self.std)
            elif x.dtype == torch.uint8:
                batch.views[kind] = self.colours_by.normalise(x, self.mean, self.std)
        batch.photometry = {}
        return batch

    def collate(self, labelled: bool, rank: int, world: int) -> Collate:
        return self.collate_class(
            self.batch_size * world,
            labelled,
            self._colours_in_workers(),
            (self.mean, self.std),
            self.masks,
            seed=self.seed,
            rank=rank,
            world=world,
        )

    def _colours_in_workers(self) -> str:
        """How much of the photometry workers do, as `Collate` calls it. To an accelerator go 8 bits, which are a quarter
        of the floats' memory on the way there."""
        elsewhere = self._device_type() != "cpu"
        if self.photometry == "device" or (self.photometry == "auto" and elsewhere):
            return "none"
        return "levels" if elsewhere else "float"
