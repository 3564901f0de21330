"""Further pretraining with self-distillation: a pretrained MAE goes on on the data at hand, and a second time from where it
began, held near to what the first time made of whole pictures.

Lee et al., "Self-Distillation for Further Pre-training of Transformers", ICLR 2023, arXiv 2210.02871.
Departs from the published code: nothing.
"""

import copy
from collections.abc import Sequence

from torch import Tensor

from lightning_modules.base import SelfDistillation
from ssd.backbones.base import Backbone
from ssd.batch import Batch, Targets
from ssd.decoders import MaskedDecoder
from ssd.errors import UserError
from ssd.losses.regression import squared_error
from ssd.masked_branch import (
    Decoded,
    MaskedBranch,
    has_cls,
    mean_over_hidden,
    pixel_targets,
    require_exact,
    square_patch,
    visible_places,
)
from ssd.masking.recipes import Masking, RandomMasks
from ssd.optim import AdamW, Clip, OptimizerRule
from ssd.parallel import load_whole
from ssd.schedules import Linear, Schedule
from ssd.teachers import Frozen
from ssd.views.view import Views
from ssd.weights.checkpoint import read_checkpoint, strict_load

DISTILLED = 1
"""The stage with a teacher."""


class WholeAndMasked(MaskedBranch):
    """A `MaskedBranch` that is also asked for whole pictures."""

    encodes_visible = False

    def forward(self, pictures: Tensor, visible: Tensor, whole: bool = False) -> tuple[Decoded, Tensor | None]:  # type: ignore[override]
        """What is predicted from visible patches, and with `whole` the pooled features (V, B, D) of all patches."""
        pooled = self.backbone(pictures.flatten(0, 1)).pooled().unflatten(0, pictures.shape[:2]) if whole else None
        return super().forward(pictures, visible), pooled


class FurtherPretraining(SelfDistillation):
    """Further pretraining with self-distillation (Lee et al. 2023).

    Args:
        backbone: a ViT with the weights to go on from, unless `pretrained` gives them.
        pretrained: checkpoint of an MAE run whose encoder and decoder are gone on with; null begins with the backbone's
            weights and a new decoder.
        views: recipe with a "global" view; published without any augmentation.
        masks: how patches are hidden, the same number in each sample.
        stages: lengths relative to each other. After the first the encoder becomes the teacher and the student is put back to
            where it began; a single one is further pretraining without distillation.
        distillation_weight: of the squared distance of class tokens, summed over dimensions.
        normalize_pixels: predict each patch's pixels at mean 0 and variance 1.
        decoder_dim, decoder_depth, decoder_heads: of the decoder's blocks.
    """

    student: WholeAndMasked
    teacher: Frozen

    def __init__(
        self,
        backbone: Backbone,
        *,
        pretrained: str | None = None,
        views: str | Views = "plain",
        masks: Masking = RandomMasks(0.75),  # noqa: B008 (frozen)
        stages: Sequence[float] = (1.0, 1.0),
        distillation_weight: float | Schedule = 1.0,
        normalize_pixels: bool = True,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        lr: float | Schedule = Linear(1.5e-4, 0.0, reaches_end=False),  # noqa: B008
        lr_rule: str = "none",
        optimizer: OptimizerRule = AdamW(betas=(0.9, 0.95)),  # noqa: B008
        weight_decay: float | Schedule = 0.01,
        clip: Clip | None = None,
        freeze_last_layer: float | str = 0.0,
        **engine,
    ):
        super().__init__(
            views=views,
            lr=lr,
            lr_rule=lr_rule,
            optimizer=optimizer,
            weight_decay=weight_decay,
            clip=clip,
            freeze_last_layer=freeze_last_layer,
            **engine,
        )
        backbone.require("visible", by="further pretraining")
        require_exact(masks)
        if len(stages) not in (1, 2) or min(stages) <= 0:
            raise UserError(f"stages: {list(stages)} cannot be. Give one length above 0, or two with distillation.")
        self.masking = {"global": masks}
        self.pretrained = pretrained
        self.stages = tuple(stages)
        self.distillation_weight = distillation_weight
        self.normalize_pixels = normalize_pixels
        self.patch = square_patch(backbone)

        decoder = MaskedDecoder(
            backbone.embed_dim,
            self.patch**2 * backbone.in_chans,
            dim=decoder_dim,
            depth=decoder_depth,
            num_heads=decoder_heads,
            has_cls=has_cls(backbone),
        )
        self.student = WholeAndMasked(backbone, decoder)
        self.teacher = Frozen(copy.deepcopy(backbone))
        self.origin = Frozen(copy.deepcopy(self.student))

    def targets(self, batch: Batch) -> Targets:
        pixels = pixel_targets(batch.views["global"], self.patch, self.normalize_pixels)  # (V, B, N, p p C)
        return Targets(pixels=pixels, **(self.taught(batch) if self.stage == DISTILLED else {}))

    def teach(self, batch: Batch) -> dict[str, Tensor]:
        pictures = batch.views["global"]
        return {"features": self.teacher(pictures.flatten(0, 1)).pooled().unflatten(0, pictures.shape[:2])}  # (V, B, D)

    def unstorable(self) -> str | None:
        if len(self.stages) == 1:
            return "its one stage has no teacher. Leave them out, or give it two stages."
        return super().unstorable()

    def losses(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        masks, distilled = batch.masks["global"], self.stage == DISTILLED
        decoded, pooled = self.student(batch.views["global"], visible_places(masks), whole=distilled)
        samples = len(masks.boolean) * batch.total
        error = squared_error(decoded.patches, targets.pixels)  # (V, B, N)
        terms = {"pixels": mean_over_hidden(error, masks, batch.total)}
        if distilled:
            terms["distillation"] = (pooled.float() - targets.features.float()).square().sum() / samples
        return terms

    def update(self, targets: Targets) -> None:
        """Nothing: the teacher changes between the stages alone."""

    def begin_fresh(self) -> None:
        if self.pretrained is not None:
            state = read_checkpoint(self.pretrained)["state_dict"]
            student = {
                key.removeprefix("student."): value for key, value in state.items() if key.startswith("student.")
            }
            strict_load(self.student, student, f"pretrained '{self.pretrained}'")
        self.origin.network.load_state_dict(self.student.state_dict())

    def begin_stage(self, number: int) -> None:
        self.teacher.network.load_state_dict(self.student.backbone.state_dict())
        load_whole(self.student, self.origin.network.state_dict())
