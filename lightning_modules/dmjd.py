"""DMJD: two masks of one picture that together hide all of it, and a second loss on what each leaves visible.

Ma et al., "Disjoint Masking with Joint Distillation for Efficient Masked Image Modeling", IEEE TMM 2023, arXiv 2301.00230.
Departs from the published code: visible tokens are compared with the targets of their own places (there with those of other
places, in all but one or two of a hundred); the weight of their loss and the share that is predicted are settings that count.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_modules.base import SelfDistillation
from ssd.backbones.base import Backbone
from ssd.batch import Batch, Targets
from ssd.decoders import EPS, MaskedDecoder, Projector, places
from ssd.errors import UserError
from ssd.hog import BINS, hog_targets
from ssd.losses.regression import smooth_error, squared_error
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
from ssd.masking.recipes import DisjointMasks, Masking
from ssd.normalisation import put_back
from ssd.normalisers import layer_normed
from ssd.optim import LR_RULES, AdamW, Clip, Optimized, OptimizerRule
from ssd.schedules import Cosine, Schedule
from ssd.teachers import Frozen, NoTeacher, Preprocessed
from ssd.views.view import Views

TARGETS = ("hog", "pixels", "teacher")


class JointBranch(MaskedBranch):
    """A `MaskedBranch` that also predicts for the patches it sees.

    Args:
        predictor: (..., D) -> (..., out_dim), of visible patches one by one.
    """

    def __init__(self, backbone: Backbone, decoder: MaskedDecoder, predictor: nn.Module):
        super().__init__(backbone, decoder)
        self.predictor = predictor

    def forward(self, pictures: Tensor, visible: Tensor) -> tuple[Decoded, Tensor]:  # type: ignore[override]
        """What is predicted for all places, and of the visible ones (M, B, n) by themselves: (M, B, n, out_dim)."""
        decoded = super().forward(pictures, visible)
        return decoded, self.predictor(decoded.tokens.patches).unflatten(0, visible.shape[:2])


class DMJD(SelfDistillation):
    """DMJD (Ma et al. 2023).

    Args:
        backbone: a ViT; published are a ViT and ConvMAE's network of masked convolutions and blocks, which is not here.
        views: recipe with one "global" view.
        masks: the two masks of each picture. `DisjointMasks` together hide all of it, published in cells of 2 x 2 patches;
            other recipes with a fixed count draw two that know nothing of each other.
        target: what is predicted of each patch: "hog", histograms of its gradients; "pixels", at mean 0 and variance 1;
            "teacher", what a frozen network makes of it in the whole picture, normalised.
        cell: side of the squares of a histogram, px; published 8, for patches of 16.
        teacher: the network of target "teacher"; its last block's patches count. It runs once for both masks.
        teacher_normalize: how the teacher's pictures were normalised: "data" = as the data's, "imagenet", "clip", or
            {"mean": [...], "std": [...]}.
        visible_weight: of the loss on visible patches, theta in the paper; 0 is disjoint masking alone.
        predictor_dim: width of the two hidden layers that predict for visible patches.
        decoder_dim, decoder_depth, decoder_heads: of the decoder's blocks.
        lr_rule: as of all methods, and by how often a picture's patches are predicted for each time they are hidden too: with
            "linear", times 1 / .6 where two masks of 60 % hide everything (section 3.3 of the paper).
    """

    student: JointBranch
    teacher: Frozen | NoTeacher
    masks_per_view = 2

    def __init__(
        self,
        backbone: Backbone,
        *,
        views: str | Views = "dmjd",
        masks: Masking = DisjointMasks(0.6, cell=2),  # noqa: B008 (frozen)
        target: str = "hog",
        cell: int = 8,
        teacher: Backbone | None = None,
        teacher_normalize: str | dict[str, list[float]] = "data",
        visible_weight: float | Schedule = 1.0,
        predictor_dim: int = 512,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        lr: float | Schedule = Cosine(6e-4, 0.0, warmup=0.05),  # noqa: B008
        lr_rule: str = "linear",
        optimizer: OptimizerRule = AdamW(betas=(0.9, 0.95)),  # noqa: B008
        weight_decay: float | Schedule = 0.05,
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
        backbone.require("visible", by="DMJD")
        require_exact(masks)
        self.patch = square_patch(backbone)
        self._check(target, cell, teacher)
        self.masking = {"global": masks}
        self.target = target
        self.cell = cell
        self.visible_weight = visible_weight

        out_dim = self._target_dim(backbone, teacher)
        decoder = MaskedDecoder(
            backbone.embed_dim,
            out_dim,
            dim=decoder_dim,
            depth=decoder_depth,
            num_heads=decoder_heads,
            has_cls=has_cls(backbone),
        )
        predictor = nn.Sequential(
            Projector(backbone.embed_dim, predictor_dim, (predictor_dim, predictor_dim), norm=True),
            nn.LayerNorm(predictor_dim, eps=EPS, elementwise_affine=False),
            Projector(predictor_dim, out_dim),
        )
        self.student = JointBranch(backbone, decoder, predictor)
        self.teacher = (
            NoTeacher() if teacher is None else Frozen(Preprocessed(teacher, teacher_normalize, "teacher_normalize"))
        )

    def targets(self, batch: Batch) -> Targets:
        pictures = batch.views["global"]  # (1, B, C, H, W)
        if self.target == "pixels":
            return Targets(patches=pixel_targets(pictures, self.patch, normalize=True))
        if self.target == "hog":
            levels = 255 * put_back(pictures, batch.normalisation)
            return Targets(patches=hog_targets(levels, self.patch, self.cell))
        grid = self.student.backbone.grid(*pictures.shape[-2:])
        last = self._taught_by.num_blocks
        tokens = self.teacher(pictures.flatten(0, 1), grid, batch.normalisation, taps=(last,))
        patches = tokens.taps[f"block{last}"][:, -tokens.patches.shape[1] :]  # before the final norm
        return Targets(patches=layer_normed(patches)[None])  # (1, B, N, Dt)

    def losses(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        masks = batch.masks["global"]
        visible = visible_places(masks)  # (2, B, n)
        decoded, seen = self.student(batch.views["global"], visible)
        error = squared_error(decoded.patches, targets.patches)  # (2, B, N)
        own = places(targets.patches.expand(len(visible), -1, -1, -1).flatten(0, 1), visible.flatten(0, 1))
        apart = smooth_error(seen, own.unflatten(0, visible.shape[:2]))  # (2, B, n)
        return {
            "masked": mean_over_hidden(error, masks, batch.total),
            "visible": apart.mean((0, 2)).sum() / batch.total,
        }

    def update(self, targets: Targets) -> None:
        """Nothing: the targets are the picture's own, or a frozen network's."""

    def optimized(self) -> list[Optimized]:
        factor = LR_RULES[self.lr_rule](predictions_of_a_hidden_patch(self.masking["global"]))
        lr = self.lr.scaled(factor) if isinstance(self.lr, Schedule) else self.lr * factor
        return [replace(plan, lr=lr) for plan in super().optimized()]

    @property
    def _taught_by(self) -> Backbone:
        network: Any = self.teacher.network
        return network.backbone

    def _target_dim(self, backbone: Backbone, teacher: Backbone | None) -> int:
        if teacher is not None:
            return teacher.embed_dim
        values = (self.patch // self.cell) ** 2 * BINS if self.target == "hog" else self.patch**2
        return values * backbone.in_chans  # 108 of patches of 16 px in cells of 8

    def _check(self, target: str, cell: int, teacher: Backbone | None) -> None:
        kinds = self.views.kinds()
        if len(kinds.get("global", ())) != 1:
            raise UserError(
                f"views: DMJD draws two masks of one 'global' view, and the views have {len(kinds.get('global', ()))} of them. "
                "Use the recipe 'dmjd', or CropViews."
            )
        if target not in TARGETS:
            raise UserError(f"target: '{target}' is unknown. Choose one of {', '.join(TARGETS)}.")
        if (target == "teacher") != (teacher is not None):
            raise UserError(
                f"target: {target} and teacher: {'none' if teacher is None else teacher.name} do not fit. A teacher is for "
                "target: teacher, and target: teacher needs one, for instance ViT with weights."
            )
        if teacher is not None:
            teacher.require("visible", "taps", by="DMJD as a teacher")  # a transformer, whose taps are tokens
        if target == "hog" and (cell < 1 or self.patch % cell):
            raise UserError(f"cell: {cell} px does not divide patches of {self.patch} px. Use a divisor.")


def predictions_of_a_hidden_patch(masks: Masking) -> float:
    """The share of a picture that two masks predict over the share that each hides: 1 where that is not known."""
    if not isinstance(masks, DisjointMasks):
        return 1.0
    return min(masks.predicted, 2 * masks.ratio) / masks.ratio
