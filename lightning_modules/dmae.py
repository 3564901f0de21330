"""DMAE: a small MAE also matches what a larger, frozen MAE makes of the same visible patches half-way through.

Bai et al., "Masked Autoencoders Enable Efficient Knowledge Distillers", CVPR 2023, arXiv 2208.12256.
Departs from the published code: the teacher stops behind its tapped block and has no decoder, which changes no number; how many
patches stay visible is said as a number (10 and 4), where shares of 95 and 98 % left 9 and 3.
"""

from typing import Any

from torch import Tensor

from lightning_modules.base import SelfDistillation
from ssd.backbones.base import Backbone
from ssd.batch import Batch, Targets
from ssd.cached_targets.forms import Sampled, picked
from ssd.decoders import MaskedDecoder, Projector
from ssd.errors import UserError
from ssd.losses.regression import absolute_error, squared_error
from ssd.masked_branch import MaskedBranch, has_cls, mean_over_hidden, pixel_targets, require_exact, visible_places
from ssd.masking.recipes import Masking, RandomMasks
from ssd.normalisers import unit_length
from ssd.optim import AdamW, Clip, OptimizerRule
from ssd.schedules import Cosine, Schedule
from ssd.teachers import Frozen
from ssd.views.view import Views

DISTANCES = {"l1": absolute_error, "l2": squared_error}


class DMAE(SelfDistillation):
    """DMAE (Bai et al. 2023).

    Args:
        backbone: the ViT that is pretrained.
        teacher: a frozen ViT with the same patches, for instance ViT with the weights of a longer MAE run.
        views: recipe with one "global" view or more.
        masks: which patches both networks do not see, the same number in each sample; a ratio of 0, with `pixel_weight` 0,
            shows them all.
        student_block, teacher_block: the blocks whose outputs are matched; null is three quarters of the way through.
        distance: of features at unit length, "l1" or "l2", its mean over dimensions: about .035 for unrelated ones of 1,024.
        feature_weight: of that term beside the pixels'.
        pixel_weight: of the pixels' term; 0 leaves plain feature regression.
        normalize_pixels: predict each patch's pixels at mean 0 and variance 1; published without.
        decoder_dim, decoder_depth, decoder_heads: of the decoder's blocks.
    """

    student: MaskedBranch
    teacher: Frozen
    teacher_sees_masks = True
    stored_in_part = Sampled(tokens={"features": 2})

    def __init__(
        self,
        backbone: Backbone,
        teacher: Backbone,
        *,
        views: str | Views = "crop",
        masks: Masking = RandomMasks(0.75),  # noqa: B008 (frozen)
        student_block: int | None = None,
        teacher_block: int | None = None,
        distance: str = "l1",
        feature_weight: float | Schedule = 1.0,
        pixel_weight: float | Schedule = 1.0,
        normalize_pixels: bool = False,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        lr: float | Schedule = Cosine(1.5e-4, 0.0, warmup="20 epochs"),  # noqa: B008
        optimizer: OptimizerRule = AdamW(betas=(0.9, 0.95)),  # noqa: B008
        weight_decay: float | Schedule = 0.05,
        clip: Clip | None = None,
        freeze_last_layer: float | str = 0.0,
        **engine,
    ):
        super().__init__(
            views=views,
            lr=lr,
            optimizer=optimizer,
            weight_decay=weight_decay,
            clip=clip,
            freeze_last_layer=freeze_last_layer,
            **engine,
        )
        for network in (backbone, teacher):
            network.require("visible", "taps", "until", by="DMAE")
        self.student_block = three_quarters(backbone) if student_block is None else student_block
        self.teacher_block = three_quarters(teacher) if teacher_block is None else teacher_block
        self.pixel_weight = pixel_weight
        self._check(backbone, teacher, masks, distance)
        self.masking = {"global": masks}
        self.distance = distance
        self.feature_weight = feature_weight
        self.normalize_pixels = normalize_pixels
        self.patch = int(backbone.patch_size)  # type: ignore[arg-type]

        decoder = MaskedDecoder(
            backbone.embed_dim,
            self.patch**2 * backbone.in_chans,
            dim=decoder_dim,
            depth=decoder_depth,
            num_heads=decoder_heads,
            has_cls=has_cls(backbone),
        )
        projector = Projector(backbone.embed_dim, teacher.embed_dim)
        self.student = MaskedBranch(backbone, decoder, {f"block{self.student_block}": projector})
        self.teacher = Frozen(teacher)

    def targets(self, batch: Batch) -> Targets:
        pixels = pixel_targets(batch.views["global"], self.patch, self.normalize_pixels)  # (V, B, N, p p C)
        return Targets(**self.taught(batch), pixels=pixels)

    def teach(self, batch: Batch) -> dict[str, Tensor]:
        pictures, visible = batch.views["global"], visible_places(batch.masks["global"])
        last = self.teacher_block
        tokens = self.teacher(pictures.flatten(0, 1), visible=visible.flatten(0, 1), taps=(last,), until=last)
        return {
            "features": unit_length(tokens.taps[f"block{last}"]).unflatten(0, pictures.shape[:2])
        }  # (V, B, 1 + n, Dt)

    def asked_of_teacher(self) -> dict[str, Any]:
        return {"block": self.teacher_block}

    def losses(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        masks = batch.masks["global"]
        decoded = self.student(batch.views["global"], visible_places(masks))
        features = unit_length(decoded.projected[f"block{self.student_block}"])
        features = picked(features, getattr(targets, "places", None))  # those whose targets were stored
        apart = DISTANCES[self.distance](features, targets.features)  # (V, B, 1 + n)
        error = squared_error(decoded.patches, targets.pixels)  # (V, B, N)
        return {
            "pixel": mean_over_hidden(error, masks, batch.total),
            "feature": apart.mean(-1).sum() / (len(masks.boolean) * batch.total),
        }

    def update(self, targets: Targets) -> None:
        """Nothing: the teacher is frozen."""

    def _check(self, backbone: Backbone, teacher: Backbone, masks: Masking, distance: str) -> None:
        require_exact(masks, nothing_hidden=self.pixel_weight == 0)
        if not isinstance(backbone.patch_size, int) or backbone.patch_size != teacher.patch_size:
            raise UserError(
                f"patches of the student are {backbone.patch_size} px and the teacher's {teacher.patch_size}: both see the "
                "same ones. Use networks of one square patch."
            )
        if prefix(backbone) != prefix(teacher):
            raise UserError(
                f"student and teacher have {prefix(backbone)} and {prefix(teacher)} tokens before their patches, which are "
                "matched one by one. Use networks with as many."
            )
        if distance not in DISTANCES:
            raise UserError(f"distance: '{distance}' is unknown. Choose one of {', '.join(DISTANCES)}.")
        for name, block, network in (
            ("student_block", self.student_block, backbone),
            ("teacher_block", self.teacher_block, teacher),
        ):
            if not 1 <= block <= network.num_blocks:
                raise UserError(f"{name}: {block} is no block of '{network.name}'. Use 1 to {network.num_blocks}.")


def three_quarters(network: Backbone) -> int:
    """The block three quarters of the way through: 9 of 12 and 18 of 24, as published."""
    return max(1, network.num_blocks * 3 // 4)


def prefix(network: Backbone) -> int:
    return getattr(network, "num_prefix", 0)
