"""What all picture data share: division into training and held out, normalisation, loaders."""

import multiprocessing
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from ssd.batch import Batch
from ssd.data.broken import BrokenPictures
from ssd.data.cache import AUTO_BYTES, PictureCache, Pictures
from ssd.data.dataset import (
    Collate,
    CollateEvaluation,
    EvaluationPictures,
    PictureLoader,
    TrainingPictures,
    start_worker,
)
from ssd.data.groups import split
from ssd.data.parcel import Packed
from ssd.data.pictures import Levels
from ssd.data.sampler import Draws, EpochSampler
from ssd.data.sampling import Sampling, draws_of, order_cost
from ssd.data.sources import Renamed, Source, Subset, limited
from ssd.data.statistics import NUM_SURVEYED, measured_levels, survey
from ssd.errors import UserError
from ssd.masking.batch import MaskPlan
from ssd.native import views as native
from ssd.record import Recorded
from ssd.summary import console, print_facts
from ssd.views import photometry
from ssd.views.recipes import views_named
from ssd.views.view import Views

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
NUM_SIZED = 64  # pictures that tell how large the decoded set is where none need to be measured
PREFETCHED = 4  # batches that each worker works ahead


class PictureData(Recorded, pl.LightningDataModule):
    """Pictures for self-distillation: views of the training part, plain pictures for evaluation.

    A subclass says in `sources` what there is. Inside a trainer everything is read in `setup`; in
    plain Python call `prepare(views)`, then ask for loaders.

    Args:
        batch_size: samples a step on each process.
        num_workers: processes that load; 0 loads between the steps, null = by the machine's cores.
        seed: of the order of samples and of their views.
        channels: of the pictures that a network sees; grey and colour are turned into one another.
        normalize: "data" = means and standard deviations measured on up to 2,000 pictures, "imagenet", or
            {"mean": [...], "std": [...]} in [0, 1] a channel.
        value_range: of pictures of more than 8 bits: "type" = the whole range of 16-bit numbers, "data" = measured for
            each channel on up to 200 pictures, or [black, white], each a number or one for each channel.
        max_broken_share: share of pictures that may be broken before the run stops, in [0, 1].
        val_share: of labelled data without a held-out part of its own, the share that is held out; 0 = none.
        sampling: which samples an epoch draws: Fraction (a share, another one each time), Balanced (over clusters that
            `ssd curate` wrote) or Weighted (by the weights of a mixture); null = every sample once, or by the weights.
        limit: train on only so many samples, the first of a fixed shuffle.
        evaluation_limit: at most so many training samples stand in the online evaluation's bank; null = all.
        cache: keep decoded pictures in memory; "auto" = when all of them take less than 1 GiB.
        photometry: where colours are changed: "worker", "device", or "auto" = on the device when that is
            an accelerator.
        start_method: how workers start, "fork", "spawn" or "forkserver"; null = as Python does here.
    """

    def __init__(
        self,
        *,
        batch_size: int = 64,
        num_workers: int | None = None,
        seed: int = 0,
        channels: int = 3,
        normalize: str | dict[str, list[float]] = "data",
        value_range: str | list[Any] = "type",
        max_broken_share: float = 0.01,
        val_share: float = 0.1,
        sampling: Sampling | None = None,
        limit: int | None = None,
        evaluation_limit: int | None = 10_000,
        cache: bool | str = "auto",
        photometry: str = "auto",
        start_method: str | None = None,
    ):
        super().__init__()
        for name, value in {"batch_size": batch_size, "channels": channels, "limit": limit}.items():
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}. Use 1 or more.")
        if evaluation_limit is not None and evaluation_limit < 1:
            raise UserError(f"evaluation_limit is {evaluation_limit}. Use 1 or more, or null for all.")
        if num_workers is not None and num_workers < 0:
            raise UserError(f"num_workers is {num_workers}. Use 0 or more, or null to follow the machine.")
        if not 0 <= max_broken_share <= 1:
            raise UserError(f"max_broken_share is {max_broken_share}. It is a share of all pictures, from 0 to 1.")
        if not 0 <= val_share < 1:
            raise UserError(f"val_share is {val_share}. It is the share that is held out, from 0 to less than 1.")
        choose("cache", cache, ("auto", True, False))
        choose("photometry", photometry, ("auto", "worker", "device"))
        choose("start_method", start_method, (None, *multiprocessing.get_all_start_methods()))
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.channels = channels
        self.normalize = normalize
        self.given = given_normalisation(normalize, channels)
        self.value_range = value_range
        self.levels = given_levels(value_range)
        self.max_broken_share = max_broken_share
        self.val_share = val_share
        self.sampling = sampling
        self.limit = limit
        self.evaluation_limit = evaluation_limit
        self.cache = cache
        self.photometry = photometry
        self.start_method = start_method

        self.mean: list[float]
        self.std: list[float]
        self.views: Views
        self.masks: dict[str, MaskPlan] = {}
        self._training: TrainingPictures | None = None

    def sources(self) -> tuple[Source, Source | None]:
        """Training data, and held-out data where there is such."""
        raise NotImplementedError(f"{type(self).__name__} must define sources")

    # ------------------------------------------------------------------ what there is

    @cached_property
    def _sources(self) -> tuple[Source, Source | None]:
        return self.sources()

    @cached_property
    def _parts(self) -> tuple[Source, Source | None, Source]:
        """What is trained on, the labelled bank or None, and what is held out or looked at."""
        everything, given = self._sources
        separate: Source | None = given
        if separate is not None and separate.labels is not None:
            if everything.labels is None:
                # labels only in the held-out part: one half of it is the bank of the other
                bank, queries = split(separate, 0.5)
                return limited(everything, self.limit), Subset(separate, bank), Subset(separate, queries)
            if everything.classes is not None and separate.classes is not None:
                separate = Renamed(separate, everything.classes)
            training = limited(everything, self.limit)
            return training, labelled(training), labelled(separate)
        if separate is not None and everything.labels is not None:
            raise UserError(
                "the training data has labels and the held-out data (val_path) has none. Leave val_path out, so that "
                "a part of the training data is held out, or give the held-out pictures labels."
            )
        if everything.labels is not None and self.val_share > 0 and len(everything) > 1:
            rows, held = split(everything, self.val_share)
            training = limited(Subset(everything, rows), self.limit)
            return training, labelled(training), labelled(Subset(everything, held))
        training = limited(everything, self.limit)
        return training, None, limited(training if separate is None else separate, self.evaluation_limit)

    @cached_property
    def draws(self) -> Draws:
        """Which samples of `source` an epoch draws. Raises UserError where `sampling` does not fit them."""
        return draws_of(self.source, self.sampling)

    @property
    def everything(self) -> Source:
        """All of the training data's path, held out or not, in its own order."""
        return self._sources[0]

    @property
    def source(self) -> Source:
        """What is trained on."""
        return self._parts[0]

    def parts(self) -> dict[str, Source]:
        """ "training", and "held-out" where evaluation has samples of its own. Raises UserError where they do not fit."""
        training, bank, queries = self._parts
        everything, separate = self._sources
        if separate is not None and everything.labels is None:
            return {"training": training, "held-out": separate}
        return {"training": training} if bank is None else {"training": training, "held-out": queries}

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, None where there are no labels or they are plain numbers."""
        _, bank, _ = self._parts
        return None if bank is None else bank.classes

    @property
    def num_classes(self) -> int:
        """0 where there are no labels."""
        _, bank, queries = self._parts
        if bank is None:
            return 0
        if bank.classes is not None:
            return len(bank.classes)
        return max(int(part.labels.max()) for part in (bank, queries) if part.labels is not None) + 1

    def fingerprint(self) -> str:
        """Of what is trained on: its names or footers and the choice of samples."""
        return self.source.fingerprint()

    @cached_property
    def drawn(self) -> str | None:
        """What an epoch draws and leaves out, in words; None where it draws every sample once."""
        return None if type(self.draws) is Draws else str(self.draws)

    def describe_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data."""
        return {
            **({} if self.drawn is None else {"sampling": self.drawn}),
            "mean": self.mean,
            "std": self.std,
            "value_range": "type" if self.levels is None else [list(self.levels.low), list(self.levels.high)],
            "channels": self.channels,
            "seed": self.seed,
            "fingerprint": self.fingerprint(),
        }

    # ------------------------------------------------------------------ set-up

    def setup(self, stage: str) -> None:
        trainer: Any = self.trainer
        if trainer.overfit_batches:
            raise UserError(
                f"trainer.overfit_batches: {trainer.overfit_batches} would replace the sampler. "
                "Use data.limit to train on few samples."
            )
        micro_batches = getattr(trainer.lightning_module, "micro_batches", 1)
        if self.batch_size % micro_batches:
            raise UserError(
                f"micro_batches: {micro_batches} does not divide data.batch_size {self.batch_size}. Use a divisor."
            )
        module = trainer.lightning_module
        self.prepare(module.views, module.mask_plans() if hasattr(module, "mask_plans") else None)
        if stage == "fit" and self.drawn is not None and trainer.global_rank == 0:
            print_facts(console(), {"sampling": f"{self.drawn}; {order_cost(self.draws, self.seed)}"})

    def prepare(self, views: str | Views, masks: Mapping[str, MaskPlan] | None = None) -> None:
        """Opens the data and measures it. Raises UserError where it cannot be used.

        Args:
            masks: what is masked in each batch, as `SelfDistillation.mask_plans` says it.
        """
        self.masks = dict(masks or {})
        views = views_named(views)
        if self._training is not None and views == self._training.views:
            return
        native.available()  # compiled here, once, and not by every worker
        self.views = views
        source = self.source
        context = multiprocessing.get_context(self.start_method)
        broken = BrokenPictures(source, self.max_broken_share, context)
        if self.value_range == "data":
            self.levels = measured_levels(source, self.channels, broken)
        found = survey(
            Pictures(source, self.channels, levels=self.levels), broken, NUM_SIZED if self.given else NUM_SURVEYED
        )
        self.mean, self.std = self.given or (found.mean, found.std)
        capacity = int(found.bytes_per_picture * len(source) * 1.1) + 2**16
        wanted = capacity <= AUTO_BYTES if self.cache == "auto" else self.cache
        cache = PictureCache(len(source), capacity, context) if wanted else None
        self._training = TrainingPictures(
            Pictures(source, self.channels, cache, self.levels), views, broken, seed=self.seed
        )

    # ------------------------------------------------------------------ loaders

    def train_dataloader(self) -> PictureLoader:
        dataset = self._prepared()
        dataset.draws = self.draws
        rank, world = self._place()
        sampler = EpochSampler(
            len(dataset),
            self.batch_size,
            rank=rank,
            world=world,
            seed=self.seed,
            steps_per_epoch=self._steps_per_epoch(self.draws.size // (self.batch_size * world)),
            steps_done=self._steps_done,
            draws=self.draws,
        )
        collate = Collate(
            self.batch_size * world,
            dataset.pictures.source.labels is not None,
            self._colours_in_workers(),
            (self.mean, self.std),
            self.masks,
            seed=self.seed,
            rank=rank,
            world=world,
        )
        return self._loader(dataset, collate, persistent=True, batch_sampler=sampler)

    def val_dataloader(self) -> list[PictureLoader]:
        """The bank of labelled samples and the held-out ones; without labels only pictures, in one loader."""
        self._prepared()
        _, bank, queries = self._parts
        parts = [queries] if bank is None else [limited(bank, self.evaluation_limit), queries]
        return [self._evaluation_loader(part) for part in parts]

    def test_dataloader(self) -> list[PictureLoader]:
        """As `val_dataloader`, with the whole bank."""
        self._prepared()
        _, bank, queries = self._parts
        return [self._evaluation_loader(part) for part in (bank, queries) if part is not None]

    def predict_dataloader(self) -> PictureLoader:
        """Every sample of the training data's path in its own order, held out or not."""
        self._prepared()
        return self._evaluation_loader(self.everything)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """What the workers left to the device: photometry, or normalisation alone."""
        if not isinstance(batch, Batch):
            return batch
        for kind, x in batch.views.items():
            if kind in batch.photometry:
                batch.views[kind] = photometry.apply(x, batch.photometry[kind], self.mean, self.std)
            elif x.dtype == torch.uint8:
                batch.views[kind] = photometry.normalise(x, self.mean, self.std)
        batch.photometry = {}
        return batch

    def _evaluation_loader(self, source: Source) -> PictureLoader:
        """Every sample once over all ranks: rank r of R takes samples r, r + R, ..."""
        rank, world = self._place()
        context = multiprocessing.get_context(self.start_method)
        broken = BrokenPictures(source, self.max_broken_share, context)
        dataset = EvaluationPictures(Pictures(source, self.channels, levels=self.levels), self.views, broken)
        collate = CollateEvaluation(self.mean, self.std, self.views.evaluation_size)
        return self._loader(dataset, collate, batch_size=self.batch_size, sampler=range(rank, len(source), world))

    def _loader(self, dataset: Any, collate: Any, *, persistent: bool = False, **order: Any) -> PictureLoader:
        workers = self._workers()
        apart: dict[str, Any] = {
            "multiprocessing_context": multiprocessing.get_context(self.start_method),
            "persistent_workers": persistent,
            "prefetch_factor": PREFETCHED,
            "worker_init_fn": start_worker,
        }
        return PictureLoader(
            dataset,
            collate_fn=Packed(collate) if workers else collate,
            num_workers=workers,
            pin_memory=self._device_type() == "cuda",
            # of workers' seeds, which nothing uses: drawn from the global one they would change drop path's draws
            generator=torch.Generator(),
            **order,
            **(apart if workers else {}),
        )

    def _prepared(self) -> TrainingPictures:
        if self._training is None:
            raise UserError("the data is not prepared. Call prepare(views) before asking for loaders.")
        return self._training

    def _steps_done(self) -> int:
        return 0 if self.trainer is None else int(getattr(self.trainer.lightning_module, "step", 0))

    def _steps_per_epoch(self, whole: int) -> int:
        """What the trainer takes of an epoch of `whole` steps."""
        limit = getattr(self.trainer, "limit_train_batches", 1.0)
        return max(1, min(limit, whole) if isinstance(limit, int) else int(limit * whole))

    def _place(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _device_type(self) -> str:
        return "cpu" if self.trainer is None else self.trainer.strategy.root_device.type

    def _colours_in_workers(self) -> str:
        """How much of the photometry workers do, as `Collate` calls it. To an accelerator go 8 bits, which are a quarter
        of the floats' memory on the way there."""
        elsewhere = self._device_type() != "cpu"
        if self.photometry == "device" or (self.photometry == "auto" and elsewhere):
            return "none"
        return "levels" if elsewhere else "float"

    def _workers(self) -> int:
        """On an accelerator the cores that each process has, less one, at most 16. On a CPU, where loading
        and training share them, a quarter, and none on a small machine.
        """
        if self.num_workers is not None:
            return self.num_workers
        processes = 1 if self.trainer is None else max(1, self.trainer.num_devices)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        cores //= processes
        return min(16, max(1, cores - 1)) if self._device_type() != "cpu" else min(4, cores // 4)


def labelled(source: Source) -> Source:
    """The samples that have a label, of a source with labels."""
    assert source.labels is not None
    rows = np.flatnonzero(source.labels >= 0)
    return source if len(rows) == len(source) else Subset(source, rows)


def choose(name: str, value: Any, choices: Sequence[Any]) -> None:
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise UserError(f"{name} is {value!r}. Choose one of {', '.join(map(repr, choices))}.")


def given_normalisation(normalize: Any, channels: int) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation that need no measuring, None for "data"."""
    if normalize == "data":
        return None
    if normalize == "imagenet":
        if channels != 3:
            raise UserError(
                f"normalize is 'imagenet', which is for 3 channels, and channels is {channels}. Use 'data'."
            )
        return IMAGENET["mean"], IMAGENET["std"]
    if not isinstance(normalize, Mapping) or set(normalize) != {"mean", "std"}:
        raise UserError(f"normalize is {normalize!r}. Use 'data', 'imagenet' or {{mean: [...], std: [...]}}.")
    mean, std = ([float(value) for value in normalize[name]] for name in ("mean", "std"))
    if len(mean) != channels or len(std) != channels or min(std) <= 0 or not np.isfinite([*mean, *std]).all():
        raise UserError(
            f"normalize has mean {mean} and std {std} for {channels} channels. Give one finite number a channel each, "
            "std above 0, for values in [0, 1]."
        )
    return mean, std


def given_levels(value_range: Any) -> Levels | None:
    """Levels that need no measuring, None for "type" and for "data"."""
    if isinstance(value_range, str) and value_range in ("type", "data"):
        return None
    mistake = UserError(
        f"value_range is {value_range!r}. Use 'type', 'data' or [black, white], for instance [0, 4095]."
    )
    if not isinstance(value_range, list | tuple) or len(value_range) != 2:
        raise mistake
    try:
        low, high = (
            tuple(float(value) for value in (limit if isinstance(limit, list | tuple) else [limit]))
            for limit in value_range
        )
    except (TypeError, ValueError):
        raise mistake from None
    if len(low) != len(high) or not low or not all(black < white for black, white in zip(low, high, strict=True)):
        raise mistake
    return Levels(low, high)
