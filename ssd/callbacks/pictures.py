"""What a run shows and what its network sees, as pictures in TensorBoard."""

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from ssd.batch import Batch, Masks, Tokens, network_input
from ssd.data.clip_samples import EvaluationClips, TrainingClips
from ssd.data.dataset import EvaluationPictures, TrainingPictures, evenly, looked_at
from ssd.data.sound_samples import EvaluationSounds, TrainingSounds
from ssd.distributed import is_sharded
from ssd.errors import UserError
from ssd.pictures.attention import attention_sheet
from ssd.pictures.components import all_patches, component_maps, component_sheet, fit_basis
from ssd.pictures.first_batch import clips_of, sounds_of
from ssd.pictures.neighbours import nearest, neighbour_sheet
from ssd.pictures.portraits import OfPictures, Portraits, portraits_of
from ssd.pictures.sheet import sheet

ALIKE = 8  # neighbours
BANK = 0  # the first validation loader


class RunPictures(pl.Callback):
    """Draws views and masks of the first batch, and at evaluations what the network sees in some held-out samples.

    At an evaluation: where each head of the last block looks (of transformers over pictures), the main components of patch
    features as colours that keep their meaning from one evaluation to the next, and nearest neighbours in the bank (of several
    processes, in the first one's part of it); of clips and sounds, which are drawn as strips of frames and spectrograms, the
    latter two. All goes into TensorBoard's log, by the first process; where there is no such log, or the network is spread
    over processes, nothing is drawn. Nothing here draws random numbers, and the
    networks keep their mode and their statistics: a run without it has the same weights.

    Args:
        samples: held-out samples, and those of the first batch.
        times: at most so many evaluations, spread over the run, the last one included; 0 = no pictures at all.
    """

    def __init__(self, samples: int = 6, times: int = 10):
        if samples < 1:
            raise UserError(f"pictures.samples is {samples}. Use 1 or more; pictures.times: 0 draws none.")
        if times < 0:
            raise UserError(f"pictures.times is {times}. Use 0 or more.")
        self.samples, self.times = samples, times
        self._drawn = 0  # of `times`, those that are past
        self._scores: Tensor | None = None  # of the last components, which the next ones are turned to
        self._bank: list[tuple[Tensor, Tensor, Tensor]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        logger = self._logger(trainer, pl_module)
        if logger is None or pl_module.step > 0:
            return
        data: Any = getattr(trainer, "datamodule", None)
        loader: Any = trainer.train_dataloader
        first = first_of(batch, self.samples)
        page = views_of(first, loader, data)
        if page is not None:
            self._show(logger, "views", page, pl_module.step)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._bank = []

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if dataloader_idx == BANK and self._due(trainer, pl_module):
            parts = outputs["features"].detach().float().cpu(), outputs["labels"].cpu(), outputs["index"].cpu()
            self._bank.append(parts)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not self._bank:
            return
        features, labels, index = (torch.cat(part) for part in zip(*self._bank))
        self._bank = []
        self._drawn = self._past(pl_module)
        logger = self._logger(trainer, pl_module)
        data: Any = getattr(trainer, "datamodule", None)
        loaders: Any = trainer.val_dataloaders
        loaders = loaders if isinstance(loaders, list) else [loaders]
        bank, held_out = loaders[0].dataset, loaders[-1].dataset
        looks, batch = looked_at(held_out, evenly(self.samples, len(held_out)), data.evaluation_collate())
        if logger is None or not looks:
            return
        portraits = portraits_of(held_out)
        wholes = [portraits.whole(look) for look in looks]
        backbone = pl_module.evaluated_backbone
        modes = [(part, part.training) for part in backbone.modules()]
        backbone.eval()
        attends = isinstance(portraits, OfPictures) and "visible" in backbone.can
        try:
            # a few samples are no reason to compile for another batch
            with torch.no_grad(), trainer.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):
                samples = network_input(batch).to(pl_module.device)
                tokens = backbone(samples)
                attention = backbone.attention_map(samples) if attends else None
        finally:
            for part, mode in modes:
                part.training = mode
        step = pl_module.step
        if attention is not None:
            self._show(logger, "attention", attention_sheet(wholes, attention), step)
        if len(tokens.patches[0]) > 1:
            self._show(logger, "components", self._components(wholes, tokens, portraits), step)
        if not features.isfinite().all():
            return
        own = None
        if held_out is bank:
            own = (index[None] == batch["index"][:, None]).float().argmax(1)
        similarity, rows = nearest(tokens.pooled().float().cpu(), features, ALIKE, own)
        found = [
            [portraits.small(look) for look in looked_at(bank, index[row].tolist(), data.evaluation_collate())[0]]
            for row in rows
        ]
        asked, truth = [portraits.small(look) for look in looks], [labels[row].tolist() for row in rows]
        page = neighbour_sheet(asked, found, similarity, batch["label"].tolist(), truth, data.classes)
        self._show(logger, "neighbours", page, step)

    def _components(self, wholes: list[np.ndarray], tokens: Tokens, portraits: Portraits) -> Image.Image:
        patches = all_patches(tokens)
        like = self._scores
        basis = fit_basis(patches, like if like is not None and len(like) == len(patches) else None)
        self._scores = basis.scores(patches).float()
        return component_sheet(wholes, component_maps(tokens, basis, portraits), portraits.strips)

    def _due(self, trainer: pl.Trainer, pl_module: Any) -> bool:
        """Whether this evaluation is one of `times`: the first behind each such share of the run."""
        if trainer.sanity_checking or self._past(pl_module) <= self._drawn:
            return False
        loaders: Any = trainer.val_dataloaders
        bank = getattr(loaders[0] if isinstance(loaders, list) else loaders, "dataset", None)
        shown = isinstance(bank, EvaluationPictures | EvaluationClips | EvaluationSounds)
        shown = shown and getattr(trainer, "datamodule", None) is not None
        return shown and self._logger(trainer, pl_module) is not None

    def _past(self, pl_module: Any) -> int:
        return self.times * pl_module.step // max(pl_module.total_steps, 1)

    def _logger(self, trainer: pl.Trainer, pl_module: Any) -> TensorBoardLogger | None:
        """Where pictures go from this process, None for nowhere."""
        if not self.times or not trainer.is_global_zero or is_sharded(next(pl_module.student.parameters())):
            return None
        return next((logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)

    def _show(self, logger: TensorBoardLogger, name: str, picture: Image.Image, step: int) -> None:
        logger.experiment.add_image(f"pictures/{name}", np.asarray(picture), step, dataformats="HWC")

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self._drawn, "scores": self._scores}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._drawn, self._scores = state_dict["drawn"], state_dict["scores"]


def views_of(batch: Batch, loader: Any, data: Any) -> Image.Image | None:
    """A sheet of the first samples of the loader's first batch; None for data of other kinds than ours."""
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, TrainingPictures):
        originals = [dataset.pictures[index] for index in batch.index.tolist()]
        return sheet(batch, originals, data.mean, data.std)
    if isinstance(dataset, TrainingClips):
        return clips_of(batch, dataset, data)
    if isinstance(dataset, TrainingSounds):
        return sounds_of(batch, loader, data)[0]
    return None


def first_of(batch: Batch, count: int) -> Batch:
    """The first samples of a batch, with what a sheet shows of them."""
    return Batch(
        views={kind: views[:, :count] for kind, views in batch.views.items()},
        index=batch.index[:count],
        total=batch.total,
        masks={kind: Masks(masks.boolean[:, :count]) for kind, masks in batch.masks.items()},
        boxes={kind: boxes[:, :count] for kind, boxes in batch.boxes.items()},
        valid={kind: valid[:, :count] for kind, valid in batch.valid.items()},
    )
