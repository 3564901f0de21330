"""What all data share: division into training and held out, loaders, broken samples."""

import copy
import multiprocessing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import Sampler

from ssd.batch import Batch
from ssd.cached_targets.folder import TargetFolder
from ssd.cached_targets.use import WithTargets
from ssd.cores import available_cores
from ssd.data.broken import BrokenSamples
from ssd.data.dataset import SampleLoader, start_worker
from ssd.data.groups import split
from ssd.data.parcel import Packed
from ssd.data.randomness import generator
from ssd.data.sampler import Draws, EpochSampler
from ssd.data.sampling import Sampling, draws_of, order_cost
from ssd.data.sources import Renamed, Source, Subset, limited
from ssd.errors import UserError
from ssd.masking.batch import MaskPlan
from ssd.record import Recorded
from ssd.summary import console, print_facts
from ssd.views.recipes import views_named
from ssd.views.view import Views

FIXED = -8  # key of the choice of samples that a run is measured on
PREFETCHED = 4  # batches that each worker works ahead


class SampleData(Recorded, pl.LightningDataModule, ABC):
    """Samples for self-distillation: views of the training part, plain samples for evaluation.

    A subclass says in `sources` what there is, in `training_samples` and `evaluation_samples` how a sample becomes
    views, in `collate` and `evaluation_collate` how samples become a batch. Inside a trainer everything is read in
    `setup`; in plain Python call `prepare(views)`, then ask for loaders.

    Args:
        batch_size: samples a step on each process.
        num_workers: processes that load; 0 loads between the steps, null = by the machine's cores.
        seed: of the order of samples and of their views.
        max_broken_share: share of samples that may be broken before the run stops, in [0, 1].
        val_share: of labelled data without a held-out part of its own, the share that is held out; 0 = none.
        sampling: which samples an epoch draws: Fraction (a share, another one each time), Balanced (over clusters that
            `ssd curate` wrote) or Weighted (by the weights of a mixture); null = every sample once, or by the weights.
        limit: train on only so many samples, the first of a fixed shuffle.
        evaluation_limit: at most so many training samples stand in the online evaluation's bank; null = all.
        start_method: how workers start, "fork", "spawn" or "forkserver"; null = as Python does here.
    """

    sample_word = "sample"
    """What messages call a sample."""
    views_class: type[Views] = Views
    """The recipes that fit the data."""

    def __init__(
        self,
        *,
        batch_size: int = 64,
        num_workers: int | None = None,
        seed: int = 0,
        max_broken_share: float = 0.01,
        val_share: float = 0.1,
        sampling: Sampling | None = None,
        limit: int | None = None,
        evaluation_limit: int | None = 10_000,
        start_method: str | None = None,
    ):
        super().__init__()
        for name, value in {"batch_size": batch_size, "limit": limit}.items():
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}. Use 1 or more.")
        if evaluation_limit is not None and evaluation_limit < 1:
            raise UserError(f"evaluation_limit is {evaluation_limit}. Use 1 or more, or null for all.")
        if num_workers is not None and num_workers < 0:
            raise UserError(f"num_workers is {num_workers}. Use 0 or more, or null to follow the machine.")
        if not 0 <= max_broken_share <= 1:
            raise UserError(f"max_broken_share is {max_broken_share}. It is a share of all samples, from 0 to 1.")
        if not 0 <= val_share < 1:
            raise UserError(f"val_share is {val_share}. It is the share that is held out, from 0 to less than 1.")
        choose("start_method", start_method, (None, *multiprocessing.get_all_start_methods()))
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.max_broken_share = max_broken_share
        self.val_share = val_share
        self.sampling = sampling
        self.limit = limit
        self.evaluation_limit = evaluation_limit
        self.start_method = start_method

        self.views: Views
        self.masks: dict[str, MaskPlan] = {}
        self.targets: TargetFolder | None = None
        self._training: Any = None

    # ------------------------------------------------------------------ what a kind of data says

    @abstractmethod
    def sources(self) -> tuple[Source, Source | None]:
        """Training data, and held-out data where there is such."""

    @abstractmethod
    def training_samples(self, source: Source, broken: BrokenSamples) -> Any:
        """A dataset of (epoch, index) -> sample, with `broken` and `views`; measures what has to be known of the data."""

    @abstractmethod
    def evaluation_samples(self, source: Source, broken: BrokenSamples) -> Any:
        """A dataset of index -> sample or None where it is broken, with `broken`."""

    @abstractmethod
    def collate(self, labelled: bool, rank: int, world: int) -> Callable[[Any], Any]:
        """Samples of this rank -> Batch, with `self.masks` drawn for it."""

    @abstractmethod
    def evaluation_collate(self) -> Callable[[list[Any]], Any]:
        """Samples -> {"sample" (B, ...), "label" (B,) or -1, "index" (B,)}."""

    def division(self, everything: Source) -> tuple[np.ndarray, np.ndarray] | None:
        """Rows to train on and rows held out, for data without a held-out part of its own; None = nothing is held out."""
        if everything.labels is None or self.val_share == 0 or len(everything) < 2:
            return None
        return split(everything, self.val_share)

    def order(self, samples: Any, rank: int, world: int) -> Sampler[list[Any]]:
        """Which samples this rank takes in which step."""
        return EpochSampler(
            len(samples),
            self.batch_size,
            rank=rank,
            world=world,
            seed=self.seed,
            steps_per_epoch=self._steps_per_epoch(self.draws.size // (self.batch_size * world)),
            steps_done=self._steps_done,
            draws=self.draws,
        )

    def describe_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data."""
        drawn = {} if self.drawn is None else {"sampling": self.drawn}
        return {**drawn, "seed": self.seed, "fingerprint": self.fingerprint()}

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
                bank, queries = (labelled(Subset(separate, rows)) for rows in split(separate, 0.5))
                return limited(everything, self.limit), bank, queries
            if (everything.classes is None) != (separate.classes is None):
                named, numbered = ("training", "held-out") if separate.classes is None else ("held-out", "training")
                raise UserError(
                    f"the {named} data has names of classes and the {numbered} data has plain numbers, so they cannot be "
                    "told to be the same. Give both names or both numbers."
                )
            if everything.classes is not None and separate.classes is not None:
                separate = Renamed(separate, everything.classes)
            training = limited(everything, self.limit)
            return training, labelled(training), labelled(separate)
        if separate is not None and everything.labels is not None:
            raise UserError(
                "the training data has labels and the held-out data (val_path) has none. Leave val_path out, so that "
                "a part of the training data is held out, or give the held-out samples labels."
            )
        division = None if separate is not None else self.division(everything)
        if division is not None:
            rows, held = division
            training = limited(Subset(everything, rows), self.limit)
            if everything.labels is not None:
                return training, labelled(training), labelled(Subset(everything, held))
            return training, None, limited(Subset(everything, held), self.evaluation_limit)
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

    def labelled_parts(self) -> tuple[Source, Source]:
        """The labelled samples to learn from, and those that are held out to judge it. Raises UserError without labels."""
        _, bank, queries = self._parts
        if bank is None:
            raise UserError(
                "the data has no labels to learn from and to be judged by. Give data with labels (class folders, a list "
                "file with labels, or a label column) by --data, with a part held out: data.val_path or data.val_share."
            )
        return bank, queries

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
        if stage == "fit":  # and for the evaluation that ends it, whose teacher rests too
            folder = getattr(module, "cached_targets", None)
            self.targets = None if folder is None else TargetFolder(folder)
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
        self.check_views(views)
        self.views = views
        self._training = self.training_samples(self.source, self._broken(self.source))

    def takes(self, views: Views) -> bool:
        """Whether the recipe fits the data."""
        return isinstance(views, self.views_class)

    def check_views(self, views: Views) -> None:
        """Raises UserError for a recipe that does not fit the data."""
        if not self.takes(views):
            raise UserError(
                f"{type(self).__name__} makes views by {self.views_class.__name__}, and the method's are "
                f"{type(views).__name__}. Set the method's views to such a recipe."
            )

    def _broken(self, source: Source) -> BrokenSamples:
        context = multiprocessing.get_context(self.start_method)
        return BrokenSamples(source, self.max_broken_share, context, self.sample_word)

    # ------------------------------------------------------------------ loaders

    def train_dataloader(self) -> SampleLoader:
        samples = self._prepared()
        samples.draws = self.draws
        rank, world = self._place()
        collate = self._training_collate(rank, world)
        return self._loader(samples, collate, persistent=True, batch_sampler=self.order(samples, rank, world))

    def _training_collate(self, rank: int, world: int) -> Callable[[Any], Any]:
        """Samples of what is trained on -> Batch, with what is stored of them."""
        collate = self.collate(self.source.labels is not None, rank, world)
        return collate if self.targets is None else WithTargets(collate, self.targets)

    def batch_of_looks(self, looks: Sequence[tuple[int, int]]) -> Batch:
        """Fixed looks (variant, index in `source`), loaded here and now, without what is stored of them."""
        return self.collate(False, 0, 1)(self._prepared().__getitems__(looks))

    def looks_dataloader(self, looks: Sequence[Sequence[tuple[int, int]]]) -> SampleLoader:
        """Batches of fixed looks: rows of (variant, index in `source`), in this order."""
        return self._loader(self._prepared(), self.collate(False, 0, 1), batch_sampler=looks)

    def views_of(self, source: Source) -> Any:
        """The views of a source's samples, as `training_samples` makes them, to be loaded by `loader_in_order`."""
        self._prepared()
        return self.training_samples(source, self._broken(source))

    def loader_in_order(self, samples: Any, order: Sampler[list[Any]]) -> SampleLoader:
        """Batches of what `views_of` gave, in an order of one's own."""
        rank, world = self._place()
        return self._loader(samples, self.collate(True, rank, world), persistent=True, batch_sampler=order)

    def look_at(self, source: Source) -> SampleLoader:
        """The evaluation look at every sample of a source."""
        self._prepared()
        return self._evaluation_loader(source)

    def fixed_batches(self, samples: int) -> Iterator[Batch]:
        """A fixed choice of `samples` training samples, this rank's part of them, as epoch 0 shows them, in batches.

        The same at any time of a run and after it, so that what is measured on them can be compared. All ranks have as
        many; what does not divide into ranks and slices is left out.
        """
        # of all samples, whatever the run draws of them: in place of a broken one stands the next of these
        dataset = copy.copy(self._prepared())
        dataset.draws = Draws(len(dataset))
        rank, world = self._place()
        slices = 1 if self.trainer is None else getattr(self.trainer.lightning_module, "micro_batches", 1)
        each = min(samples, len(dataset)) // (world * slices) * slices
        chosen = generator(FIXED).permutation(len(dataset))[rank * each : (rank + 1) * each].tolist()
        collate = self._training_collate(rank, world)
        for first in range(0, each, self.batch_size):
            places = [(0, index) for index in chosen[first : first + self.batch_size]]
            yield collate(dataset.__getitems__(places))

    def val_dataloader(self) -> list[SampleLoader]:
        """The bank of labelled samples and the held-out ones; without labels only samples, in one loader."""
        self._prepared()
        _, bank, queries = self._parts
        parts = [queries] if bank is None else [limited(bank, self.evaluation_limit), queries]
        return [self._evaluation_loader(part) for part in parts]

    def test_dataloader(self) -> list[SampleLoader]:
        """As `val_dataloader`, with the whole bank."""
        self._prepared()
        return [self._evaluation_loader(part) for part in self.test_sources()]

    def test_sources(self) -> list[Source]:
        """What `test_dataloader` looks at."""
        _, bank, queries = self._parts
        return [part for part in (bank, queries) if part is not None]

    def augmented_dataloader(self, samples: int, looks: int) -> SampleLoader:
        """Batches as in training of so many samples, evenly spaced in the training data: the views of each that the first
        `looks` epochs would draw, all epochs of a batch before the next batch."""
        dataset = self._prepared()
        rows = np.unique(np.linspace(0, len(self.source) - 1, min(samples, len(self.source))).astype(int)).tolist()
        batches = [rows[first : first + self.batch_size] for first in range(0, len(rows), self.batch_size)]
        places = [[(epoch, row) for row in batch] for batch in batches for epoch in range(looks)]
        return self._loader(dataset, self.collate(False, 0, 1), batch_sampler=places)

    def predict_dataloader(self) -> SampleLoader:
        """Every sample of the training data's path in its own order, held out or not."""
        self._prepared()
        return self._evaluation_loader(self.everything)

    def rows_dataloader(self, rows: Sequence[int]) -> SampleLoader:
        """These samples of the training data's path, in this order, each as an evaluation sees it."""
        self._prepared()
        samples = self.evaluation_samples(self.everything, self._broken(self.everything))
        return self._loader(samples, self.evaluation_collate(), batch_size=self.batch_size, sampler=rows)

    def _evaluation_loader(self, source: Source) -> SampleLoader:
        """Every sample once over all ranks: rank r of R takes samples r, r + R, ... A rank that is one short takes one of
        the first again, because networks that are spread over ranks run on all of them or on none."""
        rank, world = self._place()
        samples = self.evaluation_samples(source, self._broken(source))
        order: Sequence[int] = range(rank, len(source), world)
        if len(source) % world > 0 and rank >= len(source) % world:
            order = [*order, rank % len(source)]
        return self._loader(samples, self.evaluation_collate(), batch_size=self.batch_size, sampler=order)

    def _loader(self, dataset: Any, collate: Any, *, persistent: bool = False, **order: Any) -> SampleLoader:
        workers = self._workers()
        apart: dict[str, Any] = {
            "multiprocessing_context": multiprocessing.get_context(self.start_method),
            "persistent_workers": persistent,
            "prefetch_factor": PREFETCHED,
            "worker_init_fn": start_worker,
        }
        return SampleLoader(
            dataset,
            collate_fn=Packed(collate) if workers else collate,
            num_workers=workers,
            pin_memory=self._device_type() == "cuda",
            # of workers' seeds, which nothing uses: drawn from the global one they would change drop path's draws
            generator=torch.Generator(),
            **order,
            **(apart if workers else {}),
        )

    def _prepared(self) -> Any:
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

    def _workers(self) -> int:
        """On an accelerator the cores that each process has, less one, at most 16. On a CPU, where loading
        and training share them, a quarter, and none on a small machine.
        """
        if self.num_workers is not None:
            return self.num_workers
        processes = 1 if self.trainer is None else max(1, self.trainer.num_devices)
        cores = available_cores()
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
