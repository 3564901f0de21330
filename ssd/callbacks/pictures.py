"""What a run shows and what its network sees, as pictures in TensorBoard."""

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from ssd.batch import Batch, Masks, Tokens
from ssd.data.dataset import EvaluationPictures, TrainingPictures, evenly, looked_at
from ssd.distributed import is_sharded
from ssd.errors import UserError
from ssd.pictures.attention import attention_sheet
from ssd.pictures.components import component_sheet, fit_basis
from ssd.pictures.neighbours import nearest, neighbour_sheet
from ssd.pictures.sheet import colours_of, sheet

ALIKE = 8  # neighbours
BANK = 0  # the first validation loader


class RunPictures(pl.Callback):
    """Draws views and masks of the first batch, and at evaluations what the network sees in some held-out pictures.

    At an evaluation: where each head of the last block looks (of transformers), the main components of patch features as
    colours that keep their meaning from one evaluation to the next, and nearest neighbours in the bank (of several
    processes, in the first one's part of it). Only pictures are drawn, into TensorBoard's log, by the first process; where
    there is no such log, or the network is spread over processes, none are. Nothing here draws random numbers, and the
    networks keep their mode and their statistics: a run without it has the same weights.

    Args:
        samples: held-out pictures, and samples of the first batch.
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
        dataset = getattr(trainer.train_dataloader, "dataset", None)
        if not isinstance(dataset, TrainingPictures):
            return
        first = first_of(batch, self.samples)
        originals = [dataset.pictures[index] for index in first.index.tolist()]
        self._show(logger, "views", sheet(first, originals, data.mean, data.std), pl_module.step)

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
        pictures = [colours_of(look) for look in looks]
        backbone = pl_module.evaluated_backbone
        modes = [(part, part.training) for part in backbone.modules()]
        backbone.eval()
        try:
            # a few pictures are no reason to compile for another batch
            with torch.no_grad(), trainer.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):
                samples = batch["sample"].to(pl_module.device)
                tokens = backbone(samples)
                attention = backbone.attention_map(samples) if "visible" in backbone.can else None
        finally:
            for part, mode in modes:
                part.training = mode
        step = pl_module.step
        if attention is not None:
            self._show(logger, "attention", attention_sheet(pictures, attention), step)
        if len(tokens.patches[0]) > 1 and len(tokens.grid) == 2:
            self._show(logger, "components", self._components(pictures, tokens), step)
        if not features.isfinite().all():
            return
        own = None
        if held_out is bank:
            own = (index[None] == batch["index"][:, None]).float().argmax(1)
        similarity, rows = nearest(tokens.pooled().float().cpu(), features, ALIKE, own)
        found = [
            [colours_of(look) for look in looked_at(bank, index[row].tolist(), data.evaluation_collate())[0]]
            for row in rows
        ]
        page = neighbour_sheet(
            pictures, found, similarity, batch["label"].tolist(), [labels[row].tolist() for row in rows], data.classes
        )
        self._show(logger, "neighbours", page, step)

    def _components(self, pictures: list[np.ndarray], tokens: Tokens) -> Image.Image:
        patches = tokens.patches.flatten(0, 1)
        like = self._scores
        basis = fit_basis(patches, like if like is not None and len(like) == len(patches) else None)
        self._scores = basis.scores(patches).float()
        rows, columns = tokens.grid
        return component_sheet(pictures, basis.scores(tokens.patches), (rows, columns))

    def _due(self, trainer: pl.Trainer, pl_module: Any) -> bool:
        """Whether this evaluation is one of `times`: the first behind each such share of the run."""
        if trainer.sanity_checking or self._past(pl_module) <= self._drawn:
            return False
        data: Any = getattr(trainer, "datamodule", None)
        loaders: Any = trainer.val_dataloaders
        bank = loaders[0] if isinstance(loaders, list) else loaders
        shown = isinstance(getattr(bank, "dataset", None), EvaluationPictures) and data is not None
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


def first_of(batch: Batch, count: int) -> Batch:
    """The first samples of a batch, with what a sheet shows of them."""
    return Batch(
        views={kind: views[:, :count] for kind, views in batch.views.items()},
        index=batch.index[:count],
        total=batch.total,
        masks={kind: Masks(masks.boolean[:, :count]) for kind, masks in batch.masks.items()},
        boxes={kind: boxes[:, :count] for kind, boxes in batch.boxes.items()},
    )
